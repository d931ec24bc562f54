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
#pragma unroll 1
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

// Sorts eight words in registers, the largest first: Batcher's network of 19 comparisons.
__device__ __forceinline__ void sort_words(uint32_t (&words)[8]) {
  constexpr int kPairs[19][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6}, {5, 7}, {1, 2}, {5, 6},
                                 {0, 4}, {1, 5}, {2, 6}, {3, 7}, {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
#pragma unroll
  for (int i = 0; i < 19; ++i) {
    uint32_t &first = words[kPairs[i][0]], &second = words[kPairs[i][1]];
    const uint32_t larger = Larger()(first, second);
    second = first < second ? first : second;
    first = larger;
  }
}

// The k ≤ 32 largest of the warp's words, which are all different, or 0 for nothing: eight of each lane, and those that
// lanes have found before. Lane r gets the r-th.
__device__ __forceinline__ uint32_t largest_words(uint32_t (&words)[8], uint32_t found, unsigned k) {
  sort_words(words);
  uint32_t next = 0;
#pragma unroll 1
  for (unsigned r = 0; r < k; ++r) {
    const uint32_t largest = warp_reduce(Larger()(words[0], found), Larger());
    if (lane_index() == r) next = largest;
    if (found == largest) found = 0;
    if (words[0] == largest) {
#pragma unroll
      for (int i = 0; i < 7; ++i) words[i] = words[i + 1];
      words[7] = 0;
    }
  }
  return next;
}

}  // namespace fgvc_ext::cuda
