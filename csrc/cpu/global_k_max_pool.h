// Global k-max pooling, ELoPE eq. 2–4: forward of maps in rows (k_largest.h finds them) and of interleaved channels,
// backward by scattering.
#pragma once

#include "../common/global_k_max_pool.h"
#include "k_largest.h"

namespace fgvc_ext::FGVC_ISA {

template <class Value>
FGVC_INLINE Value weighted_mean(const Value* values, const Value* weight, int64_t k) {
  double total = 0;  // a large k is a long sum
  for (int64_t rank = 0; rank < k; ++rank) total += weight ? weight[rank] * values[rank] : values[rank];
  return static_cast<Value>(total / static_cast<double>(k));
}

// Means and indices of maps whose values and indices [maps,k] were found; `first` is the number of the first map.
template <class T>
FGVC_INLINE void write_maps(const GlobalKMaxPool& op, int64_t first, int64_t maps, const Accumulation<T>* values,
                            const int32_t* indices) {
  const int64_t k = op.k;
  for (int64_t map = 0; map < maps; ++map)
    static_cast<T*>(op.output)[first + map] =
        from_float<T>(weighted_mean(values + map * k, static_cast<const Accumulation<T>*>(op.weight), k));
  if (op.narrow_indices) {
    auto* to = static_cast<int16_t*>(op.indices) + first * k;
    for (int64_t i = 0; i < maps * k; ++i) to[i] = static_cast<int16_t>(indices[i]);
  } else {
    std::memcpy(static_cast<int32_t*>(op.indices) + first * k, indices, maps * k * 4);
  }
}

// --- interleaved channels ---
//
// In channels_last the maps of kTile channels stand side by side: one map per lane as they are, nothing to transpose.
// Several neighbouring tiles are copied together, because the lines of one tile alone lie whole pages apart.

// For these k, and maps of which a tile still fits the second-level cache.
FGVC_INLINE bool takes_interleaved(const GlobalKMaxPool& op) {
  const Layout4& layout = op.layout;
  return layout.channels_are_contiguous() && !layout.map_is_contiguous() && op.k <= kTile &&
         op.dtype != Dtype::float64 && layout.positions() <= int64_t{1} << 14;
}

// Tiles that are copied together: as many as 512 kB hold.
FGVC_INLINE int64_t tiles_at_once(const Layout4& layout) {
  const int64_t fit = (int64_t{1} << 17) / (layout.positions() * kTile);
  return fit < 1 ? 1 : smaller(fit, smaller(8, ceil_divide(layout.channels, kTile)));
}

constexpr int64_t kPositionsAhead = 8;  // brought into the cache while this one is copied

// `channels` channels of a sample as [tile][position][kTile].
template <class T>
FGVC_INLINE void copy_tiles(const T* base, const Layout4& layout, int64_t channels, float* to) {
  const int64_t size = layout.positions() * kTile;
  for (int64_t y = 0; y < layout.height; ++y)
    for (int64_t x = 0; x < layout.width; ++x, to += kTile) {
      const T* from = base + y * layout.stride[2] + x * layout.stride[3];
      int64_t channel = 0;
      for (; channel + kLanes <= channels; channel += kLanes) {
        __builtin_prefetch(from + channel + kPositionsAhead * layout.stride[3]);
        store(to + channel / kTile * size + channel % kTile, load(from + channel));
      }
      if (channel < channels)
        store(to + channel / kTile * size + channel % kTile, load_partial(from + channel, channels - channel, 0.f));
    }
}

// A bound that at least k values of each lane's map reach, and few more: the k-th largest of its stripes' maxima.
template <int Capacity>
FGVC_INLINE Floats lane_bounds(const float* lanes, int64_t positions, int k) {
  Floats stripes[kStripes], top[Capacity];
  for (int i = 0; i < kStripes; ++i) stripes[i] = broadcast(-__builtin_inff());
  for (int i = 0; i < Capacity; ++i) top[i] = broadcast(-__builtin_inff());
  int64_t start = 0;
  for (; start + kStripes <= positions; start += kStripes)
    for (int i = 0; i < kStripes; ++i) stripes[i] = maximum(load(lanes + (start + i) * kTile), stripes[i]);
  for (int i = 0; start < positions; ++start, ++i) stripes[i] = maximum(load(lanes + start * kTile), stripes[i]);
  for (int i = 0; i < kStripes; ++i) keep_largest<Capacity>(stripes[i], top);
  return top[k - 1];
}

// The k ≤ Capacity largest of kLanes maps at `lanes`, kTile apart.
template <int Capacity>
static __attribute__((noinline)) void rank_lanes(const float* lanes, int64_t positions, int k, Ranks& ranks) {
  const Floats bound = lane_bounds<Capacity>(lanes, positions, k);
  int32_t found[kLanes][kStripes + 1], counts[kLanes] = {}, most = 0;
  for (int64_t start = 0; start < positions; start += 64) {
    uint16_t reaches[64] = {};
    uint64_t of_lane[kLanes];
    const int64_t size = smaller(64, positions - start);
    for (int64_t i = 0; i < size; ++i)
      reaches[i] = static_cast<uint16_t>(~less_bits(load(lanes + (start + i) * kTile), bound));  // NaN included
    transpose_bits(reaches, of_lane);
    for (int lane = 0; lane < kLanes; ++lane) {
      int32_t count = counts[lane];
      for (uint64_t bits = of_lane[lane]; bits && count <= kStripes; bits &= bits - 1)
        found[lane][count++] = static_cast<int32_t>(start) + __builtin_ctzll(bits);
      counts[lane] = count;
      most = count > most ? count : most;
    }
  }
  ranks.unranked = equal_bits(bound, broadcast(-__builtin_inff()));
  rank_candidates<Capacity>([&](int lane, int32_t index) { return lanes[index * kTile + lane]; }, found, counts, most,
                            ranks);
}

// The k largest of up to kLanes of a tile's maps; `row` has room for one map.
FGVC_INLINE void select_of_lanes(const float* lanes, int64_t maps, int64_t positions, int64_t k, float* row,
                                 float* values, int32_t* indices) {
  Ranks ranks;
  if (k == 1) {
    rank_lanes<1>(lanes, positions, 1, ranks);
  } else if (k <= 4) {
    rank_lanes<4>(lanes, positions, static_cast<int>(k), ranks);
  } else {
    rank_lanes<kStripes>(lanes, positions, static_cast<int>(k), ranks);
  }
  write_ranks(ranks, maps, k, values, indices);
  for (int64_t lane = 0; lane < maps; ++lane)
    if (ranks.unranked >> lane & 1) {
      for (int64_t i = 0; i < positions; ++i) row[i] = lanes[i * kTile + lane];
      select_largest(row, positions, k, values + lane * k, indices + lane * k);
    }
}

template <class T>
FGVC_INLINE void pool_interleaved_tiles(const GlobalKMaxPool& op, int64_t begin, int64_t end, Scratch& scratch) {
  const Layout4& layout = op.layout;
  const int64_t positions = layout.positions(), k = op.k, at_once = tiles_at_once(layout);
  auto* tiles = scratch.take<float>(at_once * positions * kTile);
  auto* row = scratch.take<float>(row_pitch(positions));
  auto* own_values = scratch.take<float>(kTile * k);
  auto* indices = scratch.take<int32_t>(kTile * k);
  for (int64_t number = begin, together; number < end; number += together) {
    const Tile tile = tile_at(layout, number);
    together = smaller(at_once, smaller(end - number, (layout.channels - tile.channel + kTile - 1) / kTile));
    const int64_t channels = smaller(together * kTile, layout.channels - tile.channel);
    copy_tiles(static_cast<const T*>(op.features) + layout.offset(tile.sample, tile.channel), layout, channels, tiles);
    for (int64_t done = 0; done < channels; done += kTile) {
      const int64_t first = tile.sample * layout.channels + tile.channel + done, maps = smaller(kTile, channels - done);
      float* values = op.values ? static_cast<float*>(op.values) + first * k : own_values;
      for (int64_t map = 0; map < maps; map += kLanes)
        select_of_lanes(tiles + done * positions + map, smaller(kLanes, maps - map), positions, k, row,
                        values + map * k, indices + map * k);
      write_maps<T>(op, first, maps, values, indices);
    }
  }
}

// --- maps in rows ---

template <class T>
FGVC_INLINE void pool_tiles(const GlobalKMaxPool& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  if constexpr (sizeof(Value) == 4) {
    if (takes_interleaved(op)) return pool_interleaved_tiles<T>(op, begin, end, scratch);
  }
  const int64_t positions = op.layout.positions(), k = op.k, at_once = channels_at_once(op.dtype, op.layout);
  auto* gathered = take_rows<Value>(scratch, op.dtype, op.layout);
  auto* own_values = scratch.take<Value>(kTile * k);
  auto* indices = scratch.take<int32_t>(kTile * k);

  for (int64_t number = begin; number < end; ++number) {
    const Tile whole = tile_at(op.layout, number);
    const int64_t first = whole.sample * op.layout.channels + whole.channel;
    Value* values = op.values ? static_cast<Value*>(op.values) + first * k : own_values;
    for (int64_t done = 0; done < whole.channels; done += at_once) {
      const Tile tile{whole.sample, whole.channel + done, smaller(at_once, whole.channels - done)};
      int64_t pitch;
      const Value* rows = tile_rows(static_cast<const T*>(op.features), op.layout, tile, gathered, pitch);
      const int64_t ahead = rows == gathered ? 0 : kLanes * pitch;  // what is gathered is in the cache already
      for (int64_t map = 0; map < tile.channels; map += kLanes)
        select_of_maps(rows + map * pitch, pitch, ahead, smaller(kLanes, tile.channels - map), positions, k,
                       values + (done + map) * k, indices + (done + map) * k);
    }
    write_maps<T>(op, first, whole.channels, values, indices);
  }
}

// Clears the tile's gradient and writes the k entries of each of its maps.
template <class T>
FGVC_INLINE void scatter_tiles(const GlobalKMaxPoolBackward& op, int64_t begin, int64_t end) {
  using Value = Accumulation<T>;
  const Layout4& layout = op.layout;
  const int64_t positions = layout.positions();
  const auto* weight = static_cast<const Value*>(op.weight);
  const bool contiguous = layout.map_is_contiguous();
  const auto offset_of = [&](int64_t index) {
    if (contiguous) return index;
    const int64_t y = index / layout.width, x = index - y * layout.width;
    return y * layout.stride[2] + x * layout.stride[3];
  };
  for (int64_t number = begin; number < end; ++number) {
    const Tile tile = tile_at(layout, number);
    T* base = static_cast<T*>(op.grad_features) + layout.offset(tile.sample, tile.channel);
    if (contiguous) {
      for (int64_t c = 0; c < tile.channels; ++c) std::memset(base + c * layout.stride[1], 0, positions * sizeof(T));
    } else {
      for (int64_t y = 0; y < layout.height; ++y)
        for (int64_t x = 0; x < layout.width; ++x) {
          T* at = base + y * layout.stride[2] + x * layout.stride[3];
          for (int64_t c = 0; c < tile.channels; ++c) at[c * layout.stride[1]] = T{};
        }
    }
    for (int64_t c = 0; c < tile.channels; ++c) {
      const int64_t map = tile.sample * layout.channels + tile.channel + c;
      const Value share = to_float(static_cast<const T*>(op.grad)[map]) / static_cast<Value>(op.k);
      for (int64_t rank = 0; rank < op.k; ++rank) {
        const int64_t index = op.narrow_indices ? static_cast<const int16_t*>(op.indices)[map * op.k + rank]
                                                : static_cast<const int32_t*>(op.indices)[map * op.k + rank];
        if (index < 0 || index >= positions) continue;  // not what forward saved
        base[c * layout.stride[1] + offset_of(index)] = from_float<T>(weight ? share * weight[rank] : share);
      }
    }
  }
}

template <class T>
FGVC_INLINE void sum_weight_grad(const GlobalKMaxPoolWeightGrad& op, int64_t begin, int64_t end) {
  using Value = Accumulation<T>;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    auto* sums = static_cast<double*>(op.sums) + chunk * op.k;
    for (int64_t rank = 0; rank < op.k; ++rank) sums[rank] = 0;
    const int64_t first = chunk * op.maps_per_chunk, last = smaller(op.maps, first + op.maps_per_chunk);
    for (int64_t map = first; map < last; ++map) {
      const Value share = to_float(static_cast<const T*>(op.grad)[map]) / static_cast<Value>(op.k);
      const Value* values = static_cast<const Value*>(op.values) + map * op.k;
      for (int64_t rank = 0; rank < op.k; ++rank) sums[rank] += share * values[rank];
    }
  }
}

void global_k_max_pool(const GlobalKMaxPool& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, pool_tiles<T>(op, begin, end, scratch));
}
void global_k_max_pool_backward(const GlobalKMaxPoolBackward& op, int64_t begin, int64_t end, Scratch&) {
  FGVC_SWITCH_DTYPE(op.dtype, scatter_tiles<T>(op, begin, end));
}
void global_k_max_pool_weight_grad(const GlobalKMaxPoolWeightGrad& op, int64_t begin, int64_t end, Scratch&) {
  FGVC_SWITCH_DTYPE(op.dtype, sum_weight_grad<T>(op, begin, end));
}

}  // namespace fgvc_ext::FGVC_ISA
