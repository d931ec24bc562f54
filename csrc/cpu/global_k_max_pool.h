// Global k-max pooling, ELoPE eq. 2–4: the k largest values of every map, in order, and where they stand.
//
// A map is read once from memory and a second time from the first-level cache. The first pass keeps the largest value of
// each of 16 stripes; the k-th largest of these is a bound that at least k values reach, and few more. The second pass
// collects those candidates, and k rounds of "largest, lowest index" rank them.
#pragma once

#include "maps.h"

namespace fgvc_ext::FGVC_ISA {

constexpr int kStripes = 16;

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

// Few distinct values (a map that a ReLU left nearly empty): a sorted list of the best so far, entered by strictly larger
// values only, so that equals keep their order. No NaN.
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

struct Stripes {
  Floats part[kStripes / kLanes];
};

FGVC_INLINE float largest(const Stripes& x) {
  Floats m = x.part[0];
  for (int i = 1; i < kStripes / kLanes; ++i) m = maximum(m, x.part[i]);
  return largest(m);
}

// Takes out the first lane that equals `value` and returns its number.
FGVC_INLINE int take_out(Stripes& x, float value) {
  uint32_t bits = 0;
  for (int i = 0; i < kStripes / kLanes; ++i) bits |= equal_bits(x.part[i], broadcast(value)) << i * kLanes;
  const uint32_t first = bits & -bits;
  for (int i = 0; i < kStripes / kLanes; ++i)
    x.part[i] = select(first >> i * kLanes, broadcast(-__builtin_inff()), x.part[i]);
  return __builtin_ctz(bits);
}

// Up to 16 values. False where the map needs another way: NaN, −inf among the k largest, or too many candidates.
FGVC_INLINE bool select_by_bound(const float* map, int64_t positions, int k, float* values, int32_t* indices,
                                 float* candidates, int32_t* candidate_indices) {
  constexpr int kParts = kStripes / kLanes;
  const float lowest = -__builtin_inff();
  const int64_t whole = positions / kLanes * kLanes, left = positions - whole;
  const Floats tail = left ? load_partial(map + whole, left, lowest) : broadcast(lowest);

  Stripes stripes;
  for (int i = 0; i < kParts; ++i) stripes.part[i] = broadcast(lowest);
  Ints nan = tail != tail;
  int64_t start = 0;
  for (; start + kStripes <= whole; start += kStripes)
    for (int i = 0; i < kParts; ++i) {
      const Floats x = load(map + start + i * kLanes);
      nan |= x != x;
      stripes.part[i] = maximum(x, stripes.part[i]);
    }
  for (int i = 0; start < whole; start += kLanes, ++i) {
    const Floats x = load(map + start);
    nan |= x != x;
    stripes.part[i] = maximum(x, stripes.part[i]);
  }
  stripes.part[kParts - 1] = maximum(tail, stripes.part[kParts - 1]);
  if (lane_bits(nan)) return false;

  float bound = largest(stripes);
  for (int rank = 1; rank < k; ++rank) {
    take_out(stripes, bound);
    bound = largest(stripes);
  }
  if (bound == lowest) return false;

  int64_t count = 0;
  const auto collect = [&](Floats x, int64_t at, uint32_t bits) {
    compress_store(candidates + count, bits, x);
    compress_store(candidate_indices + count, bits, lane_numbers() + static_cast<int32_t>(at));
    count += __builtin_popcount(bits);
  };
  for (start = 0; start < whole; start += kLanes) {
    const Floats x = load(map + start);
    collect(x, start, not_less_bits(x, broadcast(bound)));
  }
  if (left) collect(tail, whole, not_less_bits(tail, broadcast(bound)));
  if (count > kStripes) return false;

  for (int i = 0; i < kParts; ++i) {
    const int64_t here = count - i * kLanes;
    const uint32_t valid = here >= kLanes ? ~0u : here > 0 ? (1u << here) - 1 : 0;
    stripes.part[i] = select(valid, load(candidates + i * kLanes), broadcast(lowest));
  }
  for (int rank = 0; rank < k; ++rank) {
    values[rank] = largest(stripes);
    indices[rank] = candidate_indices[take_out(stripes, values[rank])];
  }
  return true;
}

template <class Value>
FGVC_INLINE bool has_nan(const Value* map, int64_t positions) {
  bool nan = false;
  for (int64_t i = 0; i < positions; ++i) nan |= map[i] != map[i];
  return nan;
}

// One copy for all storage types.
template <class Value>
static __attribute__((noinline)) void select_largest(const Value* map, int64_t positions, int64_t k, Value* values, int32_t* indices,
                                Value* candidates, int32_t* candidate_indices) {
  if constexpr (sizeof(Value) == 4) {
    if (k <= kStripes) {
      const int small_k = static_cast<int>(k);
      if (select_by_bound(map, positions, small_k, values, indices, candidates, candidate_indices)) return;
      if (!has_nan(map, positions)) return select_by_insertion(map, positions, small_k, values, indices);
    }
  }
  select_with_heap(map, positions, k, values, indices);
}

template <class T>
FGVC_INLINE void pool_tiles(const GlobalKMaxPool& op, int64_t begin, int64_t end, void* scratch) {
  using Value = Accumulation<T>;
  const int64_t positions = op.layout.positions(), k = op.k, pitch_of_scratch = row_pitch(positions);
  auto* rows_scratch = static_cast<Value*>(scratch);
  auto* candidates = rows_scratch + kTile * pitch_of_scratch;
  auto* own_values = candidates + pitch_of_scratch + 32;
  auto* indices = reinterpret_cast<int32_t*>(own_values + k);
  auto* candidate_indices = indices + k;
  const auto* weight = static_cast<const Value*>(op.weight);

  for (int64_t number = begin; number < end; ++number) {
    const Tile tile = tile_at(op.layout, number);
    int64_t pitch;
    const Value* rows = tile_rows(static_cast<const T*>(op.features), op.layout, tile, rows_scratch, pitch);
    for (int64_t channel = 0; channel < tile.channels; ++channel) {
      const int64_t map = tile.sample * op.layout.channels + tile.channel + channel;
      Value* values = op.values ? static_cast<Value*>(op.values) + map * k : own_values;
      select_largest(rows + channel * pitch, positions, k, values, indices, candidates, candidate_indices);
      Value total = 0;
      for (int64_t rank = 0; rank < k; ++rank) {
        total += weight ? weight[rank] * values[rank] : values[rank];
        if (op.narrow_indices) {
          static_cast<int16_t*>(op.indices)[map * k + rank] = static_cast<int16_t>(indices[rank]);
        } else {
          static_cast<int32_t*>(op.indices)[map * k + rank] = indices[rank];
        }
      }
      static_cast<T*>(op.output)[map] = from_float<T>(total / static_cast<Value>(k));
    }
  }
}

// Clears the tile's gradient and writes the k entries of each of its maps.
template <class T>
FGVC_INLINE void scatter_tiles(const GlobalKMaxPoolBackward& op, int64_t begin, int64_t end) {
  using Value = Accumulation<T>;
  const Layout4& layout = op.layout;
  const auto* weight = static_cast<const Value*>(op.weight);
  for (int64_t number = begin; number < end; ++number) {
    const Tile tile = tile_at(layout, number);
    T* base = static_cast<T*>(op.grad_features) + layout.offset(tile.sample, tile.channel);
    if (layout.map_is_contiguous()) {
      for (int64_t c = 0; c < tile.channels; ++c) std::memset(base + c * layout.stride[1], 0, layout.positions() * sizeof(T));
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
        const int64_t y = index / layout.width, x = index - y * layout.width;
        base[c * layout.stride[1] + y * layout.stride[2] + x * layout.stride[3]] =
            from_float<T>(weight ? share * weight[rank] : share);
      }
    }
  }
}

