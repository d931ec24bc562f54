#include "../common/semantic_grouping_loss.h"

#include "dispatch.h"
#include "sums.h"

namespace fgvc_ext {

FGVC_KERNEL(semantic_grouping_directions, GroupingDirections)
FGVC_KERNEL(semantic_grouping_loss, GroupingCorrelations)
FGVC_KERNEL(semantic_grouping_loss_backward, GroupingGradient)

namespace {

std::tuple<Tensor, Tensor> semantic_grouping_loss(const Tensor& features, int64_t groups) {
  GroupingCall call = prepare_grouping(features, groups, /*channels_last=*/true);
  const Layout4& layout = call.normalise.layout;
  run_on_tiles(kernels::semantic_grouping_directions, call.normalise);
  const int64_t per_side = ceil_divide(layout.channels, kGroupingSquare), squares = per_side * (per_side + 1) / 2;
  Tensor losses = empty(features, {squares}, accumulation(features));
  call.compare.losses = losses.mutable_data_ptr();
  const GroupingCorrelations op{call.compare, layout.samples * layout.positions(), call.normalise.directions};
  run_on_rows(kernels::semantic_grouping_loss, op, squares, kGroupingSquare * (op.depth + kGroupingSquare));
  write_sum(losses, 1, call.loss, call.compare.factor);
  return {call.loss, call.residual};
}

Tensor semantic_grouping_loss_backward(const Tensor& grad, const Tensor& features, const Tensor& residual) {
  const GroupingBackwardCall call = prepare_grouping_backward(grad, features, residual, /*channels_last=*/false);
  const Layout4& layout = call.normalise.layout;
  run_on_tiles(kernels::semantic_grouping_directions, call.normalise);
  run_on_rows(kernels::semantic_grouping_loss_backward, call.gradient,
              layout.samples * ceil_divide(layout.channels, kGroupingSquare), layout.channels * layout.positions());
  return call.grad_features;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) {
  m.impl("semantic_grouping_loss", TORCH_BOX(&semantic_grouping_loss));
  m.impl("semantic_grouping_loss_backward", TORCH_BOX(&semantic_grouping_loss_backward));
}

}  // namespace fgvc_ext
