// Diversification block, subtle differences eq. 1–8.
//
// The random words of a tile are drawn with one channel per lane; so are the suppressed positions that follow from
// them, first of a patch row, then of the whole map. A map is then read twice, from memory for its maximum and from the
// first-level cache for the sums of what is visible and of what is hidden; M' is never written.
#pragma once

#include "../common/diversify.h"
#include "maps.h"

namespace fgvc_ext::FGVC_ISA {

constexpr int kTileParts = kTile / kLanes;  // vectors for one word of every channel of a tile, or for 16 positions

// The random words of one map per lane, four draws at a time.
class TileDraws {
 public:
  FGVC_INLINE TileDraws make(const Diversify& op, const Tile& tile, int part) {
    TileDraws draws;
    draws.seed_ = static_cast<uint64_t>(op.seed[op.seed_per_sample ? tile.sample : 0]);
    draws.sample_ = op.seed_per_sample ? 0 : static_cast<uint32_t>(tile.sample);
    draws.channel_ =
        Words{} + static_cast<uint32_t>(tile.channel + part * kLanes) + reinterpret_cast<Words>(lane_numbers());
    return draws;
  }

  // All ones in the lanes that hide at draw number `draw`; draws must come in order.
  __attribute__((always_inline)) Words hides(int64_t draw, uint64_t threshold) {
    if (draw % 4 == 0) {
      const Words call = Words{} + static_cast<uint32_t>(draw / 4);
      words_ = philox<VectorLanes>({{call, channel_, Words{} + sample_, Words{} + kDiversifyStream}}, seed_);
    }
    if (threshold >> 32) return ~Words{};
    const auto hidden = words_.word[draw % 4] < static_cast<uint32_t>(threshold);
    return reinterpret_cast<Words>(hidden);
  }

