// Gradient-boosting cross-entropy, subtle differences eq. 9–14, one row of scores at a time.
#pragma once

#include <cmath>

#include "../common/gradient_boosting_cross_entropy.h"
#include "scratch.h"
#include "vector.h"

namespace fgvc_ext::FGVC_ISA {

// A row of scores as float (double for float64): in place where it already is, else converted into `scratch`.
template <class T, class Op, class Value>
FGVC_INLINE const Value* score_row(const Op& op, int64_t row, Value* scratch) {
  const T* scores = static_cast<const T*>(op.scores) + row * op.row_stride;
  if constexpr (sizeof(T) == sizeof(Value)) {
    if (op.column_stride == 1) return scores;
  }
  for (int64_t i = 0; i < op.classes; ++i) scratch[i] = to_float(scores[i * op.column_stride]);
  return scratch;
}

// Puts `value` at the root of a heap whose root is the smallest.
template <class Value>
FGVC_INLINE void replace_smallest(Value* heap, int64_t size, Value value) {
  int64_t at = 0;
  for (int64_t child; (child = 2 * at + 1) < size; at = child) {
    if (child + 1 < size && heap[child + 1] < heap[child]) ++child;
    if (!(heap[child] < value)) break;
    heap[at] = heap[child];
  }
  heap[at] = value;
}

// Calls take(i) for every i in [begin, size) whose value exceeds bound(), in order.
template <class Bound, class Take>
FGVC_INLINE void for_each_above(const float* values, int64_t size, Bound bound, Take take) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (uint32_t bits = greater_bits(load(values + i), broadcast(bound())); bits; bits &= bits - 1) {
      const int64_t at = i + __builtin_ctz(bits);
      if (values[at] > bound()) take(at);
    }
  for (; i < size; ++i)
    if (values[i] > bound()) take(i);
}
template <class Bound, class Take>
FGVC_INLINE void for_each_above(const double* values, int64_t size, Bound bound, Take take) {
  for (int64_t i = 0; i < size; ++i)
    if (values[i] > bound()) take(i);
}

// Rows of up to this many classes are searched bit by bit, longer ones with a heap.
constexpr int64_t kBitwiseClasses = 1024;