template <class T>
FGVC_INLINE void sum_weight_grad(const GlobalKMaxPoolWeightGrad& op, int64_t begin, int64_t end) {
  using Value = Accumulation<T>;
  auto* sums = static_cast<Value*>(op.sums);
  for (int64_t rank = 0; rank < op.k; ++rank) sums[rank] = 0;
  for (int64_t map = begin; map < end; ++map) {
    const Value share = to_float(static_cast<const T*>(op.grad)[map]) / static_cast<Value>(op.k);
    const Value* values = static_cast<const Value*>(op.values) + map * op.k;
    for (int64_t rank = 0; rank < op.k; ++rank) sums[rank] += share * values[rank];
  }
}

void global_k_max_pool(const GlobalKMaxPool& op, int64_t begin, int64_t end, void* scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, pool_tiles<T>(op, begin, end, scratch));
}
void global_k_max_pool_backward(const GlobalKMaxPoolBackward& op, int64_t begin, int64_t end) {
  FGVC_SWITCH_DTYPE(op.dtype, scatter_tiles<T>(op, begin, end));
}
void global_k_max_pool_weight_grad(const GlobalKMaxPoolWeightGrad& op, int64_t begin, int64_t end) {
  FGVC_SWITCH_DTYPE(op.dtype, sum_weight_grad<T>(op, begin, end));
}

}  // namespace fgvc_ext::FGVC_ISA
