// Gradient-boosting cross-entropy, subtle differences eq. 9–14: a block a row of scores. The k-th highest negative is
// found bit by bit, from the top: the largest key that at least k negatives reach.
#pragma once

#include "../common/arguments.h"
#include "elements.cuh"
#include "reduction.cuh"

namespace fgvc_ext::cuda {

// Keys in the order of the values; −0 and +0 share one.
__device__ inline uint32_t ordered_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline uint64_t ordered_key(double x) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x + 0.)), sign = uint64_t{1} << 63;
  return bits & sign ? ~bits : bits | sign;
}
__device__ inline float value_of_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}
__device__ inline double value_of_key(uint64_t key) {
  const uint64_t sign = uint64_t{1} << 63;
  return __longlong_as_double(static_cast<long long>(key & sign ? key & ~sign : ~key));
}

template <class T>
struct Row {
  const T* data;
  int64_t stride;
  __device__ Accumulation<T> operator[](int64_t i) const { return widen(data[i * stride]); }
};

template <int Threads, class T>
__device__ Accumulation<T> kth_negative(const Row<T>& scores, int64_t classes, int64_t label, int64_t k) {
  using Key = decltype(ordered_key(Accumulation<T>{}));
  Key found = 0;
  for (int bit = sizeof(Key) * 8 - 1; bit >= 0; --bit) {
    const Key candidate = found | Key{1} << bit;
    int64_t reach = 0;
    for (int64_t i = threadIdx.x; i < classes; i += Threads) reach += i != label && ordered_key(scores[i]) >= candidate;
    if (block_reduce<Threads>(reach, Sum()) >= k) found = candidate;
  }
  return value_of_key(found);
}

template <class T, int Threads>
__global__ void __launch_bounds__(Threads) boosted_loss(GradientBoosting op) {
  using Value = Accumulation<T>;
  const int64_t row = blockIdx.x, label = op.target[row];
  const Row<T> scores{static_cast<const T*>(op.scores) + row * op.row_stride, op.column_stride};
  Value loss = 0, highest = 0, log_sum = 0, threshold = static_cast<Value>(-INFINITY);
  if (label < 0 || label >= op.classes) {
    // A wrong label: NaN here, and a NaN gradient row. What is ignored has neither loss nor gradient.
    if (label != op.ignore_index) loss = log_sum = static_cast<Value>(NAN);
  } else if (label != op.ignore_index) {
    highest = static_cast<Value>(-INFINITY);
    for (int64_t i = threadIdx.x; i < op.classes; i += Threads) highest = Largest()(highest, scores[i]);
    highest = block_reduce<Threads>(highest, Largest());
    // A NaN makes the loss NaN whatever is kept: all is.
    if (op.k < op.classes - 1 && highest == highest) threshold = kth_negative<Threads>(scores, op.classes, label, op.k);
    Value total = 0;
    for (int64_t i = threadIdx.x; i < op.classes; i += Threads)
      if (!(scores[i] < threshold) || i == label) total += exp(scores[i] - highest);
    log_sum = log(block_reduce<Threads>(total, Sum()));
    loss = log_sum - (scores[label] - highest);
  }
  if (threadIdx.x != 0) return;
  static_cast<Value*>(op.losses)[row] = loss;
  static_cast<Value*>(op.highest)[row] = highest;
  static_cast<Value*>(op.log_sum)[row] = log_sum;
  static_cast<Value*>(op.threshold)[row] = threshold;
}

constexpr int kReduceThreads = 256;

// One block: the sum of the losses, or their mean over the samples that count. `rows` are the losses, which become the
// weights.
template <class Value>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_losses(Value* rows, const int64_t* target, int64_t samples, int64_t ignore_index, Reduction reduction,
                  Value* loss) {
  Value total = 0;
  int64_t used = 0;
  for (int64_t row = threadIdx.x; row < samples; row += kReduceThreads) {
    if (reduction == kNone) loss[row] = rows[row];
    total += rows[row];
    used += target[row] != ignore_index;
  }
  total = block_reduce<kReduceThreads>(total, Sum());
  used = block_reduce<kReduceThreads>(used, Sum());
  const Value weight = reduction == kMean ? 1 / static_cast<Value>(used) : 1;
  for (int64_t row = threadIdx.x; row < samples; row += kReduceThreads)
    rows[row] = target[row] == ignore_index ? 0 : weight;
  if (threadIdx.x == 0 && reduction != kNone) *loss = reduction == kMean ? total / static_cast<Value>(used) : total;
}

template <class T, int Threads>
__global__ void __launch_bounds__(Threads) boosted_gradient(GradientBoostingBackward op) {
  using Value = Accumulation<T>;
  const GradientBoosting& forward = op.forward;
  const int64_t row = blockIdx.x, label = forward.target[row];
  const Row<T> scores{static_cast<const T*>(forward.scores) + row * forward.row_stride, forward.column_stride};
  T* grad = static_cast<T*>(op.grad_scores) + row * op.row_stride;
  const Value highest = static_cast<const Value*>(forward.highest)[row];
  const Value log_sum = static_cast<const Value*>(forward.log_sum)[row];
  const Value threshold = static_cast<const Value*>(forward.threshold)[row];
  const Value weight = static_cast<const Value*>(op.weight)[row];
  const Value factor = static_cast<const Value*>(op.grad)[op.grad_per_sample ? row : 0] * weight;
  for (int64_t i = threadIdx.x; i < forward.classes; i += Threads) {
    Value value = 0;
    if (weight != 0) {
      const Value score = scores[i];
      if (i == label || !(score < threshold))
        value = (exp((score - highest) - log_sum) - (i == label ? 1 : 0)) * factor;
    }
    grad[i * op.column_stride] = narrow<T>(value);
  }
}

}  // namespace fgvc_ext::cuda
