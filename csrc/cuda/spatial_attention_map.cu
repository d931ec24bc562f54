#include "spatial_attention_map.cuh"

#include "launch.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

template <class T>
void weigh(const Launcher& on, const SpatialAttentionMap& op, const Tensor& features) {
  using Value = Accumulation<T>;
  const Layout4& layout = op.layout;
  const int64_t positions = layout.positions(), blocks = layout.samples * op.groups;
  const int64_t of_channels = positions * sizeof(Value), of_maps = kWarpsPerBlock * of_channels;
  with_index(layout, [&](auto index) {
    using Index = decltype(index);
    const Maps<Index> maps(layout);
    if (channels_are_interleaved(layout) && of_channels <= kSharedBytes) {
      on.launch(weigh_channels<T, Index>, blocks, kAttentionThreads, of_channels, op, maps);
      return;
    }
    if (positions <= kMoreValues * kWarp && of_maps <= kSharedBytes) {
      with_elements<T>(chunk_size<T>(op.features, layout), [&](auto elements) {
        const auto kernel = positions <= kFewValues * kWarp ? weigh_maps<T, kFewValues, elements(), Index>
                                                            : weigh_maps<T, kMoreValues, elements(), Index>;
        on.launch(kernel, blocks, kAttentionThreads, of_maps, op, maps);
      });
      return;
    }
    Tensor means = empty(features, {layout.samples, layout.channels}, accumulation(features));
    on.launch(channel_means<T, Index>, layout.maps(), kAttentionThreads, 0, Global<const T>(op.features), maps,
              Global<Value>(means.mutable_data_ptr()));
    on.launch(weigh_positions<T, Index>, Blocks(blocks, ceil_divide(positions, kAttentionThreads)), kAttentionThreads,
              0, op, maps, Global<const Value>(means.const_data_ptr()));
  });
  on.launch(attention_totals<T>, ceil_divide(layout.samples * positions, kAttentionThreads), kAttentionThreads, 0, op,
            positions);
}

Tensor spatial_attention_map(const Tensor& features) {
  const Launcher on(features);
  const SpatialAttentionMapCall call = prepare_attention(features, kChannelsPerGroup);
  FGVC_SWITCH_CUDA_DTYPE(call.op.dtype, weigh<T>(on, call.op, features));
  return call.map;
}

template <class T>
void gradient(const Launcher& on, const SpatialAttentionMapBackward& op) {
  const Layout4 &layout = op.layout, &grad_layout = op.grad_layout;
  // 32 bits number the elements of both, or of neither.
  with_index(fits_32_bits(layout) ? grad_layout : layout, [&](auto index) {
    using Index = decltype(index);
    const Maps<Index> maps(layout), grad_maps(grad_layout);
    if (channels_are_interleaved(layout) && channels_are_interleaved(grad_layout)) {
      on.launch(gradient_of_channels<T, Index>, ChannelGroups<Index>::blocks(layout), kAttentionThreads, 0, op,
                ChannelGroups<Index>(layout), grad_maps);
      return;
    }
    const int elements = std::min({chunk_size<T>(op.features, layout), chunk_size<T>(op.grad_features, grad_layout),
                                   chunk_size<T>(op.grad, grad_layout)});
    with_elements<T>(elements, [&](auto elements) {
      on.launch(gradient_of_maps<T, elements(), Index>, ceil_divide(layout.maps(), kWarpsPerBlock), kAttentionThreads,
                0, op, maps, grad_maps);
    });
  });
}

Tensor spatial_attention_map_backward(const Tensor& grad, const Tensor& features) {
  const Launcher on(features);
  const SpatialAttentionMapBackwardCall call = prepare_attention_backward(grad, features, kChannelsPerGroup);
  FGVC_SWITCH_CUDA_DTYPE(call.op.dtype, gradient<T>(on, call.op));
  return call.grad_features;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("spatial_attention_map", TORCH_BOX(&spatial_attention_map));
  m.impl("spatial_attention_map_backward", TORCH_BOX(&spatial_attention_map_backward));
}

}  // namespace fgvc_ext
