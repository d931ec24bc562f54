// Gradient-boosting cross-entropy, subtle differences eq. 9–14. A warp per row of scores that fits its registers, a
// block per longer row. The k-th highest negative (eq. 11) is the threshold below which negatives are left out.
#pragma once

#include "../common/gradient_boosting_cross_entropy.h"
#include "memory.cuh"
#include "selection.cuh"

namespace fgvc_ext::cuda {

constexpr int kRowThreads = 256;
constexpr int kClassesPerLane = 8, kMoreClassesPerLane = 32;  // of a row in registers of one warp

template <class T>
struct Row {
  Global<const T> scores;
  int64_t stride, classes;

  template <class Op>
  __device__ Row(const Op& op, int64_t row)
      : scores(Global<const T>(op.scores).from(row * op.row_stride)), stride(op.column_stride), classes(op.classes) {}
  __device__ __forceinline__ Accumulation<T> operator[](int64_t i) const { return widen(scores.load(i * stride)); }
};

// What forward keeps of a row; eq. 12 and 13.
template <class Value>
struct RowResult {
  Value loss = 0, highest = 0, log_sum = 0, threshold = static_cast<Value>(-INFINITY);

  __device__ void store(const GradientBoosting& op, int64_t row) const {
    Global<Value>(op.rows.weight).store(row, loss);
    Global<Value>(op.rows.highest).store(row, highest);
    Global<Value>(op.rows.log_sum).store(row, log_sum);
    Global<Value>(op.rows.threshold).store(row, threshold);
  }
  // Of a row that has no label. What is ignored has neither loss nor gradient; a wrong label makes both NaN.
  __device__ static RowResult unlabelled(bool ignored) {
    RowResult result;
    if (!ignored) result.loss = result.log_sum = static_cast<Value>(NAN);
    return result;
  }
};

__device__ __forceinline__ bool has_label(int64_t label, const GradientBoosting& op) {
  return label >= 0 && label < op.classes && label != op.ignore_index;
}

// The k-th largest key of a warp's, exactly.
template <int PerLane, class Key>
__device__ __forceinline__ Key kth_key(const Key (&keys)[PerLane], unsigned k, WarpList<Key>& list) {
  if (k <= kWarp) {
    const auto position = [](int slot) { return slot * kWarp + lane_index(); };
    return __shfl_sync(kAllLanes, first_of_warp(keys, position, PerLane * kWarp, k, list).key, k - 1);
  }
  return reached_by<Key>(1, ~Key{0}, k, k, [&](Key key) {
    unsigned of_lane = 0;
#pragma unroll
    for (int i = 0; i < PerLane; ++i) of_lane += keys[i] >= key;
    return warp_reduce(of_lane, Sum());
  });
}

// Rows of up to 32 · PerLane classes: one warp reads its row once.
template <class T, int PerLane>
__global__ void __launch_bounds__(kRowThreads) boosted_loss_of_warp(GradientBoosting op, int64_t rows) {
  using Value = Accumulation<T>;
  using Key = KeyOf<T>;
  __shared__ WarpList<Key> lists[kWarpsPerBlock];
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp_index();
  if (number >= rows) return;
  const int64_t label = Global<const int64_t>(op.target).load(number);
  if (!has_label(label, op)) {
    if (lane_index() == 0) RowResult<Value>::unlabelled(label == op.ignore_index).store(op, number);
    return;
  }
  const Row<T> row(op, number);
  Value scores[PerLane], highest = static_cast<Value>(-INFINITY), of_label = 0;
  Key keys[PerLane], largest = 0;  // of the negatives; and of all
#pragma unroll
  for (int i = 0; i < PerLane; ++i) {
    const int64_t column = i * kWarp + lane_index();
    const bool inside = column < op.classes;
    scores[i] = inside ? row[column] : static_cast<Value>(-INFINITY);
    const Key key = inside ? ordered_key(scores[i]) : Key{0};
    keys[i] = column == label ? Key{0} : key;
    if (column == label) of_label = scores[i];
    largest = Larger()(largest, key);
  }
  RowResult<Value> result;
  result.highest = highest = value_of_key(warp_reduce(largest, Larger()));
  of_label = __shfl_sync(kAllLanes, of_label, static_cast<int>(label % kWarp));
  // A NaN makes the loss NaN whatever is kept: all is.
  if (op.k < op.classes - 1 && highest == highest)
    result.threshold = value_of_key(kth_key(keys, static_cast<unsigned>(op.k), lists[warp_index()]));
  Value sum = 0;
#pragma unroll
  for (int i = 0; i < PerLane; ++i) {
    const int64_t column = i * kWarp + lane_index();
    if (column < op.classes && (!(scores[i] < result.threshold) || column == label)) sum += exp(scores[i] - highest);
  }
  result.log_sum = log(warp_reduce(sum, Sum()));
  result.loss = result.log_sum - (of_label - highest);
  if (lane_index() == 0) result.store(op, number);
}

// Rows of any number of classes: a block reads its row again for every bit of the threshold.
template <class T>
__global__ void __launch_bounds__(kRowThreads) boosted_loss_of_block(GradientBoosting op) {
  using Value = Accumulation<T>;
  using Key = KeyOf<T>;
  const int64_t number = blockIdx.x, label = Global<const int64_t>(op.target).load(number);
  if (!has_label(label, op)) {
    if (threadIdx.x == 0) RowResult<Value>::unlabelled(label == op.ignore_index).store(op, number);
    return;
  }
  const Row<T> row(op, number);
  RowResult<Value> result;
  Key largest = 0;
  for (int64_t i = threadIdx.x; i < op.classes; i += kRowThreads) largest = Larger()(largest, ordered_key(row[i]));
  largest = block_reduce<kRowThreads>(largest, Larger());
  result.highest = value_of_key(largest);
  // A NaN makes the loss NaN whatever is kept: all is.
  if (op.k < op.classes - 1 && result.highest == result.highest) {
    const auto k = static_cast<unsigned>(op.k);
    result.threshold = value_of_key(reached_by<Key>(1, largest, k, k, [&](Key key) {
      unsigned reached = 0;
      for (int64_t i = threadIdx.x; i < op.classes; i += kRowThreads)
        reached += i != label && ordered_key(row[i]) >= key;
      return block_reduce<kRowThreads>(reached, Sum());
    }));
  }
  Value sum = 0;
  for (int64_t i = threadIdx.x; i < op.classes; i += kRowThreads)
    if (!(row[i] < result.threshold) || i == label) sum += exp(row[i] - result.highest);
  result.log_sum = log(block_reduce<kRowThreads>(sum, Sum()));
  result.loss = result.log_sum - (row[label] - result.highest);
  if (threadIdx.x == 0) result.store(op, number);
}

// One block: the sum of the losses, or their mean over the rows that count; in double, because rows may be many. Then
// each row's weight in the result takes the place of its loss.
template <class Value>
__global__ void __launch_bounds__(kRowThreads)
    reduce_losses(Global<Value> losses, Global<const int64_t> target, int64_t samples, int64_t ignore_index,
                  Reduction reduction, Global<Value> loss) {
  double total = 0;
  int64_t used = 0;
  for (int64_t row = threadIdx.x; row < samples; row += kRowThreads) {
    const Value of_row = losses.load(row);
    if (reduction == kNone) loss.store(row, of_row);
    total += of_row;
    used += target.load(row) != ignore_index;
  }
  total = block_reduce<kRowThreads>(total, Sum());
  used = block_reduce<kRowThreads>(used, Sum());
  const Value weight = reduction == kMean ? 1 / static_cast<Value>(used) : 1;
  for (int64_t row = threadIdx.x; row < samples; row += kRowThreads)
    losses.store(row, target.load(row) == ignore_index ? 0 : weight);
  if (threadIdx.x == 0 && reduction != kNone)
    loss.store(0, static_cast<Value>(reduction == kMean ? total / static_cast<double>(used) : total));
}

// Eq. 14: softmax over what is kept, less one at the label.
template <class T>
__global__ void __launch_bounds__(kRowThreads) boosted_gradient(GradientBoostingBackward op) {
  using Value = Accumulation<T>;
  const int64_t number = blockIdx.x, label = Global<const int64_t>(op.target).load(number);
  const Row<T> row(op, number);
  const auto grad = Global<T>(op.grad_scores).from(number * op.grad_row_stride);
  const Value highest = Global<const Value>(op.rows.highest).load(number);
  const Value log_sum = Global<const Value>(op.rows.log_sum).load(number);
  const Value threshold = Global<const Value>(op.rows.threshold).load(number);
  const Value weight = Global<const Value>(op.rows.weight).load(number);
  Value factor = Global<const Value>(op.grad).load(op.grad_per_sample ? number : 0) * weight;
  const bool in_range = label >= 0 && label < op.classes;
  if (!in_range) factor = static_cast<Value>(NAN);
  for (int64_t i = threadIdx.x; i < op.classes; i += kRowThreads) {
    Value value = 0;
    if (weight != 0) {
      const Value score = row[i];
      if (i == label || !(score < threshold) || !in_range)
        value = (exp((score - highest) - log_sum) - (i == label ? 1 : 0)) * factor;
    }
    grad.store(i * op.grad_column_stride, narrow<T>(value));
  }
}

}  // namespace fgvc_ext::cuda
