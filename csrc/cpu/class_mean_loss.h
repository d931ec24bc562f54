// Class-mean embedding loss, ELoPE eq. 5–12, in three passes: the features f of every sample; per class, the new mean
// and the within-class loss; per class, its distances from the others, the between-class loss, and the gradients of
// both losses to the embeddings of its samples.
#pragma once

#include "../common/class_mean_loss.h"
#include "../common/scale.h"
#include "loss_gradient.h"
#include "rows.h"
#include "scratch.h"

namespace fgvc_ext::FGVC_ISA {

// Runs `statement` with M as the storage type of the class means beside embeddings of type T: T, or float beside half.
#define FGVC_SWITCH_MEANS(T, op, statement)  \
  do {                                       \
    if ((op).means_dtype == (op).dtype) {    \
      using M = T;                           \
      statement;                             \
    } else {                                 \
      using M = ::fgvc_ext::Accumulation<T>; \
      statement;                             \
    }                                        \
  } while (0)

// --- f = embedding / ‖embedding‖; a zero stays zero ---

// The largest |x|, of a row without NaN.
template <class Value>
FGVC_INLINE Value largest_magnitude(const Value* row, int64_t size) {
  Vector<Value> lanes = {};
  for_each_vector<Value>(size, [&](auto how, int64_t i) {
    const Vector<Value> x = how.at(row, i, 0), magnitude = x < 0 ? -x : x;
    lanes = magnitude > lanes ? magnitude : lanes;
  });
  Value largest = lanes[0];
  for (int lane = 1; lane < kLanesOf<Value>; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
  return largest;
}

template <class T>
FGVC_INLINE void features_of_rows(const ClassMeanLoss& op, int64_t begin, int64_t end) {
  using Value = Accumulation<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* embedding = static_cast<const T*>(op.embeddings) + row * op.embedding_stride[0];
    Value* feature = static_cast<Value*>(op.features) + row * op.size;
    for (int64_t i = 0; i < op.size; ++i) feature[i] = to_float(embedding[i * op.embedding_stride[1]]);
    Value length = 1, scale = 1;
    if (op.normalize) {
      scale = scale_to_one(largest_magnitude(feature, op.size));  // f does not depend on it
      for (int64_t i = 0; i < op.size; ++i) feature[i] *= scale;
      length = std::sqrt(row_dot(feature, feature, op.size));
      for (int64_t i = 0; i < op.size; ++i) feature[i] = length == 0 ? Value(0) : feature[i] / length;
    }
    static_cast<Value*>(op.lengths)[row] = length;
    static_cast<Value*>(op.lengths)[op.samples + row] = scale;
  }
}

// --- μ^t = μ − α Σ_n (μ − f_n) / (1 + n_c), eq. 6–8; Σ_n ‖f_n − μ^t‖², eq. 9 ---

// Σ_n (f_n − origin) over the samples of a class: in blocks, whose sums are added up in double, so that a class of many
// samples loses little.
template <class Value, class Origin>
FGVC_INLINE void add_up_samples(const ClassMeanLoss& op, int64_t group, Origin origin, Value* block, double* sum) {
  constexpr int64_t kBlock = 64;
  const int64_t last = op.start[group + 1];
  for (int64_t i = 0; i < op.size; ++i) sum[i] = 0;
  for (int64_t n = op.start[group]; n < last;) {
    for (int64_t i = 0; i < op.size; ++i) block[i] = 0;
    for (const int64_t stop = smaller(last, n + kBlock); n < stop; ++n) {
      const Value* feature = static_cast<const Value*>(op.features) + op.order[n] * op.size;
      for (int64_t i = 0; i < op.size; ++i) block[i] += feature[i] - origin(i);
    }
    for (int64_t i = 0; i < op.size; ++i) sum[i] += static_cast<double>(block[i]);
  }
}

template <class T, class M>
FGVC_INLINE void means_of_classes(const ClassMeanLoss& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  auto* block = scratch.take<Value>(op.size);
  auto* sum = scratch.take<double>(op.size);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = op.start[group], last = op.start[group + 1];
    const M* old = static_cast<const M*>(op.class_means) + op.labels[op.order[first]] * op.means_stride[0];
    Value* mean = static_cast<Value*>(op.means) + group * op.size;
    add_up_samples(op, group, [](int64_t) { return Value(0); }, block, sum);
    const double count = static_cast<double>(last - first);
    for (int64_t i = 0; i < op.size; ++i) {
      const double before = to_float(old[i * op.means_stride[1]]);
      mean[i] = static_cast<Value>(before - op.alpha * ((count * before - sum[i]) / (1 + count)));
    }
    double total = 0;
    for (int64_t n = first; n < last; ++n) {
      const int64_t row = op.order[n];
      total += row_square_distance(static_cast<const Value*>(op.features) + row * op.size, mean, op.size);
      M* batch_mean = static_cast<M*>(op.batch_means) + row * op.size;
      for (int64_t i = 0; i < op.size; ++i) batch_mean[i] = from_float<M>(mean[i]);
    }
    static_cast<Value*>(op.within)[group] = static_cast<Value>(total);
  }
}

