// Class-mean embedding loss, ELoPE eq. 5–12: one block per sample in each of four steps. The first sample of a class in
// the batch leads it: its block computes the class's mean and the distances from other classes. The samples of a class
// are found by comparing labels, so that no sorting and no wait is needed, and added up in their order.
#pragma once

#include "../common/class_mean_loss.h"
#include "../common/scale.h"
#include "loss_gradient.cuh"

namespace fgvc_ext::cuda {

constexpr int kClassThreads = 128;

// What the steps hand on. Rows of leading samples stand for their class; the other rows are unused.
template <class Value>
struct ClassMeanWork {
  Global<int32_t> lead;     // [N]: the first sample of the same class, or −1 where the label is out of range
  Global<int32_t> count;    // [N]: samples of the same class
  Global<Value> means;      // [N,E]: μ^t of a leading sample's class
  Global<Value> residuals;  // [N,E]: Σ_n (f_n − μ^t) over the class
  Global<Value> pulls;      // [N,E]: Σ_c max(m − ‖μ − μ_c‖², 0) (μ − μ_c) over the other classes
  Global<Value> within;     // [N]: ‖f − μ^t‖²
  Global<Value> between;    // [N]: of a leading sample, Σ max(m − d², 0)² over later classes; else 0
  Global<Value> pairs;      // []: pairs of classes
};

__device__ inline int64_t label_of(const ClassMeanLoss& op, int64_t row) {
  return Global<const int64_t>(op.labels).load(row);
}

// f = embedding / ‖embedding‖; a zero stays zero. And who is of the same class.
template <class T>
__global__ void __launch_bounds__(kClassThreads) class_features(ClassMeanLoss op, ClassMeanWork<Accumulation<T>> work) {
  using Value = Accumulation<T>;
  const int64_t row = blockIdx.x, label = label_of(op, row);
  const auto embedding = Global<const T>(op.embeddings).from(row * op.embedding_stride[0]);
  const auto feature = Global<Value>(op.features).from(row * op.size);
  Value largest = 0, squares = 0;
  for (int64_t i = threadIdx.x; i < op.size && op.normalize; i += kClassThreads) {
    const Value x = widen(embedding.load(i * op.embedding_stride[1])), magnitude = x < 0 ? -x : x;
    largest = magnitude > largest ? magnitude : largest;  // a NaN is passed over
  }
  const Value scale = op.normalize ? scale_to_one(block_reduce<kClassThreads>(largest, Larger())) : Value(1);
  for (int64_t i = threadIdx.x; i < op.size; i += kClassThreads) {
    const Value x = widen(embedding.load(i * op.embedding_stride[1])) * scale;
    squares += x * x;
  }
  const Value length = op.normalize ? sqrt(block_reduce<kClassThreads>(squares, Sum())) : Value(1);
  for (int64_t i = threadIdx.x; i < op.size; i += kClassThreads) {
    const Value x = widen(embedding.load(i * op.embedding_stride[1])) * scale;  // f does not depend on the scale
    feature.store(i, length == 0 ? Value(0) : x / length);
  }
  const bool valid = label >= 0 && label < op.classes;
  int count = 0, first = INT32_MAX;
  for (int64_t other = threadIdx.x; valid && other < op.samples; other += kClassThreads) {
    if (label_of(op, other) != label) continue;
    ++count;
    first = other < first ? static_cast<int>(other) : first;
  }
  count = block_reduce<kClassThreads>(count, Sum());
  first = -block_reduce<kClassThreads>(-first, Larger());
  if (threadIdx.x != 0) return;
  Global<Value>(op.lengths).store(row, length);
  Global<Value>(op.lengths).store(op.samples + row, scale);
  work.lead.store(row, valid ? first : -1);
  work.count.store(row, count);
}

// μ^t = μ − α Σ_n (μ − f_n) / (1 + n_c), eq. 6–8, and Σ_n (f_n − μ^t). Blocks of samples that do not lead have no work.
template <class T, class M>
__global__ void __launch_bounds__(kClassThreads) class_means(ClassMeanLoss op, ClassMeanWork<Accumulation<T>> work) {
  using Value = Accumulation<T>;
  const int64_t row = blockIdx.x;
  if (work.lead.load(row) != row) return;
  const int64_t label = label_of(op, row);
  const auto old = Global<const M>(op.class_means).from(label * op.means_stride[0]);
  const double count = work.count.load(row), alpha = op.alpha;
  for (int64_t i = threadIdx.x; i < op.size; i += kClassThreads) {
    double sum = 0;  // a class may have many samples
    for (int64_t other = row; other < op.samples; ++other)
      if (work.lead.load(other) == row) sum += Global<const Value>(op.features).load(other * op.size + i);
    const Value before = widen(old.load(i * op.means_stride[1]));
    const Value mean = static_cast<Value>(before - alpha * ((count * before - sum) / (1 + count)));
    double residual = 0;
    for (int64_t other = row; other < op.samples; ++other)
      if (work.lead.load(other) == row) residual += Global<const Value>(op.features).load(other * op.size + i) - mean;
    work.means.store(row * op.size + i, mean);
    work.residuals.store(row * op.size + i, static_cast<Value>(residual));
  }
}

// Σ_i (a_i − b_i)². All threads of the block must call.
template <class Value>
__device__ Value square_distance(const Global<const Value>& a, const Global<const Value>& b, int64_t size) {
  Value total = 0;
  for (int64_t i = threadIdx.x; i < size; i += kClassThreads) {
    const Value x = a.load(i) - b.load(i);
    total += x * x;
  }
  return block_reduce<kClassThreads>(total, Sum());
}

// ‖f − μ^t‖² of the sample, eq. 9; of a leading sample also max(m − ‖μ − μ_c‖², 0)² over the later classes c, eq. 10,
// and what pulls its mean. The block of sample 0 also counts the pairs of classes.
template <class T, class M>
__global__ void __launch_bounds__(kClassThreads)
    class_distances(ClassMeanLoss op, ClassMeanWork<Accumulation<T>> work) {
  using Value = Accumulation<T>;
  const int64_t row = blockIdx.x, lead = work.lead.load(row), size = op.size;
  const auto batch_mean = Global<M>(op.batch_means).from(row * size);
  const Global<const Value> means = work.means;
  if (row == 0) {
    int leads = 0;
    for (int64_t other = threadIdx.x; other < op.samples; other += kClassThreads)
      leads += work.lead.load(other) == other;
    const Value classes = static_cast<Value>(block_reduce<kClassThreads>(leads, Sum()));
    if (threadIdx.x == 0) work.pairs.store(0, classes * (classes - 1) / 2);
  }
  if (lead < 0) {  // a label out of range
    for (int64_t i = threadIdx.x; i < size; i += kClassThreads) batch_mean.store(i, narrow<M>(static_cast<Value>(NAN)));
    if (threadIdx.x == 0) work.within.store(row, static_cast<Value>(NAN));
    if (threadIdx.x == 0) work.between.store(row, 0);
    return;
  }
  const auto mean = means.from(lead * size);
  const Value within = square_distance(Global<const Value>(op.features).from(row * size), mean, size);
  for (int64_t i = threadIdx.x; i < size; i += kClassThreads) batch_mean.store(i, narrow<M>(mean.load(i)));

  Value between = 0;
  const auto pull = work.pulls.from(row * size);
  if (lead == row) {
    for (int64_t i = threadIdx.x; i < size; i += kClassThreads) pull.store(i, 0);
    for (int64_t other = 0; other < op.samples; ++other) {
      if (other == row || work.lead.load(other) != other) continue;
      const auto other_mean = means.from(other * size);
      const Value hinge = static_cast<Value>(op.margin) - square_distance(mean, other_mean, size);
      if (hinge <= 0) continue;  // a NaN goes on
      if (other > row) between += hinge * hinge;
      for (int64_t i = threadIdx.x; i < size; i += kClassThreads)
        pull.store(i, pull.load(i) + hinge * (mean.load(i) - other_mean.load(i)));
    }
  }
  if (threadIdx.x == 0) work.within.store(row, within);
  if (threadIdx.x == 0) work.between.store(row, between);
}

// The gradients of both losses to the embedding.
template <class T>
__global__ void __launch_bounds__(kClassThreads)
    class_gradients(ClassMeanLoss op, ClassMeanWork<Accumulation<T>> work) {
  using Value = Accumulation<T>;
  const int64_t row = blockIdx.x, lead = work.lead.load(row), size = op.size;
  const auto within = Global<Value>(op.gradients).from(row * size);
  const auto between = Global<Value>(op.gradients).from((op.samples + row) * size);
  if (lead < 0) {
    for (int64_t i = threadIdx.x; i < size; i += kClassThreads) {
      within.store(i, static_cast<Value>(NAN));
      between.store(i, static_cast<Value>(NAN));
    }
    return;
  }
  const auto feature = Global<const Value>(op.features).from(row * size);
  const Value length = Global<const Value>(op.lengths).load(row);
  const Value scale = Global<const Value>(op.lengths).load(op.samples + row), pairs = work.pairs.load(0);
  const Value share = static_cast<Value>(op.alpha) / (1 + static_cast<Value>(work.count.load(row)));  // dμ^t/df
  const Value factor = pairs < 1 ? Value(0) : -static_cast<Value>(op.gamma) / pairs * share;
  Value along_within = 0, along_between = 0;
  for (int64_t i = threadIdx.x; i < size; i += kClassThreads) {
    const Value f = feature.load(i);
    const Value residual = f - work.means.load(lead * size + i) - share * work.residuals.load(lead * size + i);
    const Value of_within = residual / static_cast<Value>(op.samples),
                of_between = factor * work.pulls.load(lead * size + i);
    within.store(i, of_within);
    between.store(i, of_between);
    along_within += of_within * f;
    along_between += of_between * f;
  }
  if (!op.normalize) return;
  along_within = block_reduce<kClassThreads>(along_within, Sum());  // what lies along f does not change f
  along_between = block_reduce<kClassThreads>(along_between, Sum());
  for (int64_t i = threadIdx.x; i < size; i += kClassThreads) {
    const Value f = feature.load(i);
    within.store(i, length == 0 ? Value(0) : (within.load(i) - f * along_within) / length * scale);
    between.store(i, length == 0 ? Value(0) : (between.load(i) - f * along_between) / length * scale);
  }
}

}  // namespace fgvc_ext::cuda
