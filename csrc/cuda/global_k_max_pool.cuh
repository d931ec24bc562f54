// Global k-max pooling, ELoPE eq. 2–4, forward: the k largest values of each map in order, their positions, and their
// weighted mean. One warp per map, or one block where maps are large (`pool_maps`); one lane per channel where channels
// lie side by side (`pool_channels`); a block that sorts where k is large (`pool_sorted`).
#pragma once

#include "../common/global_k_max_pool.h"
#include "index.cuh"
#include "selection.cuh"

namespace fgvc_ext::cuda {

constexpr int kPoolThreads = kWarpsPerBlock * kWarp;
constexpr int kWarpLimit = kWarp;   // k up to which each lane of a warp holds one rank
constexpr int kCapacityLimit = 16;  // k up to which one lane holds all ranks of its channel
constexpr int kKeysPerLane = 8;     // of a map, at a time
constexpr uint32_t kTile = kWarp * kKeysPerLane;
constexpr uint32_t kLargeMap = 4 * kTile;  // positions from which on a whole block works on each map

// What was found of a rank.
template <class Value>
struct Found {
  Value value;
  uint32_t position;

  template <class Key>
  __device__ __forceinline__ static Found of(const Ranked<Key>& ranked) {
    return {value_of_key(ranked.key), ranked.position};
  }
};

// `at` counts the ranks of all maps.
template <class Value, class Index>
__device__ __forceinline__ void store_rank(const GlobalKMaxPool& op, Index at, const Found<Value>& found) {
  if (op.narrow_indices) {
    Global<int16_t>(op.indices).store(at, static_cast<int16_t>(found.position));
  } else {
    Global<int32_t>(op.indices).store(at, static_cast<int32_t>(found.position));
  }
  if (op.values) Global<Value>(op.values).store(at, found.value);
}

// weight_r · value_r, a term of eq. 4.
template <class Value>
__device__ __forceinline__ Value weighted(const GlobalKMaxPool& op, uint32_t rank, Value value) {
  return op.weight ? Global<const Value>(op.weight).load(rank) * value : value;
}

// ---------------------------------------------------------------------------------------- a warp, or a block, per map

// What a lane reads of a tile of 256 positions: chunks of `Elements`, and what lies behind the map's end is not set.
template <class T, int Elements>
struct TileChunks {
  Chunk<T, Elements> chunk[kKeysPerLane / Elements];