// Integers in the order of the values; −0 and +0 share one. Applied to a key's bits, the same formula gives the value.
FGVC_INLINE Ints ordered_keys(Floats x) {
  const Ints bits = reinterpret_cast<Ints>(x + 0.f);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

// The largest number that at least k of `keys` reach, of those that begin with the bits of `found`: bit by bit, from
// `highest` to `lowest`, a bit is set if k keys reach the number with it. No branch depends on a key. Reads whole
// vectors.
FGVC_INLINE uint32_t largest_reached(const int32_t* keys, int64_t size, int64_t k, uint32_t found, uint32_t highest,
                                     uint32_t lowest) {
  for (uint32_t bit = highest; bit >= lowest; bit >>= 1) {
    const Ints candidate = Ints{} + static_cast<int32_t>(found + bit);
    int64_t reach = 0;
    for (int64_t i = 0; i < size; i += kLanes) reach += __builtin_popcount(not_less_bits(load(keys + i), candidate));
    found += reach >= k ? bit : 0;
  }
  return found;
}

// The k-th highest score but the label's, bit by bit: sign and exponent among all, the fraction among those alone that
// share both. `keys` has room for the row in whole vectors, and one more.
static __attribute__((noinline)) float kth_negative_bitwise(const float* scores, int64_t classes, int64_t label,
                                                            int64_t k, int32_t* keys) {
  constexpr uint32_t kFraction = (1u << 23) - 1;
  const int32_t lowest = INT32_MIN;
  for (int64_t i = 0; i < classes; i += kLanes)
    store(keys + i, ordered_keys(load_within(scores, i, classes, -__builtin_nanf(""))));  // −NaN is below −inf
  keys[label] = lowest;
  uint32_t found = largest_reached(keys, classes, k, static_cast<uint32_t>(lowest), 1u << 31, kFraction + 1);

  int64_t above = 0, candidates = 0;
  const Ints first = Ints{} + static_cast<int32_t>(found), last = first + static_cast<int32_t>(kFraction);
  for (int64_t i = 0; i < classes; i += kLanes) {
    const Ints key = load(keys + i);
    const uint32_t reach = not_less_bits(key, first), shares = reach & not_less_bits(last, key);
    above += __builtin_popcount(reach) - __builtin_popcount(shares);
    compress_store(keys + candidates, shares, key);  // never beyond what has been read
    candidates += __builtin_popcount(shares);
  }
  store(keys + candidates, Ints{} + lowest);
  found = largest_reached(keys, candidates, k - above, found, (kFraction + 1) / 2, 1);
  const int32_t bits = static_cast<int32_t>(found);
  return bit_cast<float>(bits ^ ((bits >> 31) & 0x7FFFFFFF));
}

template <class Value>
static __attribute__((noinline)) Value kth_negative_with_heap(const Value* scores, int64_t classes, int64_t label,
                                                              int64_t k, Value* heap) {
  for (int64_t i = 0; i < k; ++i) heap[i] = -static_cast<Value>(__builtin_inff());
  for_each_above(
      scores, classes, [&] { return heap[0]; },
      [&](int64_t i) {
        if (i != label) replace_smallest(heap, k, scores[i]);
      });
  return heap[0];
}

// t_k, eq. 10: the k-th highest negative, for k < classes − 1 and no NaN.
template <class Value>
FGVC_INLINE Value kth_negative(const Value* scores, int64_t classes, int64_t label, int64_t k, Value* workspace) {
  if constexpr (sizeof(Value) == 4) {
    if (classes <= kBitwiseClasses)
      return kth_negative_bitwise(scores, classes, label, k, reinterpret_cast<int32_t*>(workspace));
  }
  return kth_negative_with_heap(scores, classes, label, k, workspace);
}

// The highest score, or NaN where there is one.
FGVC_INLINE float highest_score(const float* scores, int64_t classes) {
  Floats highest = broadcast(-__builtin_inff());
  uint32_t nan = 0;
  for (int64_t i = 0; i < classes; i += kLanes) {
    const Floats x = load_within(scores, i, classes, -__builtin_inff());
    nan |= unordered_bits(x);
    highest = maximum(x, highest);
  }
  float lane[kLanes];
  store(lane, highest);
  for (int i = 1; i < kLanes; ++i) lane[0] = lane[i] > lane[0] ? lane[i] : lane[0];
  return nan ? __builtin_nanf("") : lane[0];
}
FGVC_INLINE double highest_score(const double* scores, int64_t classes) {
  double highest = scores[0];
  for (int64_t i = 1; i < classes; ++i) highest = scores[i] > highest || scores[i] != scores[i] ? scores[i] : highest;
  for (int64_t i = 0; i < classes; ++i) highest = scores[i] != scores[i] ? scores[i] : highest;
  return highest;
}

// Σ exp(s − shift) over the label and what is not below the threshold.
static __attribute__((noinline)) float sum_of_exponentials(const float* scores, int64_t classes, int64_t label,
                                                           float threshold, float shift) {
  Floats total = {};
  for (int64_t i = 0; i < classes; i += kLanes) {
    const int64_t left = classes - i;
    const Floats x = left >= kLanes ? load(scores + i) : load_partial(scores + i, left, 0.f);
    uint32_t kept = ~less_bits(x, broadcast(threshold)) & (left >= kLanes ? ~0u >> (32 - kLanes) : (1u << left) - 1);
    if (label >= i && label < i + kLanes) kept |= 1u << (label - i);
    if (kept) total += select(kept, exp(x - shift), Floats{});
  }
  return sum(total);
}
FGVC_INLINE double sum_of_exponentials(const double* scores, int64_t classes, int64_t label, double threshold,
                                       double shift) {
  double total = 0;
  for (int64_t i = 0; i < classes; ++i)
    if (!(scores[i] < threshold) || i == label) total += std::exp(scores[i] - shift);
  return total;
}

template <class T>
FGVC_INLINE void boosting_rows(const GradientBoosting& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  auto* own_row = scratch.take<Value>(row_pitch(op.classes));
  // Keys of the row in whole vectors and one more, or a heap of k.
  auto* workspace = scratch.take<Value>(row_pitch(op.classes) + 16 + op.k);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = op.target[row];
    Value loss = 0, highest = 0, log_sum = 0, threshold = 0;
    if (label != op.ignore_index && label >= 0 && label < op.classes) {
      const Value* scores = score_row<T>(op, row, own_row);
      highest = highest_score(scores, op.classes);
      // Nothing is below −inf: all is kept, also where a NaN makes the loss NaN anyway.
      threshold = op.k < op.classes - 1 && highest == highest ? kth_negative(scores, op.classes, label, op.k, workspace)
                                                              : -static_cast<Value>(__builtin_inff());
      log_sum = std::log(sum_of_exponentials(scores, op.classes, label, threshold, highest));
      loss = log_sum - (scores[label] - highest);
    }
    static_cast<Value*>(op.rows.weight)[row] = loss;
    static_cast<Value*>(op.rows.highest)[row] = highest;
    static_cast<Value*>(op.rows.log_sum)[row] = log_sum;
    static_cast<Value*>(op.rows.threshold)[row] = threshold;
  }
}

