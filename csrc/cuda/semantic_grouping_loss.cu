#include "semantic_grouping_loss.cuh"

#include <array>

#include "launch.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

// result = a b, by torch's library; of the given result, because autocast takes only what makes its own for half
// precision.
void multiply(const Tensor& a, const Tensor& b, Tensor& result) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(result)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}
Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// How many elements an access moves: 4 (float64: 2) where all maps allow that.
template <class T>
constexpr int kElements = sizeof(T) == 8 ? 2 : 4;
template <class T, class Function>
void with_chunks(bool aligned, Function function) {
  aligned ? function(Constant<kElements<T>>()) : function(Constant<1>());
}
template <class T>
bool is_aligned(const void* data, const Layout4& layout) {
  return chunk_size<T>(data, layout, kElements<T>) == kElements<T>;
}

template <class T>
void find_directions(const Launcher& on, const GroupingDirections& op) {
  using Value = Accumulation<T>;
  const Layout4 &layout = op.layout, &directions = op.directions_layout;
  with_index(fits_32_bits(layout) ? directions : layout, [&](auto index) {
    using Index = decltype(index);
    const Maps<Index> outputs(directions);
    if (channels_are_interleaved(layout)) {
      on.launch(directions_of_channels<T, Index>, ChannelGroups<Index>::blocks(layout), kGroupingThreads, 0, op,
                ChannelGroups<Index>(layout), outputs);
      return;
    }
    const bool aligned = is_aligned<T>(op.features, layout) && is_aligned<Value>(op.directions, directions);
    with_chunks<T>(aligned, [&](auto elements) {
      on.launch(directions_of_maps<T, elements(), Index>, ceil_divide(layout.maps(), kWarpsPerBlock), kGroupingThreads,
                0, op, Maps<Index>(layout), outputs);
    });
  });
}

template <class T>
void find_loss(const Launcher& on, GroupingResidual op, const Tensor& features, Tensor& loss) {
  using Value = Accumulation<T>;
  const int64_t blocks = ceil_divide(op.channels * op.channels, kResidualsPerBlock);
  Tensor losses = empty(features, {blocks}, accumulation(features));
  op.losses = losses.mutable_data_ptr();
  on.launch(grouping_residuals<Value>, blocks, kLossThreads, 0, op);
  on.launch(sum_losses<Value>, 1, kLossThreads, 0, Global<const Value>(op.losses), blocks, Value(1),
            Global<const Value>(nullptr), static_cast<Value>(op.factor), Global<Value>(loss.mutable_data_ptr()));
}

std::tuple<Tensor, Tensor> semantic_grouping_loss(const Tensor& features, int64_t groups) {
  const Launcher on(features);
  const bool channels_last = features.dim() == 4 && channels_are_interleaved(layout_of(features));
  GroupingCall call = prepare_grouping(features, groups, channels_last);
  FGVC_SWITCH_CUDA_DTYPE(call.normalise.dtype, find_directions<T>(on, call.normalise));
  const Tensor &z = call.directions, other = transposed(z);
  channels_last ? multiply(other, z, call.residual) : multiply(z, other, call.residual);
  FGVC_SWITCH_CUDA_DTYPE(call.normalise.dtype, find_loss<T>(on, call.compare, features, call.loss));
  return {call.loss, call.residual};
}

template <class T>
void find_gradient(const Launcher& on, const GroupingGradient& op) {
  using Value = Accumulation<T>;
  const Layout4 &directions = op.directions_layout, &output = op.grad_layout;
  with_index(fits_32_bits(directions) ? output : directions, [&](auto index) {
    using Index = decltype(index);
    const Maps<Index> outputs(output);
    if (channels_are_interleaved(directions) && channels_are_interleaved(output)) {
      on.launch(grouping_channel_gradients<T, Index>, ChannelGroups<Index>::blocks(directions), kGroupingThreads, 0, op,
                ChannelGroups<Index>(directions), outputs);
      return;
    }
    const bool aligned = is_aligned<Value>(op.directions, directions) && is_aligned<Value>(op.products, directions) &&
                         is_aligned<T>(op.grad_features, output);
    with_chunks<T>(aligned, [&](auto elements) {
      on.launch(grouping_map_gradients<T, elements(), Index>, ceil_divide(output.maps(), kWarpsPerBlock),
                kGroupingThreads, 0, op, Maps<Index>(directions), outputs);
    });
  });
}

Tensor semantic_grouping_loss_backward(const Tensor& grad, const Tensor& features, const Tensor& residual) {
  const Launcher on(features);
  const bool channels_last = features.dim() == 4 && channels_are_interleaved(layout_of(features));
  GroupingBackwardCall call = prepare_grouping_backward(grad, features, residual, channels_last);
  FGVC_SWITCH_CUDA_DTYPE(call.normalise.dtype, find_directions<T>(on, call.normalise));
  const Tensor& z = call.directions;
  const auto size = z.sizes();
  Tensor products = empty(features, {size.begin(), size.end()}, accumulation(features));
  channels_last ? multiply(z, residual, products) : multiply(residual, z, products);
  call.gradient.products = products.const_data_ptr();
  FGVC_SWITCH_CUDA_DTYPE(call.gradient.dtype, find_gradient<T>(on, call.gradient));
  return call.grad_features;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("semantic_grouping_loss", TORCH_BOX(&semantic_grouping_loss));
  m.impl("semantic_grouping_loss_backward", TORCH_BOX(&semantic_grouping_loss_backward));
}

}  // namespace fgvc_ext