  __device__ __forceinline__ T of_slot(int slot) const { return chunk[slot / Elements].element[slot % Elements]; }
};

// The position of a lane's slot, counted from the tile's begin.
template <int Elements>
__device__ __forceinline__ uint32_t position_in_tile(int slot) {
  return (slot / Elements * kWarp + lane_index()) * Elements + slot % Elements;
}

// All loads are on their way before the first value is used.
template <class T, int Elements, class Index>
__device__ __forceinline__ TileChunks<T, Elements> load_tile(const Global<const T>& map, const Maps<Index>& maps,
                                                             uint32_t begin) {
  TileChunks<T, Elements> chunks;
#pragma unroll
  for (int slot = 0; slot < kKeysPerLane; slot += Elements) {
    const uint32_t position = begin + position_in_tile<Elements>(slot);
    if (position < maps.positions) chunks.chunk[slot / Elements] = maps.template load<Elements>(map, position);
  }
  return chunks;
}

// The first of a map of 16-bit floats and fewer than 65,536 positions, read by one warp: key and position make one
// word, so that the larger of two words comes first. Lane r gets rank r.
template <class T, int Elements, class Index>
__device__ __forceinline__ Found<float> first_of_small_map(const Global<const T>& map, const Maps<Index>& maps,
                                                           unsigned k) {
  uint32_t best = 0;
#pragma unroll 1
  for (uint32_t begin = 0; begin < maps.positions; begin += kTile) {
    const auto chunks = load_tile<T, Elements>(map, maps, begin);
    uint32_t words[kKeysPerLane];
#pragma unroll
    for (int slot = 0; slot < kKeysPerLane; ++slot) {
      const uint32_t position = begin + position_in_tile<Elements>(slot);
      const bool inside = position - slot % Elements < maps.positions;
      words[slot] = inside ? upper_key(chunks.of_slot(slot)) | (0xFFFFu - position) : 0;
    }
    best = largest_words(words, best, k);
  }
  return {value_of_upper_key(best, T()), 0xFFFFu - (best & 0xFFFFu)};
}

// The first of what a warp reads: tiles `first`, `first + step`, … of a map. Lane r gets rank r.
template <class T, int Elements, class Index>
__device__ __forceinline__ Ranked<KeyOf<T>> first_of_map(const Global<const T>& map, const Maps<Index>& maps,
                                                         uint32_t first, uint32_t step, unsigned k,
                                                         WarpList<KeyOf<T>>& list) {
  using Key = KeyOf<T>;
  Ranked<Key> best{0, 0};
#pragma unroll 1
  for (uint32_t begin = first * kTile; begin < maps.positions; begin += step * kTile) {
    const uint32_t of_lane = begin + lane_index() * Elements;
    const auto chunks = load_tile<T, Elements>(map, maps, begin);
    Key keys[1 + kKeysPerLane], largest = 0;
    keys[0] = best.key;
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      const bool inside = of_lane + i / Elements * Elements * kWarp < maps.positions;
      keys[1 + i] = inside ? ordered_key(widen(chunks.of_slot(i))) : Key{0};
      largest = Larger()(largest, keys[1 + i]);
    }
    // Most tiles of a large map have nothing that comes before the k-th so far.
    if (!__any_sync(kAllLanes, largest > __shfl_sync(kAllLanes, best.key, k - 1))) continue;
    const auto position = [&](int slot) {
      return slot == 0 ? best.position : of_lane + (slot - 1) / Elements * Elements * kWarp + (slot - 1) % Elements;
    };
    best = first_of_warp(keys, position, maps.positions, k, list);
  }
  return best;
}

// Merges what the block's warps have found; the first warp calls.
template <class Key>
__device__ __forceinline__ Ranked<Key> merge_lists(const WarpList<Key> (&lists)[kWarpsPerBlock], uint32_t end,
                                                   unsigned k) {
  __shared__ WarpList<Key> merged;
  Key keys[kWarpsPerBlock];
  uint32_t positions[kWarpsPerBlock];
#pragma unroll
  for (int i = 0; i < kWarpsPerBlock; ++i) {
    keys[i] = lists[i].entry[lane_index()].key;
    positions[i] = lists[i].entry[lane_index()].position;
  }
  return first_of_warp(keys, [&](int slot) { return positions[slot]; }, end, k, merged);
}

// k ≤ 32; `Warps` work on each map, one or all of the block.
template <class T, int Elements, int Warps, class Index>
__global__ void __launch_bounds__(kPoolThreads) pool_maps(GlobalKMaxPool op, Maps<Index> maps) {
  using Value = Accumulation<T>;
  using Key = KeyOf<T>;
  __shared__ WarpList<Key> lists[kWarpsPerBlock];
  const unsigned warp = warp_index(), lane = lane_index(), k = static_cast<unsigned>(op.k);
  const Index map = Warps > 1 ? Index{blockIdx.x} : Index{blockIdx.x} * kWarpsPerBlock + warp;
  if (map >= maps.count) return;  // never a part of a block that meets at a barrier
  const auto memory = Global<const T>(op.features).from(maps.begin(map));

  Found<Value> found;
  if constexpr (sizeof(T) == 2 && Warps == 1) {
    found = first_of_small_map<T, Elements>(memory, maps, k);
  } else {
    Ranked<Key> best = first_of_map<T, Elements>(memory, maps, Warps > 1 ? warp : 0, Warps, k, lists[warp]);
    if constexpr (Warps > 1) {
      lists[warp].entry[lane] = lane < k ? best : Ranked<Key>{0, 0};
      __syncthreads();
      if (warp != 0) return;
      best = merge_lists(lists, maps.positions, k);
    }
    found = Found<Value>::of(best);
  }

  Value term = 0;
  if (lane < k) {
    store_rank(op, map * k + lane, found);
    term = weighted<Value>(op, lane, found.value);
  }
  const Value total = warp_reduce(term, Sum());
  if (lane == 0) Global<T>(op.output).store(map, narrow<T>(total / static_cast<Value>(k)));
}

