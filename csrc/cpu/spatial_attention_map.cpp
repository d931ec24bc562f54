#include "../common/spatial_attention_map.h"

#include "dispatch.h"

namespace fgvc_ext {

FGVC_KERNEL(spatial_attention_map, SpatialAttentionMap)
FGVC_KERNEL(spatial_attention_map_total, SpatialAttentionMap)
FGVC_KERNEL(spatial_attention_map_backward, SpatialAttentionMapBackward)

namespace {

// In channels_last these are the channels that are read side by side: half a kilobyte of float32.
constexpr int64_t kChannelsPerGroup = 128;

Tensor spatial_attention_map(const Tensor& features) {
  const SpatialAttentionMapCall call = prepare_attention(features, kChannelsPerGroup);
  const SpatialAttentionMap& op = call.op;
  const int64_t samples = op.layout.samples, positions = op.layout.positions();
  run_on_rows(kernels::spatial_attention_map, op, samples * op.groups, kChannelsPerGroup * positions);
  run_on_rows(kernels::spatial_attention_map_total, op, samples, op.groups * positions);
  return call.map;
}

Tensor spatial_attention_map_backward(const Tensor& grad, const Tensor& features) {
  const SpatialAttentionMapBackwardCall call = prepare_attention_backward(grad, features, kChannelsPerGroup);
  const SpatialAttentionMapBackward& op = call.op;
  run_on_rows(kernels::spatial_attention_map_backward, op, op.layout.samples * op.groups,
              kChannelsPerGroup * op.layout.positions());
  return call.grad_features;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) {
  m.impl("spatial_attention_map", TORCH_BOX(&spatial_attention_map));
  m.impl("spatial_attention_map_backward", TORCH_BOX(&spatial_attention_map_backward));
}

}  // namespace fgvc_ext
