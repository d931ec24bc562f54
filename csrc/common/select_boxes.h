// Greedy non-maximum suppression with a fixed number of results, dual attention fusion section 3.3: what the kernels
// take, and what both host sides check and allocate.
#pragma once

#include "tiles.h"

namespace fgvc_ext {

struct SelectBoxes {
  Dtype dtype, boxes_dtype;  // of scores; of boxes: the same, or the accumulation type
  int64_t samples, boxes_per_sample, top;
  int64_t score_stride[2], box_stride[3], candidate_stride[2];
  const void* scores;         // [N,A]
  const void* boxes;          // [N,A,4] x1, y1, x2, y2
  const uint8_t* candidates;  // [N,A]
  double threshold;
  int64_t* indices;  // [N,top]
  uint8_t* valid;    // [N,top]
};

}  // namespace fgvc_ext

#ifndef FGVC_KERNELS_ONLY
#include "checks.h"

namespace fgvc_ext {

struct SelectBoxesCall {
  Tensor indices, valid;
  SelectBoxes op;
};

inline SelectBoxesCall prepare_select_boxes(const Tensor& scores, const Tensor& boxes, const Tensor& candidates,
                                            double threshold, int64_t top) {
  const Checks check("select_boxes");
  check.floating("scores", scores, 2);
  const int64_t samples = scores.size(0), number = scores.size(1);
  check.beside("boxes", boxes, scores, {samples, number, 4});
  check.input("candidates", candidates, scores, ScalarType::Bool, {samples, number});
  check.that(number <= INT32_MAX, "scores must have at most 2^31 - 1 boxes an image");
  check.that(top >= 1 && top <= number, "top must be at least 1 and at most the number of boxes, ", number, ", got ",
             top);
  Tensor indices = empty(scores, {samples, top}, ScalarType::Long);
  Tensor valid = empty(scores, {samples, top}, ScalarType::Bool);
  const SelectBoxes op{.dtype = dtype_of(scores),
                       .boxes_dtype = dtype_of(boxes),
                       .samples = samples,
                       .boxes_per_sample = number,
                       .top = top,
                       .score_stride = {scores.stride(0), scores.stride(1)},
                       .box_stride = {boxes.stride(0), boxes.stride(1), boxes.stride(2)},
                       .candidate_stride = {candidates.stride(0), candidates.stride(1)},
                       .scores = scores.const_data_ptr(),
                       .boxes = boxes.const_data_ptr(),
                       .candidates = static_cast<const uint8_t*>(candidates.const_data_ptr()),
                       .threshold = threshold,
                       .indices = indices.mutable_data_ptr<int64_t>(),
                       .valid = static_cast<uint8_t*>(valid.mutable_data_ptr())};
  return {indices, valid, op};
}

}  // namespace fgvc_ext
#endif
