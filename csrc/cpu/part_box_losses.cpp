#include "../common/part_box_losses.h"

#include "dispatch.h"
#include "sums.h"

namespace fgvc_ext {

FGVC_KERNEL(part_box_losses, PartBoxLosses)
FGVC_KERNEL(part_box_losses_backward, LossGradient)

namespace {

std::tuple<Tensor, Tensor, Tensor> part_box_losses(const Tensor& boxes, const Tensor& valid, const Tensor& object_area,
                                                   double iou_weight, int64_t parts, double min_area, int64_t area_mode,
                                                   bool detach_denominator) {
  PartBoxLossesCall call =
      prepare_part_box_losses(boxes, valid, object_area, iou_weight, parts, min_area, area_mode, detach_denominator);
  const PartBoxLosses& op = call.op;
  run_on_rows(kernels::part_box_losses, op, op.samples, op.boxes_per_sample * op.boxes_per_sample * 16);
  const double samples = static_cast<double>(op.samples);
  write_sum(call.overlaps, samples, call.overlap, iou_weight);
  write_sum(call.areas, samples, call.area);
  return {call.overlap, call.area, call.gradients};
}

Tensor part_box_losses_backward(const std::optional<Tensor>& grad_overlap, const std::optional<Tensor>& grad_area,
                                const Tensor& gradients, ScalarType dtype) {
  const LossGradientCall call =
      prepare_loss_gradient("part_box_losses_backward", {grad_overlap, grad_area}, gradients, dtype);
  run_on_rows(kernels::part_box_losses_backward, call.op, call.op.values, 1);
  return call.output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) {
  m.impl("part_box_losses", TORCH_BOX(&part_box_losses));
  m.impl("part_box_losses_backward", TORCH_BOX(&part_box_losses_backward));
}

}  // namespace fgvc_ext
