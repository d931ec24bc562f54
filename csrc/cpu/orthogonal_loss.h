// Orthogonal loss, knowledge transfer eq. 2–5: the mean of A_t · S over samples, positions and teachers, with
// S = max(z(student), 0) and A_t = |z(teacher)|. One pass over a sample's maps gives its share of the loss and the
// gradient to the student's map.
#pragma once

#include "../common/orthogonal_loss.h"
#include "loss_gradient.h"
#include "rows.h"
#include "scratch.h"

namespace fgvc_ext::FGVC_ISA {

// z(x) = (x − mean) / largest / deviation, eq. 2. The largest |x − mean| is divided out first: z does not depend on the
// map's scale, and so the squares of small and of large maps are finite.
template <class Value>
struct Normalisation {
  bool constant;  // z = 0: such a map has no direction
  Value mean, largest, deviation;

  __attribute__((always_inline)) Value operator()(Value x) const {
    return constant ? Value(0) : (x - mean) / largest / deviation;
  }
};

template <class Value>
FGVC_INLINE Value absolute(Value x) {
  return x < 0 ? -x : x;
}

template <class Value>
FGVC_INLINE Normalisation<Value> normalisation_of(const Value* map, int64_t positions) {
  Normalisation<Value> z{row_is_constant(map, positions), 0, 0, 0};
  if (z.constant) return z;
  z.mean = row_sum(map, positions) / static_cast<Value>(positions);
  for (int64_t i = 0; i < positions; ++i) z.largest = std::max(z.largest, absolute(map[i] - z.mean));
  z.deviation = std::sqrt(row_square_deviation(map, z.mean, z.largest, positions) / static_cast<Value>(positions));
  return z;
}

// The gradient of Σ_p weight[p] · max(z(p), 0) to the map, in place of `weight`: through z, whose mean and deviation
// depend on every position. Returns the sum.
template <class Value>
FGVC_INLINE Value backpropagate(const Normalisation<Value>& normalisation, const Value* z, int64_t positions,
                                Value* weight) {
  Value total = 0, mean = 0, projection = 0;
  for (int64_t i = 0; i < positions; ++i) {
    total += weight[i] * (z[i] <= 0 ? Value(0) : z[i]);  // a NaN of either stays one
    weight[i] = z[i] <= 0 ? Value(0) : weight[i];
    mean += weight[i];
    projection += weight[i] * z[i];
  }
  const Value count = static_cast<Value>(positions);
  for (int64_t i = 0; i < positions; ++i) {
    const Value along = weight[i] - mean / count - z[i] * (projection / count);
    weight[i] = normalisation.constant ? Value(0) : along / normalisation.deviation / normalisation.largest;
  }
  return total;
}

template <class T>
FGVC_INLINE void orthogonal_samples(const OrthogonalLoss& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  const int64_t positions = op.positions;
  auto* z = scratch.take<Value>(row_pitch(positions));
  const Value count = static_cast<Value>(op.teachers) * static_cast<Value>(op.samples) * static_cast<Value>(positions);
  for (int64_t sample = begin; sample < end; ++sample) {
    const T* student = static_cast<const T*>(op.student) + sample * positions;
    Value* gradient = static_cast<Value*>(op.gradient) + sample * positions;
    for (int64_t i = 0; i < positions; ++i) z[i] = to_float(student[i]), gradient[i] = 0;
    const auto own = normalisation_of(z, positions);
    for (int64_t i = 0; i < positions; ++i) z[i] = own(z[i]);

    for (int64_t teacher = 0; teacher < op.teachers; ++teacher) {
      const Value* map = static_cast<const Value*>(op.teacher_maps) + (teacher * op.samples + sample) * positions;
      const auto other = normalisation_of(map, positions);
      for (int64_t i = 0; i < positions; ++i) gradient[i] += absolute(other(map[i]));
    }
    for (int64_t i = 0; i < positions; ++i) gradient[i] /= count;
    static_cast<Value*>(op.losses)[sample] = backpropagate(own, z, positions, gradient);
  }
}

void orthogonal_loss(const OrthogonalLoss& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, orthogonal_samples<T>(op, begin, end, scratch));
}
void orthogonal_loss_backward(const LossGradient& op, int64_t begin, int64_t end, Scratch&) {
  FGVC_SWITCH_DTYPE(op.dtype, scale_gradients<T>(op, begin, end));
}

}  // namespace fgvc_ext::FGVC_ISA
