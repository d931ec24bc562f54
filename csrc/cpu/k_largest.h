// The k largest values of a map, in order, and where they stand: the core of global k-max pooling.
//
// A map is read once from memory and a second time from the first-level cache. The first pass keeps the largest value
// of each of 16 stripes; the k-th largest of these is a bound that at least k values reach, and few more. The second
// pass collects those candidates. Bounds and ranks are found for one map a lane, so that no step waits for a sum over
// lanes.
#pragma once

#include "maps.h"

namespace fgvc_ext::FGVC_ISA {

constexpr int kStripes = 16;
constexpr int kParts = kStripes / kLanes;  // vectors for one value of every stripe

// Larger value first; NaN is the largest; among equals the lower index.
template <class Value>
FGVC_INLINE bool ranks_before(Value a, int32_t index_a, Value b, int32_t index_b) {
  if (a > b) return true;
  if (a < b) return false;
  const bool nan_a = a != a, nan_b = b != b;
  return nan_a != nan_b ? nan_a : index_a < index_b;
}

// Any k, any values: a heap of the k best with the worst at its root, taken apart at the end.
template <class Value>
FGVC_INLINE void sift_down(Value* values, int32_t* indices, int64_t root, int64_t size) {
  const Value value = values[root];
  const int32_t index = indices[root];
  for (int64_t child; (child = 2 * root + 1) < size; root = child) {
    if (child + 1 < size && ranks_before(values[child], indices[child], values[child + 1], indices[child + 1])) ++child;
    if (!ranks_before(value, index, values[child], indices[child])) break;
    values[root] = values[child];
    indices[root] = indices[child];
  }
  values[root] = value;
  indices[root] = index;
}

template <class Value>
FGVC_INLINE void select_with_heap(const Value* map, int64_t positions, int64_t k, Value* values, int32_t* indices) {
  for (int64_t i = 0; i < k; ++i) values[i] = map[i], indices[i] = static_cast<int32_t>(i);
  for (int64_t root = k / 2 - 1; root >= 0; --root) sift_down(values, indices, root, k);
  for (int64_t i = k; i < positions; ++i) {
    if (!ranks_before(map[i], static_cast<int32_t>(i), values[0], indices[0])) continue;
    values[0] = map[i];
    indices[0] = static_cast<int32_t>(i);
    sift_down(values, indices, 0, k);
  }
  for (int64_t size = k - 1; size > 0; --size) {
    const Value value = values[0];
    const int32_t index = indices[0];
    values[0] = values[size];
    indices[0] = indices[size];
    values[size] = value;
    indices[size] = index;
    sift_down(values, indices, 0, size);
  }
}

// Few distinct values (a map that a ReLU left nearly empty): a sorted list of the best so far, entered by strictly
// larger values only, so that equals keep their order. No NaN.
FGVC_INLINE void select_by_insertion(const float* map, int64_t positions, int k, float* values, int32_t* indices) {
  const auto insert = [&](float value, int32_t index, int size) {
    int at = size;
    for (; at > 0 && value > values[at - 1]; --at) values[at] = values[at - 1], indices[at] = indices[at - 1];
    values[at] = value;
    indices[at] = index;
  };
  for (int i = 0; i < k; ++i) insert(map[i], i, i);
  for (int64_t start = 0; start < positions; start += kLanes) {
    const int64_t left = positions - start;
    const Floats x = left >= kLanes ? load(map + start) : load_partial(map + start, left, -__builtin_inff());
    for (uint32_t bits = greater_bits(x, broadcast(values[k - 1])); bits; bits &= bits - 1) {
      const int32_t index = static_cast<int32_t>(start) + __builtin_ctz(bits);
      if (index >= k && map[index] > values[k - 1]) insert(map[index], index, k - 1);
    }
  }
}

// The largest value of each stripe: positions i, i + 16, … NaN is passed over; it becomes a candidate below.
FGVC_INLINE void stripe_maxima(const float* map, int64_t positions, Floats maxima[kParts]) {
  Floats odd[kParts];  // two chains, so that neither waits for itself
  for (int part = 0; part < kParts; ++part) maxima[part] = odd[part] = broadcast(-__builtin_inff());
  int64_t start = 0;
  for (; start + 2 * kStripes <= positions; start += 2 * kStripes)
    for (int part = 0; part < kParts; ++part) {
      maxima[part] = maximum(load(map + start + part * kLanes), maxima[part]);
      odd[part] = maximum(load(map + start + kStripes + part * kLanes), odd[part]);
    }
  for (; start < positions; start += kStripes)
    for (int part = 0; part < kParts; ++part)
      maxima[part] =
          maximum(load_within(map + start, part * kLanes, positions - start, -__builtin_inff()), maxima[part]);
  for (int part = 0; part < kParts; ++part) maxima[part] = maximum(odd[part], maxima[part]);
}

// Positions looked through before the candidates are counted.
constexpr int64_t kBlock = 512;

// Indices of what is not below `bound`, NaN included, in order, to `found`; stops when there are more than 16.
// `next` is the map to bring into the cache meanwhile.
FGVC_INLINE int64_t collect_candidates(const float* map, int64_t positions, float bound, const float* next,
                                       int32_t found[kBlock + 3 * kStripes]) {
  const Floats bounds = broadcast(bound);
  int64_t count = 0;
  for (int64_t start = 0; start < positions && count <= kStripes; start += kBlock) {
    const int64_t end = start + kBlock < positions ? start + kBlock : positions;
    int32_t* to = found + count;
    Ints index = lane_numbers() + static_cast<int32_t>(start);
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes, index += kLanes) {
      const uint32_t bits = ~less_bits(load(map + i), bounds) & kAllLanes;
      compress_store(to, bits, index);
      to += __builtin_popcount(bits);
      __builtin_prefetch(next + i);
    }
    if (i < end) {
      const uint32_t bits = ~less_bits(load_partial(map + i, end - i, bound), bounds) & ((1u << (end - i)) - 1);
      compress_store(to, bits, index);
      to += __builtin_popcount(bits);
    }
    count = to - found;
  }
  return count;
}