// --- Σ max(m − ‖μ_j − μ_c‖², 0)² over the classes c > j, eq. 10, and the gradient to μ_j over all c ---

template <class Value>
FGVC_INLINE Value hinges_of_class(const ClassMeanLoss& op, int64_t group, Value* gradient) {
  const Value* means = static_cast<const Value*>(op.means);
  const Value* mean = means + group * op.size;
  const double pairs = static_cast<double>(op.groups) * static_cast<double>(op.groups - 1) / 2;
  const Value factor = static_cast<Value>(-op.gamma / pairs);
  Value total = 0;
  for (int64_t i = 0; i < op.size; ++i) gradient[i] = 0;
  for (int64_t other = 0; other < op.groups; ++other) {
    if (other == group) continue;
    const Value* other_mean = means + other * op.size;
    const Value hinge = static_cast<Value>(op.margin) - row_square_distance(mean, other_mean, op.size);
    if (hinge <= 0) continue;  // a NaN goes on
    if (other > group) total += hinge * hinge;
    for (int64_t i = 0; i < op.size; ++i) gradient[i] += factor * hinge * (mean[i] - other_mean[i]);
  }
  return total;
}

// The gradient to an embedding from that to its feature f: what lies along f does not change f. Writes to `gradient`.
template <class Value>
FGVC_INLINE void through_normalisation(bool normalize, const Value* feature, Value length, Value scale, int64_t size,
                                       Value* gradient) {
  if (!normalize) return;
  const Value along = row_dot(gradient, feature, size);
  for (int64_t i = 0; i < size; ++i)
    gradient[i] = length == 0 ? Value(0) : (gradient[i] - feature[i] * along) / length * scale;
}

template <class T>
FGVC_INLINE void gradients_of_classes(const ClassMeanLoss& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  const int64_t size = op.size;
  auto* block = scratch.take<Value>(size);
  auto* residual = scratch.take<double>(size);        // Σ_n (f_n − μ^t) over the class
  auto* pull = scratch.take<Value>(row_pitch(size));  // of L_b to μ^t
  const Value samples = static_cast<Value>(op.samples);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = op.start[group], last = op.start[group + 1];
    const Value* mean = static_cast<const Value*>(op.means) + group * size;
    static_cast<Value*>(op.between)[group] = hinges_of_class(op, group, pull);

    add_up_samples(op, group, [&](int64_t i) { return mean[i]; }, block, residual);
    // dμ^t/df_n of every sample n of the class.
    const Value share = static_cast<Value>(op.alpha) / (1 + static_cast<Value>(last - first));
    for (int64_t n = first; n < last; ++n) {
      const int64_t row = op.order[n];
      const Value* feature = static_cast<const Value*>(op.features) + row * size;
      const Value length = static_cast<const Value*>(op.lengths)[row];
      const Value scale = static_cast<const Value*>(op.lengths)[op.samples + row];
      Value* within = static_cast<Value*>(op.gradients) + row * size;
      Value* between = within + op.samples * size;
      for (int64_t i = 0; i < size; ++i) {
        within[i] = (feature[i] - mean[i] - share * static_cast<Value>(residual[i])) / samples;
        between[i] = share * pull[i];
      }
      through_normalisation(op.normalize, feature, length, scale, size, within);
      through_normalisation(op.normalize, feature, length, scale, size, between);
    }
  }
}

void class_mean_features(const ClassMeanLoss& op, int64_t begin, int64_t end, Scratch&) {
  FGVC_SWITCH_DTYPE(op.dtype, features_of_rows<T>(op, begin, end));
}
void class_mean_within(const ClassMeanLoss& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, FGVC_SWITCH_MEANS(T, op, (means_of_classes<T, M>(op, begin, end, scratch))));
}
void class_mean_between(const ClassMeanLoss& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, gradients_of_classes<T>(op, begin, end, scratch));
}
void class_mean_loss_backward(const LossGradient& op, int64_t begin, int64_t end, Scratch&) {
  FGVC_SWITCH_DTYPE(op.dtype, scale_gradients<T>(op, begin, end));
}

}  // namespace fgvc_ext::FGVC_ISA
