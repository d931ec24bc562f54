// Losses of part proposals, dual attention fusion section 3.7.2: how much the valid boxes of an image overlap, and how
// far their areas are from that of a part. One visit to an image gives its losses and their gradients.
#pragma once

#include "../common/part_boxes.h"
#include "loss_gradient.h"
#include "scratch.h"

namespace fgvc_ext::FGVC_ISA {

template <class T>
FGVC_INLINE PartBox<Accumulation<T>> part_box_at(const PartBoxLosses& op, int64_t sample, int64_t number) {
  const T* box = static_cast<const T*>(op.boxes) + sample * op.stride[0] + number * op.stride[1];
  const int64_t step = op.stride[2];
  return {to_float(box[0]), to_float(box[step]), to_float(box[2 * step]), to_float(box[3 * step])};
}

template <class T>
FGVC_INLINE void part_boxes_of_samples(const PartBoxLosses& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  auto* boxes = scratch.take<PartBox<Value>>(op.boxes_per_sample);  // the valid ones
  auto* numbers = scratch.take<int64_t>(op.boxes_per_sample);
  auto* gradients = static_cast<PartBox<Value>*>(op.gradients);
  const double samples = static_cast<double>(op.samples);
  for (int64_t sample = begin; sample < end; ++sample) {
    const int64_t first = sample * op.boxes_per_sample;
    PartBox<Value>* of_overlap = gradients + first;
    PartBox<Value>* of_area = of_overlap + op.samples * op.boxes_per_sample;
    int64_t count = 0;
    for (int64_t number = 0; number < op.boxes_per_sample; ++number) {
      of_overlap[number] = of_area[number] = {};
      if (!op.valid[first + number]) continue;
      boxes[count] = part_box_at<T>(op, sample, number);
      numbers[count++] = number;
    }

    const double valid = static_cast<double>(count < 1 ? 1 : count), pairs = count < 2 ? 1 : valid * (valid - 1) / 2;
    const Value overlap_factor = static_cast<Value>(op.iou_weight / pairs / samples);
    const Value area_factor = static_cast<Value>(1 / valid / samples);
    const Value part = part_area(static_cast<const Value*>(op.object_areas)[sample], static_cast<Value>(op.parts),
                                 static_cast<Value>(op.min_area));
    double overlaps = 0, areas = 0;
    for (int64_t i = 0; i < count; ++i) {
      PartBox<Value> gradient = {};
      for (int64_t j = 0; j < count; ++j) {
        if (i == j) continue;
        const Value overlap = overlap_of(boxes[i], boxes[j], overlap_factor, op.detach_denominator, gradient);
        if (i < j) overlaps += overlap;
      }
      of_overlap[numbers[i]] = gradient;

      const auto [distance, slope] = area_term(op.mode, area_of(boxes[i]) / part);
      areas += distance;
      add_area_derivative(boxes[i], slope * area_factor / part, of_area[numbers[i]]);
    }
    static_cast<Value*>(op.overlaps)[sample] = static_cast<Value>(overlaps / pairs);
    static_cast<Value*>(op.areas)[sample] = static_cast<Value>(areas / valid);
  }
}

void part_box_losses(const PartBoxLosses& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, part_boxes_of_samples<T>(op, begin, end, scratch));
}
void part_box_losses_backward(const LossGradient& op, int64_t begin, int64_t end, Scratch&) {
  FGVC_SWITCH_DTYPE(op.dtype, scale_gradients<T>(op, begin, end));
}

}  // namespace fgvc_ext::FGVC_ISA