struct Ranks {
  Floats values[kStripes];
  Ints indices[kStripes];
  uint32_t unranked;  // lanes whose map needs another way: NaN, −inf among the k largest, or too many candidates
};

// Ranks up to kStripes candidates of each of kLanes maps, which come by index. value_at(lane, index) reads a map.
template <int Capacity, class ValueAt, int Most>
FGVC_INLINE void rank_candidates(ValueAt value_at, const int32_t (&found)[kLanes][Most], const int32_t counts[kLanes],
                                 int32_t most, Ranks& ranks) {
  const Floats lowest = broadcast(-__builtin_inff());
  const Ints count = load(counts);
  ranks.unranked |= lane_bits(count > kStripes);
  for (int rank = 0; rank < Capacity; ++rank) ranks.values[rank] = lowest, ranks.indices[rank] = Ints{};
  for (int column = 0; column < kStripes && column < most; ++column) {
    int32_t at[kLanes];
    float value[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      at[lane] = column < counts[lane] ? found[lane][column] : 0;
      value[lane] = value_at(lane, at[lane]);
    }
    Ints index = load(at);
    Floats x = load(value);
    ranks.unranked |= lane_bits(x != x);
    x = count > column ? x : lowest;
    Ints above = {};  // equals keep their order: what is displaced moves down one rank
    for (int rank = 0; rank < Capacity; ++rank) {
      above |= x > ranks.values[rank];
      const Floats displaced = ranks.values[rank];
      const Ints displaced_index = ranks.indices[rank];
      ranks.values[rank] = above ? x : displaced;
      ranks.indices[rank] = above ? index : displaced_index;
      x = above ? displaced : x;
      index = above ? displaced_index : index;
    }
  }
}

// Enters a value a lane into the lanes' lists of the Capacity largest so far.
template <int Capacity>
FGVC_INLINE void keep_largest(Floats x, Floats top[Capacity]) {
  for (int rank = 0; rank < Capacity; ++rank) {
    const Floats larger = maximum(x, top[rank]);
    x = minimum(x, top[rank]);
    top[rank] = larger;
  }
}

