#include "group_bilinear.cuh"

#include "group_bilinear_interleaved.cuh"
#include "launch.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

// A lane's neighbouring positions: 8 bytes of them where all maps allow that, else one.
template <class T>
constexpr int kElements = 8 / static_cast<int>(sizeof(T));

template <class T, class Function>
void with_positions(bool aligned, Function function) {
  if constexpr (kElements<T> > 1)
    if (aligned) return function(Constant<kElements<T>>());
  function(Constant<1>());
}
template <class T>
bool is_aligned(const void* data, const Layout4& layout) {
  return kElements<T> > 1 && chunk_size<T>(data, layout, kElements<T>) == kElements<T>;
}

int64_t pieces_of(const Layout4& layout, int elements) { return ceil_divide(layout.positions(), kWarp * elements); }

template <class Function>
void with_common_index(std::initializer_list<Layout4> layouts, Function function) {
  const bool narrow = std::all_of(layouts.begin(), layouts.end(), fits_32_bits);
  narrow ? function(uint32_t{}) : function(uint64_t{});
}

template <class T>
void pool(const Launcher& on, const GroupBilinear& op) {
  using Value = Accumulation<T>;
  const GroupBilinearInput& input = op.input;
  const Layout4 &layout = input.layout, &output = op.output_layout;
  const DeviceResize resize(op.resize);
  with_common_index({layout, output}, [&](auto index) {
    using Index = decltype(index);
    const Maps<Index> maps(layout), outputs(output);
    const int64_t channels = layout.channels * static_cast<int64_t>(sizeof(Value));
    if (channels_are_interleaved(layout) && channels <= kSharedBytes) {
      on.launch(pool_interleaved<T, Index>, layout.samples * layout.positions(), kBilinearThreads, channels, op, maps,
                outputs, resize, Divisor<uint32_t>(layout.positions()));
      return;
    }
    with_positions<T>(is_aligned<T>(input.features, layout) && is_aligned<T>(op.output, output), [&](auto elements) {
      const int64_t pieces = pieces_of(layout, elements()), p = input.per_group;
      const int64_t windows = ceil_divide(p, kWindowRows) * ceil_divide(p, kWindowColumns<elements()>);
      const size_t shared =
          kWindowWarps * kWindowRows * kWindowColumns<elements()> * kWarp * elements() * sizeof(Value);
      on.launch(pool_positions<T, elements(), Index>,
                Blocks(layout.samples * pieces, ceil_divide(windows, kWindowWarps)), kWindowThreads, shared, op, maps,
                outputs, resize, Divisor<uint32_t>(pieces));
    });
  });
}

Tensor group_bilinear(const Tensor& features, int64_t groups, const std::optional<Tensor>& position,
                      int64_t out_channels, double scale) {
  const Launcher on(features);
  const GroupBilinearCall call = prepare_bilinear(features, groups, position, out_channels, scale);
  FGVC_SWITCH_CUDA_DTYPE(call.op.input.dtype, pool<T>(on, call.op));
  return call.output;
}

template <class T>
void gradient(const Launcher& on, const GroupBilinearBackward& op) {
  using Value = Accumulation<T>;
  const GroupBilinearInput& input = op.input;
  const Layout4 &layout = input.layout, &grad = op.grad_layout, &output = op.grad_features_layout;
  const DeviceResize resize(op.resize);
  with_common_index({layout, grad, output}, [&](auto index) {
    using Index = decltype(index);
    const Maps<Index> maps(layout), grads(grad), outputs(output);
    const int64_t values = layout.channels + op.resize.channels + input.responses();
    const int64_t bytes = values * static_cast<int64_t>(sizeof(Value));
    if (channels_are_interleaved(layout) && bytes <= kSharedBytes) {
      on.launch(gradient_of_interleaved<T, Index>, layout.samples * layout.positions(), kBilinearThreads, bytes, op,
                maps, grads, outputs, resize, Divisor<uint32_t>(layout.positions()));
      return;
    }
    const bool aligned = is_aligned<T>(input.features, layout) && is_aligned<T>(op.grad, grad) &&
                         is_aligned<T>(op.grad_features, output);
    with_positions<T>(aligned, [&](auto elements) {
      const int64_t pieces = pieces_of(layout, elements()), row_blocks = ceil_divide(input.per_group, kWindowRows);
      const size_t shared = kSlopes * kWarp * elements() * sizeof(Value);
      on.launch(gradient_of_positions<T, elements(), Index>,
                Blocks(layout.samples * pieces, row_blocks * ceil_divide(input.groups, kGroupsPerBlock)),
                kWindowThreads, shared, op, maps, grads, outputs, resize, Divisor<uint32_t>(pieces));
    });
  });
}

Tensor group_bilinear_backward(const Tensor& grad, const Tensor& features, int64_t groups,
                               const std::optional<Tensor>& position, double scale) {
  const Launcher on(features);
  const GroupBilinearBackwardCall call = prepare_bilinear_backward(grad, features, groups, position, scale);
  FGVC_SWITCH_CUDA_DTYPE(call.op.input.dtype, gradient<T>(on, call.op));
  return call.grad_features;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("group_bilinear", TORCH_BOX(&group_bilinear));
  m.impl("group_bilinear_backward", TORCH_BOX(&group_bilinear_backward));
}

}  // namespace fgvc_ext
