#include "../common/group_bilinear.h"

#include "dispatch.h"

namespace fgvc_ext {

FGVC_KERNEL(group_bilinear, GroupBilinear)
FGVC_KERNEL(group_bilinear_backward, GroupBilinearBackward)

namespace {

// Of a block: its products, in values that are moved.
int64_t work(const GroupBilinearInput& input, int64_t positions) {
  return (input.layout.channels + input.groups * input.responses() / 16) * positions;
}

Tensor group_bilinear(const Tensor& features, int64_t groups, const std::optional<Tensor>& position,
                      int64_t out_channels, double scale) {
  const GroupBilinearCall call = prepare_bilinear(features, groups, position, out_channels, scale);
  const PositionBlocks blocks = blocks_of(call.op);
  run_on_rows(kernels::group_bilinear, call.op, blocks.count(), work(call.op.input, blocks.at_once));
  return call.output;
}

Tensor group_bilinear_backward(const Tensor& grad, const Tensor& features, int64_t groups,
                               const std::optional<Tensor>& position, double scale) {
  const GroupBilinearBackwardCall call = prepare_bilinear_backward(grad, features, groups, position, scale);
  const PositionBlocks blocks = blocks_of(call.op);
  run_on_rows(kernels::group_bilinear_backward, call.op, blocks.count(), work(call.op.input, blocks.at_once));
  return call.grad_features;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) {
  m.impl("group_bilinear", TORCH_BOX(&group_bilinear));
  m.impl("group_bilinear_backward", TORCH_BOX(&group_bilinear_backward));
}

}  // namespace fgvc_ext