// The k ≤ Capacity largest of kLanes maps, one map a lane. The next ones stand `ahead` values further on.
template <int Capacity>
FGVC_INLINE void rank_maps(const float* const map[kLanes], int64_t positions, int k, int64_t ahead, Ranks& ranks) {
  const Floats lowest = broadcast(-__builtin_inff());

  Floats stripes[kParts][kLanes], top[Capacity];
  for (int lane = 0; lane < kLanes; ++lane) {
    Floats maxima[kParts];
    stripe_maxima(map[lane], positions, maxima);
    for (int part = 0; part < kParts; ++part) stripes[part][lane] = maxima[part];
  }
  for (int rank = 0; rank < Capacity; ++rank) top[rank] = lowest;
  for (int part = 0; part < kParts; ++part) {
    transpose(stripes[part]);
    for (int i = 0; i < kLanes; ++i) keep_largest<Capacity>(stripes[part][i], top);
  }

  float bound[kLanes];
  int32_t all_found[kBlock + 3 * kStripes], found[kLanes][kStripes], counts[kLanes], most = 0;
  store(bound, top[k - 1]);
  for (int lane = 0; lane < kLanes; ++lane) {
    counts[lane] =
        static_cast<int32_t>(collect_candidates(map[lane], positions, bound[lane], map[lane] + ahead, all_found));
    most = counts[lane] > most ? counts[lane] : most;
    std::memcpy(found[lane], all_found, sizeof(found[lane]));
  }
  ranks.unranked = equal_bits(top[k - 1], lowest);
  rank_candidates<Capacity>([&](int lane, int32_t index) { return map[lane][index]; }, found, counts, most, ranks);
}

template <class Value>
FGVC_INLINE bool has_nan(const Value* map, int64_t positions) {
  bool nan = false;
  for (int64_t i = 0; i < positions; ++i) nan |= map[i] != map[i];
  return nan;
}

// One map, any way that serves. One copy for all storage types.
template <class Value>
static __attribute__((noinline)) void select_largest(const Value* map, int64_t positions, int64_t k, Value* values,
                                                     int32_t* indices) {
  if constexpr (sizeof(Value) == 4) {
    if (k <= kStripes && !has_nan(map, positions))
      return select_by_insertion(map, positions, static_cast<int>(k), values, indices);
  }
  select_with_heap(map, positions, k, values, indices);
}

FGVC_INLINE void write_ranks(const Ranks& ranks, int64_t maps, int64_t k, float* values, int32_t* indices) {
  for (int64_t rank = 0; rank < k; ++rank)
    for (int64_t lane = 0; lane < maps; ++lane) {
      values[lane * k + rank] = ranks.values[rank][lane];
      indices[lane * k + rank] = ranks.indices[rank][lane];
    }
}

// The k largest of up to kLanes maps, `pitch` apart: values and indices [maps,k].
static __attribute__((noinline)) void select_of_maps(const float* rows, int64_t pitch, int64_t ahead, int64_t maps,
                                                     int64_t positions, int64_t k, float* values, int32_t* indices) {
  uint32_t unranked = kAllLanes;
  if (k <= kStripes) {
    const float* map[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) map[lane] = rows + (lane < maps ? lane : maps - 1) * pitch;
    Ranks ranks;
    if (k == 1) {
      rank_maps<1>(map, positions, 1, ahead, ranks);
    } else if (k <= 4) {
      rank_maps<4>(map, positions, static_cast<int>(k), ahead, ranks);
    } else {
      rank_maps<kStripes>(map, positions, static_cast<int>(k), ahead, ranks);
    }
    write_ranks(ranks, maps, k, values, indices);
    unranked = ranks.unranked;
  }
  for (int64_t lane = 0; lane < maps; ++lane)
    if (unranked >> lane & 1) select_largest(rows + lane * pitch, positions, k, values + lane * k, indices + lane * k);
}
FGVC_INLINE void select_of_maps(const double* rows, int64_t pitch, int64_t, int64_t maps, int64_t positions, int64_t k,
                                double* values, int32_t* indices) {
  for (int64_t map = 0; map < maps; ++map)
    select_largest(rows + map * pitch, positions, k, values + map * k, indices + map * k);
}

}  // namespace fgvc_ext::FGVC_ISA
