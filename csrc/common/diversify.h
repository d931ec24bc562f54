// What the host sides of the diversification block share, CPU and CUDA.
#pragma once

#include "arguments.h"
#include "tensor.h"

namespace fgvc_ext {

// A call's results, what it reads, and the kernel's arguments, which point into both.
struct DiversifyCall {
  Tensor scores, bits, seed;
  Diversify op;
};

inline DiversifyCall prepare_diversify(const Tensor& maps, const Tensor& seed, int64_t peak_threshold,
                                       int64_t patch_threshold, int64_t patch_size, double alpha) {
  const Layout4 layout = layout_of(maps);
  STD_TORCH_CHECK(layout.height > 0 && layout.width > 0, "maps must have H and W of at least 1");
  STD_TORCH_CHECK(patch_size >= 1, "patch_size must be at least 1, got ", patch_size);
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && (seed.dim() == 0 || seed.numel() == layout.samples),
                  "seed must be int64 [] or [", layout.samples, "]");
  Tensor scores = empty(maps, {layout.samples, layout.channels});
  Tensor bits = empty(maps, {layout.samples, layout.channels, (layout.positions() + 7) / 8}, ScalarType::Byte);
  const Tensor dense_seed = as_dense(seed);
  const Diversify op{dtype_of(maps),
                     layout,
                     maps.const_data_ptr(),
                     dense_seed.const_data_ptr<int64_t>(),
                     seed.dim() == 1,
                     static_cast<uint64_t>(peak_threshold),
                     static_cast<uint64_t>(patch_threshold),
                     patch_size,
                     alpha,
                     scores.mutable_data_ptr(),
                     bits.mutable_data_ptr<uint8_t>()};
  return {scores, bits, dense_seed, op};
}

// `grad` is dense; the bits must be of these maps.
inline SpreadBits gradient_arguments(const Tensor& grad, const Tensor& bits, double alpha, Tensor& maps) {
  const Layout4 layout = layout_of(maps);
  STD_TORCH_CHECK(grad.numel() == layout.maps() && bits.numel() == layout.maps() * ((layout.positions() + 7) / 8),
                  "grad and bits must be of ", layout.maps(), " maps of ", layout.positions(), " positions");
  return {dtype_of(grad),         layout, grad.const_data_ptr(), bits.const_data_ptr<uint8_t>(), alpha,
          maps.mutable_data_ptr()};
}
inline SpreadBits mask_arguments(const Tensor& bits, Tensor& mask) {
  return {Dtype::float32, layout_of(mask), nullptr, bits.const_data_ptr<uint8_t>(), 0., mask.mutable_data_ptr()};
}

}  // namespace fgvc_ext
