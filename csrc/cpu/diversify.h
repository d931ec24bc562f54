// Diversification block, subtle differences eq. 1–8.
//
// The random words of a tile are drawn with one channel a lane; so are the suppressed positions that follow from them,
// first of a patch row, then of the whole map. A map is then read twice, from memory for its maximum and from the
// first-level cache for the sums of what is visible and of what is hidden; M' is never written.
#pragma once

#include "maps.h"

namespace fgvc_ext::FGVC_ISA {

constexpr int kTileParts = kTile / kLanes;  // vectors for one word of every channel of a tile, or for 16 positions

// The random words of one map a lane, four draws at a time.
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

// Patches that hide, eq. 4, as bits y·W + x of every map: word w of channel c at map_bits[w·kTile + c].
// Returns the channels whose peaks hide (eq. 2), one bit each.
static __attribute__((noinline)) uint32_t draw_patches(const Diversify& op, const Tile& tile, uint32_t* row,
                                                       uint32_t* map_bits) {
  const int64_t words = op.words_per_row(), map_words = op.layout.positions() / 32 + 2;
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

// Sums of M' of up to kLanes maps, `pitch` apart. Maxima and sums are taken over one map a lane, so that no map waits
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
FGVC_INLINE void diversify_tiles(const Diversify& op, int64_t begin, int64_t end, void* scratch) {
  using Value = Accumulation<T>;
  const int64_t positions = op.layout.positions(), bytes = op.bytes_per_map();
  auto* rows_scratch = static_cast<Value*>(scratch);
  auto* row = reinterpret_cast<uint32_t*>(rows_scratch + scratch_rows(op.dtype, op.layout) * row_pitch(positions));
  auto* map_bits = row + kTile * op.words_per_row();
  for (int64_t number = begin; number < end; ++number) {
    const Tile tile = tile_at(op.layout, number);
    const uint32_t hide_peaks = draw_patches(op, tile, row, map_bits);
    int64_t pitch;
    const Value* rows = tile_rows(static_cast<const T*>(op.maps), op.layout, tile, rows_scratch, pitch);
    const int64_t ahead = rows == rows_scratch ? 0 : kLanes * pitch;  // scratch is in the cache already
    const int64_t first = tile.sample * op.layout.channels + tile.channel;
    Value totals[kTile];
    for (int64_t c = 0; c < tile.channels; c += kLanes) {
      const int64_t left = tile.channels - c;
      suppress_maps(op, rows + c * pitch, pitch, ahead, left < kLanes ? left : kLanes, map_bits + c, hide_peaks >> c,
                    op.bits + (first + c) * bytes, totals + c);
    }
    for (int64_t c = 0; c < tile.channels; ++c)
      static_cast<T*>(op.scores)[first + c] = from_float<T>(totals[c] / static_cast<Value>(positions));
  }
}

// output[position] = suppressed ? hidden : plain, for the channels of a tile.
template <class T>
FGVC_INLINE void spread_tile(const SpreadBits& op, const Tile& tile, const T* plain, const T* hidden) {
  const Layout4& layout = op.layout;
  const int64_t positions = layout.positions(), bytes = (positions + 7) / 8;
  const uint8_t* bits = op.bits + (tile.sample * layout.channels + tile.channel) * bytes;
  T* base = static_cast<T*>(op.output) + layout.offset(tile.sample, tile.channel);
  if (layout.map_is_contiguous()) {
    for (int64_t c = 0; c < tile.channels; ++c, bits += bytes) {
      T* map = base + c * layout.stride[1];
      for (int64_t i = 0; i < positions; ++i) map[i] = bits[i >> 3] >> (i & 7) & 1 ? hidden[c] : plain[c];
    }
    return;
  }
  for (int64_t y = 0, i = 0; y < layout.height; ++y)
    for (int64_t x = 0; x < layout.width; ++x, ++i) {
      T* at = base + y * layout.stride[2] + x * layout.stride[3];
      for (int64_t c = 0; c < tile.channels; ++c)
        at[c * layout.stride[1]] = bits[c * bytes + (i >> 3)] >> (i & 7) & 1 ? hidden[c] : plain[c];
    }
}

template <class T>
FGVC_INLINE void spread_gradients(const SpreadBits& op, int64_t begin, int64_t end) {
  using Value = Accumulation<T>;
  for (int64_t number = begin; number < end; ++number) {
    const Tile tile = tile_at(op.layout, number);
    T plain[kTile], hidden[kTile];
    for (int64_t c = 0; c < tile.channels; ++c) {
      const int64_t map = tile.sample * op.layout.channels + tile.channel + c;
      const Value share = to_float(static_cast<const T*>(op.grad)[map]) / static_cast<Value>(op.layout.positions());
      plain[c] = from_float<T>(share);
      hidden[c] = from_float<T>(share * static_cast<Value>(op.alpha));
    }
    spread_tile(op, tile, plain, hidden);
  }
}

void diversify(const Diversify& op, int64_t begin, int64_t end, void* scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, diversify_tiles<T>(op, begin, end, scratch));
}
void spread_bits(const SpreadBits& op, int64_t begin, int64_t end) {
  if (op.grad) {
    FGVC_SWITCH_DTYPE(op.dtype, spread_gradients<T>(op, begin, end));
    return;
  }
  uint8_t zeros[kTile] = {}, ones[kTile];
  std::memset(ones, 1, sizeof(ones));
  for (int64_t number = begin; number < end; ++number) spread_tile(op, tile_at(op.layout, number), zeros, ones);
}

}  // namespace fgvc_ext::FGVC_ISA