 private:
  uint64_t seed_;
  uint32_t sample_;
  Words channel_;
  PhiloxWords<VectorLanes> words_;
};

// Sets bits [begin, end) of `row`, 32-bit words kTile apart, in the lanes of `hidden`.
FGVC_INLINE void set_columns(uint32_t* row, int64_t begin, int64_t end, Words hidden) {
  for (int64_t word = begin / 32; word * 32 < end; ++word) {
    const int64_t low = begin > word * 32 ? begin - word * 32 : 0, high = end - word * 32 < 32 ? end - word * 32 : 32;
    const uint32_t columns = (high == 32 ? ~0u : (1u << high) - 1) & ~((1u << low) - 1);
    Words bits;
    std::memcpy(&bits, row + word * kTile, sizeof(bits));
    store(row + word * kTile, bits | (hidden & columns));
  }
}

// Writes 32 bits at bit offset `at` of the map's bits.
FGVC_INLINE void append_bits(uint32_t* map_bits, int64_t at, const uint32_t* row_word) {
  Words row, bits;
  uint32_t* to = map_bits + at / 32 * kTile;
  std::memcpy(&row, row_word, sizeof(row));
  std::memcpy(&bits, to, sizeof(bits));
  store(to, bits | row << static_cast<uint32_t>(at % 32));
  if (at % 32) store(to + kTile, row >> static_cast<uint32_t>(32 - at % 32));
}

// 32-bit words for the bits of a row of positions, and of a whole map (append_bits touches one more).
FGVC_INLINE int64_t words_per_row(const Layout4& layout) { return (layout.width + 31) / 32; }
FGVC_INLINE int64_t words_per_map(const Layout4& layout) { return layout.positions() / 32 + 2; }

// Patches that hide, eq. 4, as bits y·W + x of every map: word w of channel c at map_bits[w·kTile + c].
// Returns the channels whose peaks hide (eq. 2), one bit each.
static __attribute__((noinline)) uint32_t draw_patches(const Diversify& op, const Tile& tile, uint32_t* row,
                                                       uint32_t* map_bits) {
  const int64_t words = words_per_row(op.layout), map_words = words_per_map(op.layout);
  uint32_t hide_peaks = 0;
  std::memset(map_bits, 0, map_words * kTile * 4);
  for (int part = 0; part < kTileParts && part * kLanes < tile.channels; ++part) {
    TileDraws draws = TileDraws::make(op, tile, part);
    int64_t draw = 0;
    const Words peaks = draws.hides(draw++, op.peak_threshold);
    hide_peaks |= lane_bits(reinterpret_cast<Ints>(peaks)) << part * kLanes;
    for (int64_t top = 0; top < op.layout.height; top += op.patch_size) {
      for (int64_t word = 0; word < words; ++word) store(row + word * kTile, Words{});
      for (int64_t left = 0; left < op.layout.width; left += op.patch_size) {
        const int64_t right = left + op.patch_size < op.layout.width ? left + op.patch_size : op.layout.width;
        set_columns(row, left, right, draws.hides(draw++, op.patch_threshold));
      }
      for (int64_t y = top; y < top + op.patch_size && y < op.layout.height; ++y)
        for (int64_t word = 0; word < words; ++word)
          append_bits(map_bits + part * kLanes, y * op.layout.width + word * 32, row + word * kTile);
    }
  }
  return hide_peaks;
}

// 16 bits of a map's word column: positions [start, start + 16), start a multiple of 16.
FGVC_INLINE uint32_t sixteen_bits(const uint32_t* map_bits, int64_t start) {
  return map_bits[start / 32 * kTile] >> start % 32 & 0xFFFF;
}

FGVC_INLINE void write_bits(uint8_t* bits, int64_t start, int64_t positions, uint32_t sixteen) {
  bits[start / 8] = static_cast<uint8_t>(sixteen);
  if (start + 8 < positions) bits[start / 8 + 1] = static_cast<uint8_t>(sixteen >> 8);
}

// The largest values of a map, lane by lane; NaN is passed over.
FGVC_INLINE Floats lane_maxima(const float* map, int64_t positions) {
  const float lowest = -__builtin_inff();
  Floats even = broadcast(lowest), odd = even;  // two chains, so that neither waits for itself
  int64_t i = 0;
  for (; i + 2 * kLanes <= positions; i += 2 * kLanes) {
    even = maximum(load(map + i), even);
    odd = maximum(load(map + i + kLanes), odd);
  }
  even = maximum(load_within(map, i, positions, lowest), even);
  odd = maximum(load_within(map, i + kLanes, positions, lowest), odd);
  return maximum(odd, even);
}

// Lane sums of M' over one map (eq. 6–8); writes the map's bits. `next` is the map to bring into the cache meanwhile.
FGVC_INLINE Floats suppress(const float* map, int64_t positions, const uint32_t* map_bits, bool hide_peaks, float peak,
                            float alpha, const float* next, uint8_t* bits) {
  const Floats peaks_are = broadcast(peak), nothing = {};
  const uint32_t hidden_peaks = hide_peaks ? 0xFFFF : 0;
  Floats visible = {}, hidden = {};
  const auto sixteen = [&](int64_t start, const Floats x[kTileParts], uint32_t valid) {
    uint32_t peaks = 0;
    for (int part = 0; part < kTileParts; ++part) peaks |= equal_bits(x[part], peaks_are) << part * kLanes;
    const uint32_t suppressed = ((sixteen_bits(map_bits, start) & ~peaks) | (hidden_peaks & peaks)) & valid;
    for (int part = 0; part < kTileParts; ++part) {
      visible += select(suppressed >> part * kLanes, nothing, x[part]);
      hidden += select(suppressed >> part * kLanes, x[part], nothing);
    }
    return suppressed;
  };
  Floats x[kTileParts];
  int64_t start = 0;
  for (; start + kTile <= positions; start += kTile) {
    for (int part = 0; part < kTileParts; ++part) x[part] = load(map + start + part * kLanes);
    __builtin_prefetch(next + start);
    const uint16_t suppressed = static_cast<uint16_t>(sixteen(start, x, 0xFFFF));
    std::memcpy(bits + start / 8, &suppressed, 2);
  }
  if (start < positions) {
    for (int part = 0; part < kTileParts; ++part)
      x[part] = load_within(map + start, part * kLanes, positions - start, 0.f);
    write_bits(bits, start, positions, sixteen(start, x, (1u << (positions - start)) - 1));
  }
  return visible + alpha * hidden;
}

// Sums of M' of up to kLanes maps, `pitch` apart. Maxima and sums are taken over one map per lane, so that no map waits
// for the lanes of another.
static __attribute__((noinline)) void suppress_maps(const Diversify& op, const float* rows, int64_t pitch,
                                                    int64_t ahead, int64_t maps, const uint32_t* map_bits,
                                                    uint32_t hide_peaks, uint8_t* bits, float* totals) {
  const int64_t positions = op.layout.positions(), bytes = op.bytes_per_map();
  const float alpha = static_cast<float>(op.alpha);
  Floats lanes[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane)
    lanes[lane] = lane_maxima(rows + (lane < maps ? lane : 0) * pitch, positions);
  transpose(lanes);
  for (int i = 1; i < kLanes; ++i) lanes[0] = maximum(lanes[0], lanes[i]);
  float peak[kLanes];
  store(peak, lanes[0]);
  for (int64_t lane = 0; lane < maps; ++lane)
    lanes[lane] = suppress(rows + lane * pitch, positions, map_bits + lane, hide_peaks >> lane & 1, peak[lane], alpha,
                           rows + lane * pitch + ahead, bits + lane * bytes);
  transpose(lanes);
  for (int i = 1; i < kLanes; ++i) lanes[0] += lanes[i];
  std::memcpy(totals, &lanes[0], maps * sizeof(float));

  for (int64_t lane = 0; lane < maps; ++lane) {
    if (totals[lane] == totals[lane]) continue;
    const float* map = rows + lane * pitch;
    bool nan = false;  // or else infinities of both signs
    for (int64_t i = 0; i < positions; ++i) nan |= map[i] != map[i];
    if (nan)
      suppress(map, positions, map_bits + lane, false, totals[lane], alpha, map, bits + lane * bytes);  // no peaks
  }
}

FGVC_INLINE double suppress(const double* map, int64_t positions, const uint32_t* map_bits, bool hide_peaks,
                            double alpha, uint8_t* bits) {
  double peak = map[0], total = 0;  // NaN where the map has one: then nothing equals it and the map has no peaks
  for (int64_t i = 0; i < positions; ++i) peak = map[i] > peak || map[i] != map[i] ? map[i] : peak;
  for (int64_t i = 0; i < positions; ++i) peak = map[i] != map[i] ? map[i] : peak;
  for (int64_t start = 0; start < positions; start += kTile) {
    uint32_t suppressed = sixteen_bits(map_bits, start);
    for (int i = 0; i < kTile; ++i) {
      if (start + i >= positions) {
        suppressed &= (1u << i) - 1;
        break;
      }
      const double x = map[start + i];
      if (x == peak) suppressed = (suppressed & ~(1u << i)) | static_cast<uint32_t>(hide_peaks) << i;
      total += suppressed >> i & 1 ? alpha * x : x;
    }
    write_bits(bits, start, positions, suppressed);
  }
  return total;
}
FGVC_INLINE void suppress_maps(const Diversify& op, const double* rows, int64_t pitch, int64_t, int64_t maps,
                               const uint32_t* map_bits, uint32_t hide_peaks, uint8_t* bits, double* totals) {
  for (int64_t map = 0; map < maps; ++map)
    totals[map] = suppress(rows + map * pitch, op.layout.positions(), map_bits + map, hide_peaks >> map & 1, op.alpha,
                           bits + map * op.bytes_per_map());
}

template <class T>
FGVC_INLINE void diversify_tiles(const Diversify& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  const Layout4& layout = op.layout;
  const int64_t positions = layout.positions(), bytes = op.bytes_per_map(),
                at_once = channels_at_once(op.dtype, layout);
  auto* gathered = take_rows<Value>(scratch, op.dtype, layout);
  auto* row = scratch.take<uint32_t>(kTile * words_per_row(layout));
  auto* map_bits = scratch.take<uint32_t>(kTile * words_per_map(layout));
  for (int64_t number = begin; number < end; ++number) {
    const Tile whole = tile_at(layout, number);
    const uint32_t hide_peaks = draw_patches(op, whole, row, map_bits);
    const int64_t first = whole.sample * layout.channels + whole.channel;
    Value totals[kTile];
    for (int64_t done = 0; done < whole.channels; done += at_once) {
      const Tile tile{whole.sample, whole.channel + done, smaller(at_once, whole.channels - done)};
      int64_t pitch;
      const Value* rows = tile_rows(static_cast<const T*>(op.maps), layout, tile, gathered, pitch);
      const int64_t ahead = rows == gathered ? 0 : kLanes * pitch;  // what is gathered is in the cache already
      for (int64_t map = 0; map < tile.channels; map += kLanes) {
        const int64_t c = done + map;
        suppress_maps(op, rows + map * pitch, pitch, ahead, smaller(kLanes, tile.channels - map), map_bits + c,
                      hide_peaks >> c, op.bits + (first + c) * bytes, totals + c);
      }
    }
    for (int64_t c = 0; c < whole.channels; ++c)
      static_cast<T*>(op.scores)[first + c] = from_float<T>(totals[c] / static_cast<Value>(positions));
  }
}

// to[i] = bit i of `bits` ? set[i] : clear[i], for kTile values.
template <class T>
FGVC_INLINE void select_sixteen(uint32_t bits, const T* set, const T* clear, T* to) {
  static_assert(kTile == 16);
  if constexpr (sizeof(T) == 4) {
    for (int part = 0; part < kTileParts; ++part)
      store(to + part * kLanes, select(bits >> part * kLanes, load(set + part * kLanes), load(clear + part * kLanes)));
  } else if constexpr (sizeof(T) == 2) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const auto vector = [](const T* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); };
    store(to, _mm256_mask_blend_epi16(bits, vector(clear), vector(set)));
#else
    typedef uint16_t Shorts __attribute__((vector_size(4 * kLanes)));
    constexpr int kShorts = 2 * kLanes;
    Shorts one_bit;
    for (int i = 0; i < kShorts; ++i) one_bit[i] = static_cast<uint16_t>(1 << i % 16);
    for (int first = 0; first < kTile; first += kShorts) {
      Shorts ones, zeros;
      std::memcpy(&ones, set + first, sizeof(ones));
      std::memcpy(&zeros, clear + first, sizeof(zeros));
      const uint16_t part = static_cast<uint16_t>(bits >> first);
      store(to + first, (one_bit & part) != 0 ? ones : zeros);
    }
#endif
  } else if constexpr (sizeof(T) == 1) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const auto vector = [](const T* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); };
    store(to, _mm_mask_blend_epi8(bits, vector(clear), vector(set)));
