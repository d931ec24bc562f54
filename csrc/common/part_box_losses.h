// Losses of part proposals, dual attention fusion section 3.7.2: what the kernels take, and what both host sides check
// and allocate.
#pragma once

#include "loss_gradient.h"

namespace fgvc_ext {

enum class AreaMode { two_sided, hinge, log };  // |r − 1|, max(r − 1, 0), |log r|

struct PartBoxLosses {
  Dtype dtype;
  int64_t samples, boxes_per_sample;
  int64_t stride[3];         // of boxes
  const void* boxes;         // [N,M,4] x1, y1, x2, y2
  const uint8_t* valid;      // [N,M]
  const void* object_areas;  // [N], accumulation type
  double iou_weight, parts, min_area;
  AreaMode mode;
  bool detach_denominator;
  // Accumulation type:
  void *overlaps, *areas;  // [N]: the sample's mean over its pairs, without the weight, and over its boxes
  void* gradients;         // [2,N,M,4]: of both losses
};

}  // namespace fgvc_ext

#ifndef FGVC_KERNELS_ONLY
#include "checks.h"

namespace fgvc_ext {

// A call's results, what it reads and works in, and the kernel's arguments, which point into them.
struct PartBoxLossesCall {
  Tensor overlap, area, gradients, overlaps, areas, valid, object_areas;
  PartBoxLosses op;
};

inline PartBoxLossesCall prepare_part_box_losses(const Tensor& boxes, const Tensor& valid, const Tensor& object_area,
                                                 double iou_weight, int64_t parts, double min_area, int64_t area_mode,
                                                 bool detach_denominator) {
  const Checks check("part_box_losses");
  check.floating("boxes", boxes, 3);
  const int64_t samples = boxes.size(0), number = boxes.size(1);
  check.that(boxes.size(2) == 4, "boxes must have 4 numbers a box, got ", boxes.size(2));
  check.input("valid", valid, boxes, ScalarType::Bool, {samples, number});
  check.beside("object_area", object_area, boxes, {samples});
  check.that(parts >= 1, "parts must be at least 1, got ", parts);
  check.that(area_mode >= 0 && area_mode <= 2, "area_mode must be 0, 1 or 2, got ", area_mode);
  const ScalarType dtype = accumulation(boxes);
  const Tensor dense_valid = as_dense(valid), wide_areas = *as_accumulation(object_area, boxes);
  Tensor overlap = empty(boxes, {}, dtype), area = empty(boxes, {}, dtype);
  Tensor overlaps = empty(boxes, {samples}, dtype), areas = empty(boxes, {samples}, dtype);
  Tensor gradients = empty(boxes, {2, samples, number, 4}, dtype);
  const PartBoxLosses op{.dtype = dtype_of(boxes),
                         .samples = samples,
                         .boxes_per_sample = number,
                         .stride = {boxes.stride(0), boxes.stride(1), boxes.stride(2)},
                         .boxes = boxes.const_data_ptr(),
                         .valid = static_cast<const uint8_t*>(dense_valid.const_data_ptr()),
                         .object_areas = wide_areas.const_data_ptr(),
                         .iou_weight = iou_weight,
                         .parts = static_cast<double>(parts),
                         .min_area = min_area,
                         .mode = static_cast<AreaMode>(area_mode),
                         .detach_denominator = detach_denominator,
                         .overlaps = overlaps.mutable_data_ptr(),
                         .areas = areas.mutable_data_ptr(),
                         .gradients = gradients.mutable_data_ptr()};
  return {overlap, area, gradients, overlaps, areas, dense_valid, wide_areas, op};
}

}  // namespace fgvc_ext
#endif