// Eq. 14: factor · softmax over the label and what is not below the threshold, zero elsewhere.
static __attribute__((noinline)) void softmax_gradient(const float* scores, int64_t classes, float threshold,
                                                       float highest, float log_sum, float factor, float* to) {
  for (int64_t i = 0; i < classes; i += kLanes) {
    const int64_t left = classes - i;
    const Floats x = left >= kLanes ? load(scores + i) : load_partial(scores + i, left, 0.f);
    const uint32_t kept = ~less_bits(x, broadcast(threshold)) & ~0u >> (32 - kLanes);
    const Floats grad = kept ? select(kept, exp((x - highest) - log_sum) * factor, Floats{}) : Floats{};
    if (left >= kLanes) {
      store(to + i, grad);
    } else {
      store_partial(to + i, grad, left);
    }
  }
}
FGVC_INLINE void softmax_gradient(const double* scores, int64_t classes, double threshold, double highest,
                                  double log_sum, double factor, double* to) {
  for (int64_t i = 0; i < classes; ++i)
    to[i] = scores[i] < threshold ? 0. : std::exp((scores[i] - highest) - log_sum) * factor;
}

template <class T>
FGVC_INLINE void boosting_rows_backward(const GradientBoostingBackward& op, int64_t begin, int64_t end,
                                        Scratch& scratch) {
  using Value = Accumulation<T>;
  auto* own_row = scratch.take<Value>(row_pitch(op.classes));
  auto* own_grads = scratch.take<Value>(row_pitch(op.classes));
  for (int64_t row = begin; row < end; ++row) {
    T* grad_row = static_cast<T*>(op.grad_scores) + row * op.grad_row_stride;
    const bool in_place = sizeof(T) == sizeof(Value) && op.grad_column_stride == 1;
    Value* grads = in_place ? reinterpret_cast<Value*>(grad_row) : own_grads;
    const int64_t label = op.target[row];
    const Value weight = static_cast<const Value*>(op.rows.weight)[row];
    const bool lost = label < 0 || label >= op.classes;  // overwritten since forward looked at it
    if (weight == 0 || lost) {
      const Value value = weight == 0 ? Value(0) : static_cast<Value>(__builtin_nanf(""));
      for (int64_t i = 0; i < op.classes; ++i) grads[i] = value;
    } else {
      const Value* scores = score_row<T>(op, row, own_row);
      const Value highest = static_cast<const Value*>(op.rows.highest)[row];
      const Value log_sum = static_cast<const Value*>(op.rows.log_sum)[row];
      const Value factor = static_cast<const Value*>(op.grad)[op.grad_per_sample ? row : 0] * weight;
      softmax_gradient(scores, op.classes, static_cast<const Value*>(op.rows.threshold)[row], highest, log_sum, factor,
                       grads);
      grads[label] = (std::exp((scores[label] - highest) - log_sum) - 1) * factor;
    }
    if (!in_place)
      for (int64_t i = 0; i < op.classes; ++i) grad_row[i * op.grad_column_stride] = from_float<T>(grads[i]);
  }
}

void gradient_boosting_cross_entropy(const GradientBoosting& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, boosting_rows<T>(op, begin, end, scratch));
}
void gradient_boosting_cross_entropy_backward(const GradientBoostingBackward& op, int64_t begin, int64_t end,
                                              Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, boosting_rows_backward<T>(op, begin, end, scratch));
}

}  // namespace fgvc_ext::FGVC_ISA