#else
    constexpr uint64_t kOnes = 0x0101010101010101u;
    for (int first = 0; first < kTile; first += 8) {
      uint64_t ones, zeros;
      std::memcpy(&ones, set + first, sizeof(ones));
      std::memcpy(&zeros, clear + first, sizeof(zeros));
      const uint64_t own = (bits >> first & 0xFF) * kOnes & 0x8040201008040201u;  // byte i keeps bit i
      const uint64_t chosen = ((own + 0x7F * kOnes) >> 7 & kOnes) * 0xFF;
      store(to + first, (ones & chosen) | (zeros & ~chosen));
    }
#endif
  } else {
    for (int i = 0; i < kTile; ++i) to[i] = bits >> i & 1 ? set[i] : clear[i];
  }
}

// to[position] = suppressed ? hidden : plain, for one contiguous map.
template <class T>
FGVC_INLINE void spread_map(const uint8_t* bits, int64_t positions, T plain, T hidden, T* to) {
  T plains[kTile], hiddens[kTile];
  for (int i = 0; i < kTile; ++i) plains[i] = plain, hiddens[i] = hidden;
  int64_t i = 0;
  for (; i + kTile <= positions; i += kTile)
    select_sixteen<T>(bits[i >> 3] | bits[(i >> 3) + 1] << 8, hiddens, plains, to + i);
  for (; i < positions; ++i) to[i] = bits[i >> 3] >> (i & 7) & 1 ? hidden : plain;
}

