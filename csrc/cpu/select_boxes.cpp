#include "../common/select_boxes.h"

#include "dispatch.h"

namespace fgvc_ext {

FGVC_KERNEL(select_boxes, SelectBoxes)

namespace {

std::tuple<Tensor, Tensor> select_boxes(const Tensor& scores, const Tensor& boxes, const Tensor& candidates,
                                        double iou_threshold, int64_t top) {
  const SelectBoxesCall call = prepare_select_boxes(scores, boxes, candidates, iou_threshold, top);
  run_on_rows(kernels::select_boxes, call.op, call.op.samples, call.op.boxes_per_sample * call.op.top);
  return {call.indices, call.valid};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) { m.impl("select_boxes", TORCH_BOX(&select_boxes)); }

}  // namespace fgvc_ext
