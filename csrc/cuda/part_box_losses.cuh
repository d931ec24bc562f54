// Losses of part proposals, dual attention fusion section 3.7.2: one warp per image, one lane per box.
#pragma once

#include "../common/part_boxes.h"
#include "loss_gradient.cuh"

namespace fgvc_ext::cuda {

constexpr int kPartBoxThreads = kWarpsPerBlock * kWarp;

template <class T>
__device__ PartBox<Accumulation<T>> part_box_at(const PartBoxLosses& op, int64_t sample, int64_t number) {
  const auto box = Global<const T>(op.boxes).from(sample * op.stride[0] + number * op.stride[1]);
  const int64_t step = op.stride[2];
  return {widen(box.load(0)), widen(box.load(step)), widen(box.load(2 * step)), widen(box.load(3 * step))};
}

template <class Value>
__device__ void store_part_box(const Global<Value>& boxes, int64_t number, const PartBox<Value>& box) {
  const auto to = boxes.from(number * 4);
  to.store(0, box.x1);
  to.store(1, box.y1);
  to.store(2, box.x2);
  to.store(3, box.y2);
}

template <class T>
__global__ void __launch_bounds__(kPartBoxThreads) part_boxes_of_sample(PartBoxLosses op) {
  using Value = Accumulation<T>;
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp_index();
  if (sample >= op.samples) return;
  const int64_t first = sample * op.boxes_per_sample;
  const auto valid = Global<const uint8_t>(op.valid).from(first);
  unsigned count = 0;
  for (int64_t i = lane_index(); i < op.boxes_per_sample; i += kWarp) count += valid.load(i) != 0;
  count = warp_reduce(count, Sum());

  const double boxes = count < 1 ? 1 : count, pairs = count < 2 ? 1 : boxes * (boxes - 1) / 2;
  const double samples = static_cast<double>(op.samples);
  const Value overlap_factor = static_cast<Value>(op.iou_weight / pairs / samples);
  const Value area_factor = static_cast<Value>(1 / boxes / samples);
  const Value part = part_area(Global<const Value>(op.object_areas).load(sample), static_cast<Value>(op.parts),
                               static_cast<Value>(op.min_area));
  double overlaps = 0, areas = 0;
  for (int64_t i = lane_index(); i < op.boxes_per_sample; i += kWarp) {
    PartBox<Value> of_overlap{}, of_area{};
    if (valid.load(i)) {
      const auto box = part_box_at<T>(op, sample, i);
      for (int64_t j = 0; j < op.boxes_per_sample; ++j) {
        if (i == j || !valid.load(j)) continue;
        const Value overlap =
            overlap_of(box, part_box_at<T>(op, sample, j), overlap_factor, op.detach_denominator, of_overlap);
        if (i < j) overlaps += overlap;
      }
      const auto term = area_term(op.mode, area_of(box) / part);
      areas += term.distance;
      add_area_derivative(box, term.slope * area_factor / part, of_area);
    }
    const Global<Value> gradients(op.gradients);
    store_part_box(gradients, first + i, of_overlap);
    store_part_box(gradients, first + i + op.samples * op.boxes_per_sample, of_area);
  }
  overlaps = warp_reduce(overlaps, Sum());
  areas = warp_reduce(areas, Sum());
  if (lane_index() != 0) return;
  Global<Value>(op.overlaps).store(sample, static_cast<Value>(overlaps / pairs));
  Global<Value>(op.areas).store(sample, static_cast<Value>(areas / boxes));
}

}  // namespace fgvc_ext::cuda