// Of eight positions, whose bits are a byte of every channel: one bit per channel, channel 0 is bit 0.
FGVC_INLINE void channels_of_positions(const uint8_t* bits, int64_t bytes, int64_t channels, uint32_t of_position[8]) {
  uint8_t column[kTile] = {};
  for (int64_t c = 0; c < channels; ++c) column[c] = bits[c * bytes];
#if defined(__SSE2__)
  __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(column));
  for (int i = 7; i >= 0; --i, x = _mm_add_epi8(x, x)) of_position[i] = _mm_movemask_epi8(x);  // of the highest bits
#else
  for (int i = 0; i < 8; ++i) {
    of_position[i] = 0;
    for (int c = 0; c < kTile; ++c) of_position[i] |= (column[c] >> i & 1u) << c;
  }
#endif
}

// Interleaved channels (channels_last and the like): all channels of a tile at once.
template <class T>
FGVC_INLINE void spread_interleaved(const Layout4& layout, const uint8_t* bits, int64_t channels, const T* plain,
                                    const T* hidden, T* base) {
  const int64_t positions = layout.positions(), bytes = (positions + 7) / 8;
  int64_t y = 0, x = 0;
  for (int64_t first = 0; first < positions; first += 8) {
    uint32_t of_position[8];
    channels_of_positions(bits + first / 8, bytes, channels, of_position);
    for (int64_t i = 0; i < smaller(8, positions - first); ++i) {
      T* at = base + y * layout.stride[2] + x * layout.stride[3];
      if (channels == kTile) {
        select_sixteen<T>(of_position[i], hidden, plain, at);
      } else {
        T row[kTile];
        select_sixteen<T>(of_position[i], hidden, plain, row);
        std::memcpy(at, row, channels * sizeof(T));
      }
      if (++x == layout.width) x = 0, ++y;
    }
  }
}

