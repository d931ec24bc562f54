// The k first of many keys, in registers of one warp: larger keys before smaller ones, and among equal keys the lower
// position, as in a stable sort.
#pragma once

#include "elements.cuh"
#include "reduction.cuh"

namespace fgvc_ext::cuda {

template <class Key>
struct alignas(2 * sizeof(Key)) Ranked {
  Key key;  // 0: nothing
  uint32_t position;

  __device__ __forceinline__ bool before(const Ranked& other) const {
    if constexpr (sizeof(Key) == 4) {  // one comparison of 64 bits; of equal keys the other's position must be higher
      return (uint64_t{key} << 32 | other.position) > (uint64_t{other.key} << 32 | position);
    } else {
      return (key > other.key) | ((key == other.key) & (position < other.position));
    }
  }
};

// Candidates of one warp, in shared memory.
template <class Key>
struct WarpList {
  Ranked<Key> entry[kWarp];
};

// The k-th largest of 32 keys, one per lane; 0 where there are fewer than k.
template <class Key>
__device__ __forceinline__ Key kth_of_lanes(Key key, int k) {
  for (;;) {
    const Key largest = warp_reduce(key, Larger());
    const unsigned lanes = __ballot_sync(kAllLanes, key == largest);
    k -= __popc(lanes);
    if (k <= 0 || largest == 0) return largest;
    if (key == largest) key = 0;
  }
}

// A number that at least `least` things reach, and at most `most` unless they tie: bisection between `low`, which
// enough things reach, and `high`. `count(number)` says how many reach a number, the same in all threads.
template <class Number, class Count>
__device__ Number reached_by(Number low, Number high, unsigned least, unsigned most, Count count) {
  while (low < high) {
    const Number middle = low + (high - low) / 2 + 1;
    const unsigned reached = count(middle);
    if (reached < least) {
      high = middle - 1;
    } else {
      low = middle;
      if (reached <= most) break;
    }
  }
  return low;
}

// Puts those that `wanted` accepts into the list, as far as there is room, and nothing behind them; how many there are.
template <int Slots, class Key, class Position, class Wanted>
__device__ __forceinline__ unsigned collect(const Key (&keys)[Slots], Position position, WarpList<Key>& list,
                                            Wanted wanted) {
  const unsigned lower_lanes = (1u << lane_index()) - 1;
  unsigned found = 0;
  __syncwarp();  // what the list held has been read
#pragma unroll
  for (int slot = 0; slot < Slots; ++slot) {
    const bool takes = wanted(keys[slot], slot);
    const unsigned votes = __ballot_sync(kAllLanes, takes);
    if (votes == 0) continue;
    const unsigned at = found + __popc(votes & lower_lanes);
    if (takes && at < kWarp) list.entry[at] = {keys[slot], position(slot)};
    found += __popc(votes);
  }
  if (lane_index() >= found) list.entry[lane_index()] = {0, 0};
  __syncwarp();
  return found;
}

// Brings the first `found` entries of the list into order; lane r gets the r-th, or nothing.
template <class Key>
__device__ __forceinline__ Ranked<Key> rank(WarpList<Key>& list, unsigned found) {
  const unsigned lane = lane_index();
  const Ranked<Key> mine = list.entry[lane];
  unsigned rank = 0;
  for (unsigned first = 0; first < found; first += 4) {
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) rank += list.entry[first + i].before(mine);
  }
  __syncwarp();
  if (lane < found) list.entry[rank] = mine;
  __syncwarp();
  return list.entry[lane];
}

// Where too many keys reach the bound: a higher one, and where they tie, the last position that is taken.
template <int Slots, class Key, class Position>
__device__ __forceinline__ unsigned collect_fewer(const Key (&keys)[Slots], Position position, uint32_t end, unsigned k,
                                                  Key bound, WarpList<Key>& list) {
  const auto count = [&](auto wanted) {
    unsigned of_lane = 0;
#pragma unroll
    for (int slot = 0; slot < Slots; ++slot) of_lane += wanted(keys[slot], slot);
    return warp_reduce(of_lane, Sum());
  };
  bound = reached_by<Key>(bound, ~Key{0}, k, kWarp,
                          [&](Key key) { return count([&](Key other, int) { return other >= key; }); });
  const auto within = [&](uint32_t last) {
    return [&, last](Key key, int slot) { return key > bound || (key == bound && position(slot) <= last); };
  };
  // Positions count downwards here, because more are within a later one.
  const uint32_t last =
      ~reached_by<uint32_t>(~(end - 1), ~0u, k, kWarp, [&](uint32_t at) { return count(within(~at)); });
  return collect(keys, position, list, within(last));
}

// The k ≤ 32 first of the warp's keys; lane r gets the r-th. `position(slot)` is that of the lane's keys[slot], below
// `end`.
template <int Slots, class Key, class Position>
__device__ __forceinline__ Ranked<Key> first_of_warp(const Key (&keys)[Slots], Position position, uint32_t end,
                                                     unsigned k, WarpList<Key>& list) {
  Key largest = keys[0];
#pragma unroll
  for (int slot = 1; slot < Slots; ++slot) largest = Larger()(largest, keys[slot]);
  // k lanes have a key that reaches this bound, so none of the k first lies below it, and hardly others do not.
  const Key bound = Larger()(kth_of_lanes(largest, static_cast<int>(k)), Key{1});
  unsigned found = collect(keys, position, list, [&](Key key, int) { return key >= bound; });
  if (found > kWarp) found = collect_fewer(keys, position, end, k, bound, list);
  return rank(list, found);
}

}  // namespace fgvc_ext::cuda