// ------------------------------------------------------------------------------------------------- a lane per channel

// The first of one channel in order, in registers of one lane.
template <class Key, int Capacity>
struct LaneList {
  Ranked<Key> entry[Capacity];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Capacity; ++i) entry[i] = {0, 0};
  }
  // `before(candidate, entry)`: whether the candidate comes before an entry.
  template <class Before>
  __device__ __forceinline__ void insert(const Ranked<Key>& candidate, Before before) {
    if (!before(candidate, entry[Capacity - 1])) return;
#pragma unroll
    for (int i = Capacity - 1; i > 0; --i) {
      if (before(candidate, entry[i - 1])) {
        entry[i] = entry[i - 1];
      } else if (before(candidate, entry[i])) {
        entry[i] = candidate;
      }
    }
    if (before(candidate, entry[0])) entry[0] = candidate;
  }
};

// k ≤ Capacity. Warp w of the block reads positions w, w + 8, … of 32 channels; then the warps' lists are merged.
template <class T, int Capacity, class Index>
__global__ void __launch_bounds__(kPoolThreads) pool_channels(GlobalKMaxPool op, ChannelGroups<Index> groups) {
  using Value = Accumulation<T>;
  using Key = KeyOf<T>;
  constexpr int kAtOnce = 4;  // loads in flight
  const ChannelGroup<Index> group(groups, blockIdx.x);
  const Maps<Index>& maps = groups.maps;
  const unsigned warp = warp_index(), lane = lane_index(), k = static_cast<unsigned>(op.k);
  const auto memory = Global<const T>(op.features).from(group.begin + group.of_lane());

  LaneList<Key, Capacity> list;
  list.clear();
  // Reads `count` positions from `first` on. They come in order, so equals stay behind what was there.
  const auto take = [&](uint32_t first, auto count) {
    constexpr int kCount = decltype(count)::value;
    const auto there = memory.from(first * maps.column_stride);
    T x[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = there.load(i * kWarpsPerBlock * maps.column_stride);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      list.insert({ordered_key(widen(x[i])), first + i * kWarpsPerBlock},
                  [](const Ranked<Key>& a, const Ranked<Key>& b) { return a.key > b.key; });
  };
  uint32_t position = warp;
#pragma unroll 1
  for (; position + (kAtOnce - 1) * kWarpsPerBlock < maps.positions; position += kAtOnce * kWarpsPerBlock)
    take(position, std::integral_constant<int, kAtOnce>());
#pragma unroll 1
  for (; position < maps.positions; position += kWarpsPerBlock) take(position, std::integral_constant<int, 1>());

  __shared__ Ranked<Key> handed[kWarpsPerBlock / 2][Capacity][kWarp];
#pragma unroll 1
  for (unsigned half = kWarpsPerBlock / 2; half > 0; half /= 2) {
    if (warp >= half && warp < 2 * half)
#pragma unroll
      for (int i = 0; i < Capacity; ++i) handed[warp - half][i][lane] = list.entry[i];
    __syncthreads();
    if (warp < half)
#pragma unroll 1
      for (unsigned i = 0; i < k; ++i)
        list.insert(handed[warp][i][lane], [](const Ranked<Key>& a, const Ranked<Key>& b) { return a.before(b); });
    __syncthreads();
  }

  if (warp == 0) {
    Value total = 0;
#pragma unroll
    for (unsigned i = 0; i < Capacity; ++i) {
      handed[0][i][lane] = list.entry[i];
      if (i < k) total += weighted<Value>(op, i, value_of_key(list.entry[i].key));
    }
    if (group.lane_has_channel)
      Global<T>(op.output).store(group.first_map + lane, narrow<T>(total / static_cast<Value>(k)));
  }
  __syncthreads();
  // The channels' ranks lie side by side: written in the order of memory.
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < group.channels * k; i += kPoolThreads)
    store_rank(op, group.first_map * k + i, Found<Value>::of(handed[0][i % k][i / k]));
}