// The same for the channels of a tile, in any layout. `plain` and `hidden` have kTile values.
template <class T>
FGVC_INLINE void spread_tile(const Layout4& layout, const uint8_t* all_bits, const Tile& tile, const T* plain,
                             const T* hidden, T* output) {
  const int64_t positions = layout.positions(), bytes = (positions + 7) / 8;
  const uint8_t* bits = all_bits + (tile.sample * layout.channels + tile.channel) * bytes;
  T* base = output + layout.offset(tile.sample, tile.channel);
  if (layout.map_is_contiguous()) {
    for (int64_t c = 0; c < tile.channels; ++c)
      spread_map<T>(bits + c * bytes, positions, plain[c], hidden[c], base + c * layout.stride[1]);
    return;
  }
  if (layout.channels_are_contiguous()) return spread_interleaved<T>(layout, bits, tile.channels, plain, hidden, base);
  for (int64_t y = 0, i = 0; y < layout.height; ++y)
    for (int64_t x = 0; x < layout.width; ++x, ++i) {
      T* at = base + y * layout.stride[2] + x * layout.stride[3];
      for (int64_t c = 0; c < tile.channels; ++c)
        at[c * layout.stride[1]] = bits[c * bytes + (i >> 3)] >> (i & 7) & 1 ? hidden[c] : plain[c];
    }
}

template <class T>
FGVC_INLINE void spread_gradients(const SpreadGradient& op, int64_t begin, int64_t end) {
  using Value = Accumulation<T>;
  for (int64_t number = begin; number < end; ++number) {
    const Tile tile = tile_at(op.layout, number);
    T plain[kTile] = {}, hidden[kTile] = {};
    for (int64_t c = 0; c < tile.channels; ++c) {
      const int64_t map = tile.sample * op.layout.channels + tile.channel + c;
      const Value share = to_float(static_cast<const T*>(op.grad)[map]) / static_cast<Value>(op.layout.positions());
      plain[c] = from_float<T>(share);
      hidden[c] = from_float<T>(share * static_cast<Value>(op.alpha));
    }
    spread_tile<T>(op.layout, op.bits, tile, plain, hidden, static_cast<T*>(op.output));
  }
}

void diversify(const Diversify& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, diversify_tiles<T>(op, begin, end, scratch));
}
void spread_gradient(const SpreadGradient& op, int64_t begin, int64_t end, Scratch&) {
  FGVC_SWITCH_DTYPE(op.dtype, spread_gradients<T>(op, begin, end));
}
void spread_mask(const SpreadMask& op, int64_t begin, int64_t end, Scratch&) {
  uint8_t zeros[kTile] = {}, ones[kTile];
  std::memset(ones, 1, sizeof(ones));
  for (int64_t number = begin; number < end; ++number)
    spread_tile<uint8_t>(op.layout, op.bits, tile_at(op.layout, number), zeros, ones, static_cast<uint8_t*>(op.output));
}

}  // namespace fgvc_ext::FGVC_ISA
