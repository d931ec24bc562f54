#include "diversify.cuh"

#include "launch.cuh"
#include "spread_bits.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

// Whether `maps` maps of a block fit into its shared memory, and their draws into 16 bits.
bool fits_shared(const Patches& patches, int64_t positions, int64_t maps) {
  return positions <= kSharedBytes && patches.draws <= UINT16_MAX && maps * patches.calls <= kSharedBytes &&
         DiversifyShared(patches, static_cast<uint32_t>(positions), static_cast<uint32_t>(maps)).bits <= kSharedBytes;
}

template <class T>
void suppress(const Launcher& on, const Diversify& op) {
  const Layout4& layout = op.layout;
  const Patches patches(op);
  const auto shared = [&](int64_t maps) {
    return DiversifyShared(patches, static_cast<uint32_t>(layout.positions()), static_cast<uint32_t>(maps)).bits;
  };
  with_index(layout, [&](auto index) {
    using Index = decltype(index);
    if (channels_are_interleaved(layout) && fits_shared(patches, layout.positions(), kWarp)) {
      on.launch(suppress_channels<T, Index>, ChannelGroups<Index>::blocks(layout), kDiversifyThreads, shared(kWarp), op,
                patches, ChannelGroups<Index>(layout));
    } else if (fits_shared(patches, layout.positions(), kWarpsPerBlock)) {
      with_elements<T>(chunk_size<T>(op.maps, layout), [&](auto elements) {
        on.launch(suppress_and_pool<T, elements(), Index>, ceil_divide(layout.maps(), kWarpsPerBlock),
                  kDiversifyThreads, shared(kWarpsPerBlock), op, patches, Maps<Index>(layout));
      });
    } else {
      const int64_t bytes = int64_t{patches.calls} * 4;
      on.launch(suppress_large<T, Index>, layout.maps(), kDiversifyThreads, bytes <= kSharedBytes ? bytes : 0, op,
                patches, Maps<Index>(layout), bytes <= kSharedBytes);
    }
  });
}

template <class T, class Op>
void spread(const Launcher& on, const Op& op) {
  const Layout4& layout = op.layout;
  const int64_t shared = kWarp * ceil_divide(layout.positions(), kBitsPerByte);
  with_index(layout, [&](auto index) {
    using Index = decltype(index);
    if (channels_are_interleaved(layout) && shared <= kSharedBytes) {
      on.launch(spread_channels<T, Op, Index>, ChannelGroups<Index>::blocks(layout), kSpreadThreads, shared, op,
                ChannelGroups<Index>(layout));
      return;
    }
    const auto with_chunks = [&](auto elements) {
      const int64_t chunks = ceil_divide(layout.positions(), elements());
      on.launch(spread_maps<T, Op, elements(), Index>, ceil_divide(layout.maps() * chunks, kSpreadThreads),
                kSpreadThreads, 0, op, Maps<Index>(layout), Divisor<Index>(chunks));
    };
    const int elements = chunk_size<T>(op.output, layout, kBitsPerByte);
    if constexpr (sizeof(T) == 1) {
      elements == 8 ? with_chunks(Constant<8>()) : with_chunks(Constant<1>());
    } else {
      with_elements<T>(elements, with_chunks);
    }
  });
}

std::tuple<Tensor, Tensor> diversify(const Tensor& maps, const Tensor& seed, int64_t peak_threshold,
                                     int64_t patch_threshold, int64_t patch_size, double alpha) {
  const Launcher on(maps);
  const DiversifyCall call =
      prepare_diversify("diversify", maps, seed, peak_threshold, patch_threshold, patch_size, alpha);
  FGVC_SWITCH_CUDA_DTYPE(call.op.dtype, suppress<T>(on, call.op));
  return {call.scores, call.bits};
}

Tensor diversify_backward(const Tensor& grad, const Tensor& bits, double alpha, std::vector<int64_t> size,
                          std::vector<int64_t> stride) {
  const Launcher on(grad);
  const SpreadGradientCall call = prepare_diversify_backward(grad, bits, alpha, size, stride);
  FGVC_SWITCH_CUDA_DTYPE(call.op.dtype, spread<T>(on, call.op));
  return call.grad_maps;
}

Tensor suppression_mask(const Tensor& maps, const Tensor& seed, int64_t peak_threshold, int64_t patch_threshold,
                        int64_t patch_size) {
  const Launcher on(maps);
  const DiversifyCall drawn =
      prepare_diversify("suppression_mask", maps, seed, peak_threshold, patch_threshold, patch_size, 1.);
  FGVC_SWITCH_CUDA_DTYPE(drawn.op.dtype, suppress<T>(on, drawn.op));
  const SpreadMaskCall call = prepare_mask(maps, drawn.bits);
  spread<uint8_t>(on, call.op);
  return call.mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("diversify", TORCH_BOX(&diversify));
  m.impl("diversify_backward", TORCH_BOX(&diversify_backward));
  m.impl("suppression_mask", TORCH_BOX(&suppression_mask));
}

}  // namespace fgvc_ext
