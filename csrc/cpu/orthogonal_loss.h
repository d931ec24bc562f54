// Orthogonal loss, knowledge transfer eq. 2–5: the mean of A_t · S over samples, positions and teachers, with
// S = max(z(student), 0) and A_t = |z(teacher)|. One visit to a sample's maps gives its share of the loss and the
// gradient to the student's map.
#pragma once

#include "../common/orthogonal_loss.h"
#include "../common/scale.h"
#include "loss_gradient.h"
#include "rows.h"
#include "scratch.h"

namespace fgvc_ext::FGVC_ISA {

// What z(x) = (x − mean) / deviation of a map is made of, eq. 2. The differences are multiplied by a power of two that
// brings the largest of them near one: z does not depend on it, and the squares of small and of large maps are finite.
template <class Value>
struct Centred {
  bool constant;  // z = 0: such a map has no direction
  Value scale, deviation;
};

// Writes (x − mean) · scale to `centred`. The mean is found twice: the second time it is that of what the first one
// left, so that a map far from zero keeps its digits. In a map with a NaN or an infinity, the deviation is NaN.
template <class T, class Value>
FGVC_INLINE Centred<Value> centre(const T* map, int64_t positions, Value* centred) {
  using Values = Vector<Value>;
  const Value count = static_cast<Value>(positions), first = to_float(map[0]);
  Values lowest = first - Values{}, highest = lowest;
  const Value total = sum_of_terms<Value>(positions, [&](auto how, int64_t i) {
    const Values x = how.at(map, i, first);
    lowest = x < lowest ? x : lowest;
    highest = x > highest ? x : highest;
    return how.at(map, i, 0);
  });
  Value low = lowest[0], high = highest[0];
  for (int lane = 1; lane < kLanesOf<Value>; ++lane) {
    low = lowest[lane] < low ? lowest[lane] : low;
    high = highest[lane] > high ? highest[lane] : high;
  }
  if (low == high && total == total) return {true, 0, 0};  // the comparisons pass a NaN over, the sum does not

  const Value mean = total / count;
  const Value left = sum_of_terms<Value>(positions,
                                         [&](auto how, int64_t i) {
                                           const Values x = how.at(map, i, mean) - mean;
                                           how.put(centred, i, x);
                                           return x;
                                         }) /
                     count;
  const Value below = left - (low - mean), above = (high - mean) - left;
  const Value scale = scale_to_one(below > above ? below : above);
  const Value squares = sum_of_terms<Value>(positions, [&](auto how, int64_t i) {
    const Values x = (how.at(centred, i, left) - left) * scale;
    how.put(centred, i, x);
    return x * x;
  });
  return {false, scale, std::sqrt(squares / count)};
}

template <class T>
FGVC_INLINE void orthogonal_samples(const OrthogonalLoss& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  using Values = Vector<Value>;
  const int64_t positions = op.positions;
  auto* z = scratch.take<Value>(positions);
  auto* other = scratch.take<Value>(positions);
  auto* weight = scratch.take<Value>(positions);
  const Value size = static_cast<Value>(positions);
  const Value count = static_cast<Value>(op.teachers) * static_cast<Value>(op.samples) * size;
  for (int64_t sample = begin; sample < end; ++sample) {
    const Values zero = {};
    // Σ_t A_t
    for_each_vector<Value>(positions, [&](auto how, int64_t i) { how.put(weight, i, zero); });
    for (int64_t teacher = 0; teacher < op.teachers; ++teacher) {
      const Value* map = static_cast<const Value*>(op.teacher_maps) + (teacher * op.samples + sample) * positions;
      const auto found = centre(map, positions, other);
      if (found.constant) continue;
      const Value slope = 1 / found.deviation;
      for_each_vector<Value>(positions, [&](auto how, int64_t i) {
        const Values x = how.at(other, i, 0) * slope;
        how.put(weight, i, how.at(weight, i, 0) + (x < 0 ? -x : x));
      });
    }

    // The loss: Σ_p weight[p] · max(z[p], 0). A NaN of either stays one.
    const auto own = centre(static_cast<const T*>(op.student) + sample * positions, positions, z);
    const Value slope = own.constant ? Value(0) : 1 / own.deviation;
    const Value total = sum_of_terms<Value>(positions, [&](auto how, int64_t i) {
      const Values x = own.constant ? zero : how.at(z, i, 0) * slope;
      how.put(z, i, x);
      return how.at(weight, i, 0) * (x <= 0 ? zero : x);
    });
    static_cast<Value*>(op.losses)[sample] = total / count;

    // Its gradient, through z, whose mean and deviation depend on every position.
    const Value mean = sum_of_terms<Value>(positions,
                                           [&](auto how, int64_t i) {
                                             const Values x =
                                                 how.at(z, i, 0) <= 0 ? zero : how.at(weight, i, 0) / count;
                                             how.put(weight, i, x);
                                             return x;
                                           }) /
                       size;
    const Value projection = row_dot(weight, z, positions) / size;
    Value* gradient = static_cast<Value*>(op.gradient) + sample * positions;
    for_each_vector<Value>(positions, [&](auto how, int64_t i) {
      const Values along = how.at(weight, i, 0) - mean - how.at(z, i, 0) * projection;
      how.put(gradient, i, own.constant ? zero : along * slope * own.scale);
    });
  }
}

void orthogonal_loss(const OrthogonalLoss& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, orthogonal_samples<T>(op, begin, end, scratch));
}
void orthogonal_loss_backward(const LossGradient& op, int64_t begin, int64_t end, Scratch&) {
  FGVC_SWITCH_DTYPE(op.dtype, scale_gradients<T>(op, begin, end));
}

}  // namespace fgvc_ext::FGVC_ISA
