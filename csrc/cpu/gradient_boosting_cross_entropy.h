// Gradient-boosting cross-entropy, subtle differences eq. 9–14, one row of scores at a time.
#pragma once

#include <cmath>

#include "kernels.h"
#include "vector.h"

namespace fgvc_ext::FGVC_ISA {

// A row of scores as float (double for float64): in place where it already is, else converted into `scratch`.
template <class T, class Value>
FGVC_INLINE const Value* score_row(const GradientBoosting& op, int64_t row, Value* scratch) {
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

// t_k, eq. 10: the k-th highest negative. −inf, which keeps all, where there are no more than k, or where a NaN makes the
// loss NaN anyway.
template <class Value>
FGVC_INLINE Value kth_negative(const Value* scores, int64_t classes, int64_t label, int64_t k, Value* heap) {
  const Value lowest = -static_cast<Value>(__builtin_inf());
  Value total = 0;
  for (int64_t i = 0; i < classes; ++i) total += scores[i] - scores[i];  // 0, or NaN for NaN and infinities
  if (k >= classes - 1) return lowest;
  if (total != total)
    for (int64_t i = 0; i < classes; ++i)
      if (scores[i] != scores[i]) return lowest;
  for (int64_t i = 0; i < k; ++i) heap[i] = lowest;
  for_each_above(scores, classes, [&] { return heap[0]; },
                 [&](int64_t i) {
                   if (i != label) replace_smallest(heap, k, scores[i]);
                 });
  return heap[0];
}

// Σ exp(s − shift) over the label and what is not below the threshold.
FGVC_INLINE float sum_of_exponentials(const float* scores, int64_t classes, int64_t label, float threshold, float shift) {
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
FGVC_INLINE double sum_of_exponentials(const double* scores, int64_t classes, int64_t label, double threshold, double shift) {
  double total = 0;
  for (int64_t i = 0; i < classes; ++i)
    if (!(scores[i] < threshold) || i == label) total += std::exp(scores[i] - shift);
  return total;
}

template <class T>
FGVC_INLINE void boosting_rows(const GradientBoosting& op, int64_t begin, int64_t end, void* scratch) {
  using Value = Accumulation<T>;
  auto* row_scratch = static_cast<Value*>(scratch);
  auto* heap = row_scratch + row_pitch(op.classes);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = op.target[row];
    Value loss = 0, log_sum = 0, threshold = 0;
    if (label != op.ignore_index && label >= 0 && label < op.classes) {
      const Value* scores = score_row<T>(op, row, row_scratch);
      threshold = kth_negative(scores, op.classes, label, op.k, heap);
      Value highest = scores[label];
      for (int64_t i = 0; i < op.classes; ++i) highest = scores[i] > highest ? scores[i] : highest;
      log_sum = highest + std::log(sum_of_exponentials(scores, op.classes, label, threshold, highest));
      loss = log_sum - scores[label];
    }
    static_cast<Value*>(op.losses)[row] = loss;
    static_cast<Value*>(op.log_sum)[row] = log_sum;
    static_cast<Value*>(op.threshold)[row] = threshold;
  }
}

// Eq. 14: factor · softmax over the label and what is not below the threshold, zero elsewhere.
FGVC_INLINE void softmax_gradient(const float* scores, int64_t classes, float threshold, float log_sum, float factor, float* to) {
  for (int64_t i = 0; i < classes; i += kLanes) {
    const int64_t left = classes - i;
    const Floats x = left >= kLanes ? load(scores + i) : load_partial(scores + i, left, 0.f);
    const uint32_t kept = ~less_bits(x, broadcast(threshold)) & ~0u >> (32 - kLanes);
    const Floats grad = kept ? select(kept, exp(x - log_sum) * factor, Floats{}) : Floats{};
    if (left >= kLanes) {
      store(to + i, grad);
    } else {
      store_partial(to + i, grad, left);
    }
  }
}
FGVC_INLINE void softmax_gradient(const double* scores, int64_t classes, double threshold, double log_sum, double factor, double* to) {
  for (int64_t i = 0; i < classes; ++i) to[i] = scores[i] < threshold ? 0. : std::exp(scores[i] - log_sum) * factor;
}

template <class T>
FGVC_INLINE void boosting_rows_backward(const GradientBoostingBackward& op, int64_t begin, int64_t end, void* scratch) {
  using Value = Accumulation<T>;
  const GradientBoosting& forward = op.forward;
  auto* row_scratch = static_cast<Value*>(scratch);
  auto* grad_scratch = row_scratch + row_pitch(forward.classes);
  for (int64_t row = begin; row < end; ++row) {
    T* grad_row = static_cast<T*>(op.grad_scores) + row * op.row_stride;
    const bool in_place = sizeof(T) == sizeof(Value) && op.column_stride == 1;
    Value* grads = in_place ? reinterpret_cast<Value*>(grad_row) : grad_scratch;
    const int64_t label = forward.target[row];
    if (label == forward.ignore_index) {
      for (int64_t i = 0; i < forward.classes; ++i) grads[i] = 0;
    } else {
      const Value* scores = score_row<T>(forward, row, row_scratch);
      const Value log_sum = static_cast<const Value*>(forward.log_sum)[row];
      const Value factor = static_cast<const Value*>(op.grad)[op.grad_per_sample ? row : 0] * *static_cast<const Value*>(op.scale);
      softmax_gradient(scores, forward.classes, static_cast<const Value*>(forward.threshold)[row], log_sum, factor, grads);
      grads[label] = (std::exp(scores[label] - log_sum) - 1) * factor;
    }
    if (!in_place)
      for (int64_t i = 0; i < forward.classes; ++i) grad_row[i * op.column_stride] = from_float<T>(grads[i]);
  }
}

void gradient_boosting_cross_entropy(const GradientBoosting& op, int64_t begin, int64_t end, void* scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, boosting_rows<T>(op, begin, end, scratch));
}
void gradient_boosting_cross_entropy_backward(const GradientBoostingBackward& op, int64_t begin, int64_t end, void* scratch) {
  FGVC_SWITCH_DTYPE(op.forward.dtype, boosting_rows_backward<T>(op, begin, end, scratch));
}

}  // namespace fgvc_ext::FGVC_ISA