// ------------------------------------------------------------------------------------------------------------ large k

constexpr unsigned kWindow = 1024;  // ranks that are sorted together

// Sorts entries in shared memory: a bitonic network, the block's threads on different pairs.
template <class Key>
__device__ void sort_window(Ranked<Key> (&entry)[kWindow]) {
#pragma unroll 1
  for (unsigned run = 2; run <= kWindow; run *= 2) {
#pragma unroll 1
    for (unsigned distance = run / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (unsigned i = threadIdx.x; i < kWindow / 2; i += kPoolThreads) {
        const unsigned low = i / distance * 2 * distance + i % distance, high = low + distance;
        const Ranked<Key> first = entry[low], second = entry[high];
        const bool upwards = (low & run) == 0;
        if (second.before(first) == upwards) {
          entry[low] = second;
          entry[high] = first;
        }
      }
    }
  }
  __syncthreads();
}

// Any k: a block finds where each window of ranks begins and ends, collects what is in it, and sorts that.
template <class T, class Index>
__global__ void __launch_bounds__(kPoolThreads) pool_sorted(GlobalKMaxPool op, Maps<Index> maps) {
  using Value = Accumulation<T>;
  using Key = KeyOf<T>;
  __shared__ Ranked<Key> window[kWindow];
  __shared__ unsigned found;
  const Index map = blockIdx.x;
  const unsigned k = static_cast<unsigned>(op.k);
  const auto memory = Global<const T>(op.features).from(maps.begin(map));
  const auto load = [&](uint32_t position) {
    return Ranked<Key>{ordered_key(widen(memory.load(maps.offset(position)))), position};
  };
  const auto count = [&](auto wanted) {
    unsigned of_thread = 0;
    for (uint32_t i = threadIdx.x; i < maps.positions; i += kPoolThreads) of_thread += wanted(load(i));
    return block_reduce<kPoolThreads>(of_thread, Sum());
  };

  Ranked<Key> before{~Key{0}, 0};  // the window's entries are this one or come after it
  double total = 0;                // a large k is a long sum
  for (unsigned first = 0; first < k; first += kWindow) {
    const unsigned size = k - first < kWindow ? k - first : kWindow, end = first + size;
    const Key key = reached_by<Key>(1, ~Key{0}, end, end, [&](Key least) {
      return count([&](const Ranked<Key>& one) { return one.key >= least; });
    });
    const uint32_t position = ~reached_by<uint32_t>(~(maps.positions - 1), ~0u, end, end, [&](uint32_t at) {
      return count([&](const Ranked<Key>& one) { return !Ranked<Key>{key, ~at}.before(one); });
    });
    const Ranked<Key> last{key, position};

    __syncthreads();  // the window before has been written
    for (unsigned i = threadIdx.x; i < kWindow; i += kPoolThreads) window[i] = {0, ~0u};
    if (threadIdx.x == 0) found = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < maps.positions; i += kPoolThreads) {
      const Ranked<Key> one = load(i);
      // In any order: sorted, they have one.
      if (!one.before(before) && !last.before(one)) window[atomicAdd(&found, 1u)] = one;
    }
    sort_window(window);
    for (unsigned i = threadIdx.x; i < size; i += kPoolThreads) {
      store_rank(op, map * k + first + i, Found<Value>::of(window[i]));
      total += weighted<Value>(op, first + i, value_of_key(window[i].key));
    }
    before = {last.key, last.position + 1};
  }
  total = block_reduce<kPoolThreads>(total, Sum());
  if (threadIdx.x == 0) Global<T>(op.output).store(map, narrow<T>(static_cast<Value>(total / k)));
}

}  // namespace fgvc_ext::cuda
