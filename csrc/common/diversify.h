// Diversification block, subtle differences eq. 1–8: what its kernels take, and what both host sides check and
// allocate.
#pragma once

#include "tiles.h"

namespace fgvc_ext {

struct Diversify {
  Dtype dtype;
  Layout4 layout;
  const void* maps;
  const int64_t* seed;  // [] or [N]
  bool seed_per_sample;
  uint64_t peak_threshold, patch_threshold;  // a 32-bit word below this hides
  int64_t patch_size;                        // at most the longer side
  double alpha;
  void* scores;   // [N,C], dtype
  uint8_t* bits;  // [N,C,bytes_per_map]: bit y·W + x is set where suppressed

  FGVC_HOST_DEVICE int64_t bytes_per_map() const { return ceil_divide(layout.positions(), 8); }
  FGVC_HOST_DEVICE int64_t patch_columns() const { return ceil_divide(layout.width, patch_size); }
  FGVC_HOST_DEVICE int64_t patch_rows() const { return ceil_divide(layout.height, patch_size); }
};

// Gradients of diversify, spread over the maps by the bits.
struct SpreadGradient {
  Dtype dtype;
  Layout4 layout;       // of output
  const void* grad;     // [N,C], dtype
  const uint8_t* bits;  // [N,C,bytes_per_map]
  double alpha;
  void* output;  // [N,C,H,W], dtype
};

// The bits as a mask.
struct SpreadMask {
  Layout4 layout;  // of output
  const uint8_t* bits;
  void* output;  // [N,C,H,W], bool
};

}  // namespace fgvc_ext

#ifndef FGVC_KERNELS_ONLY
#include "checks.h"

namespace fgvc_ext {

// A call's results, what it reads, and the kernel's arguments, which point into both.
struct DiversifyCall {
  Tensor scores, bits, seed;
  Diversify op;
};

inline DiversifyCall prepare_diversify(const char* name, const Tensor& maps, const Tensor& seed, int64_t peak_threshold,
                                       int64_t patch_threshold, int64_t patch_size, double alpha) {
  const Checks check(name);
  const Layout4 layout = check.image("maps", maps);
  const int64_t longer_side = std::max(layout.height, layout.width);
  check.that(layout.height > 0 && layout.width > 0, "maps must have H and W of at least 1");
  check.that(patch_size >= 1, "patch_size must be at least 1, got ", patch_size);
  for (const int64_t threshold : {peak_threshold, patch_threshold})
    check.that(threshold >= 0 && threshold <= int64_t{1} << 32, "thresholds must be in [0, 2^32], got ", threshold);
  check.seed(seed, maps);
  const Tensor dense_seed = as_dense(seed);
  Tensor scores = empty(maps, {layout.samples, layout.channels});
  Tensor bits = empty(maps, {layout.samples, layout.channels, ceil_divide(layout.positions(), 8)}, ScalarType::Byte);
  const Diversify op{.dtype = dtype_of(maps),
                     .layout = layout,
                     .maps = maps.const_data_ptr(),
                     .seed = dense_seed.const_data_ptr<int64_t>(),
                     .seed_per_sample = seed.dim() == 1,
                     .peak_threshold = static_cast<uint64_t>(peak_threshold),
                     .patch_threshold = static_cast<uint64_t>(patch_threshold),
                     .patch_size = std::min(patch_size, longer_side),
                     .alpha = alpha,
                     .scores = scores.mutable_data_ptr(),
                     .bits = bits.mutable_data_ptr<uint8_t>()};
  return {scores, bits, dense_seed, op};
}

struct SpreadGradientCall {
  Tensor grad_maps, grad;
  SpreadGradient op;
};

inline SpreadGradientCall prepare_diversify_backward(const Tensor& grad, const Tensor& bits, double alpha,
                                                     const std::vector<int64_t>& size,
                                                     const std::vector<int64_t>& stride) {
  const Checks check("diversify_backward");
  check.floating("grad", grad, 2);
  check.size_and_stride(size, stride);
  check.that(size[0] == grad.size(0) && size[1] == grad.size(1), "size must begin with [", grad.size(0), ", ",
             grad.size(1), "], the size of grad");
  check.that(size[2] >= 1 && size[3] >= 1 && size[2] <= INT32_MAX / size[3],
             "size must have H and W of at least 1, and at most 2^31 - 1 positions");
  check.saved("bits", bits, grad, ScalarType::Byte, {size[0], size[1], ceil_divide(size[2] * size[3], 8)});
  const Tensor dense_grad = as_dense(grad);
  Tensor grad_maps = empty_strided(grad, size, stride);
  const SpreadGradient op{.dtype = dtype_of(grad),
                          .layout = check.image("grad_maps", grad_maps),
                          .grad = dense_grad.const_data_ptr(),
                          .bits = bits.const_data_ptr<uint8_t>(),
                          .alpha = alpha,
                          .output = grad_maps.mutable_data_ptr()};
  return {grad_maps, dense_grad, op};
}

struct SpreadMaskCall {
  Tensor mask;
  SpreadMask op;
};

inline SpreadMaskCall prepare_mask(const Tensor& maps, const Tensor& bits) {
  Tensor mask = dense_like(maps, ScalarType::Bool);
  const SpreadMask op{
      .layout = layout_of(mask), .bits = bits.const_data_ptr<uint8_t>(), .output = mask.mutable_data_ptr()};
  return {mask, op};
}

}  // namespace fgvc_ext
#endif
