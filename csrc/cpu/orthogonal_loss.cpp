#include "../common/orthogonal_loss.h"

#include "dispatch.h"
#include "sums.h"

namespace fgvc_ext {

FGVC_KERNEL(orthogonal_loss, OrthogonalLoss)
FGVC_KERNEL(orthogonal_loss_backward, LossGradient)

namespace {

std::tuple<Tensor, Tensor> orthogonal_loss(const Tensor& student_map, const Tensor& teacher_maps) {
  OrthogonalLossCall call = prepare_orthogonal_loss(student_map, teacher_maps);
  const OrthogonalLoss& op = call.op;
  run_on_rows(kernels::orthogonal_loss, op, op.samples, op.positions * (op.teachers + 1) * 8);
  write_sum(call.losses, 1, call.loss);
  return {call.loss, call.gradient};
}

Tensor orthogonal_loss_backward(const Tensor& grad, const Tensor& gradient, ScalarType dtype) {
  const LossGradientCall call = prepare_loss_gradient("orthogonal_loss_backward", {grad}, gradient, dtype);
  run_on_rows(kernels::orthogonal_loss_backward, call.op, call.op.values, 1);
  return call.output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) {
  m.impl("orthogonal_loss", TORCH_BOX(&orthogonal_loss));
  m.impl("orthogonal_loss_backward", TORCH_BOX(&orthogonal_loss_backward));
}

}  // namespace fgvc_ext
