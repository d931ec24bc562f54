// Global k-max pooling, ELoPE eq. 2–4: what its kernels take, and what both host sides check and allocate.
#pragma once

#include "tiles.h"

namespace fgvc_ext {

constexpr int64_t kInt16Positions = 32768;  // of a map that int16 indices can name

struct GlobalKMaxPool {
  Dtype dtype;
  Layout4 layout;
  int64_t k;
  const void* features;
  const void* weight;  // [k], accumulation type, or null
  void* output;        // [N,C], dtype
  void* indices;       // [N,C,k], int16 or int32
  bool narrow_indices;
  void* values;  // [N,C,k], accumulation type, or null
};

struct GlobalKMaxPoolBackward {
  Dtype dtype;
  Layout4 layout;  // of grad_features
  int64_t k;
  const void* grad;     // [N,C], dtype
  const void* indices;  // [N,C,k]; those outside the map are passed over
  bool narrow_indices;
  const void* weight;  // [k], accumulation type, or null
  void* grad_features;
};

// Σ grad · S_r / k over chunks of maps, for every rank r.
struct GlobalKMaxPoolWeightGrad {
  Dtype dtype;
  int64_t k, maps, maps_per_chunk;
  const void* grad;    // [maps], dtype
  const void* values;  // [maps,k], accumulation type
  void* sums;          // [chunks,k], double on the CPU, accumulation type on CUDA
};

}  // namespace fgvc_ext

#ifndef FGVC_KERNELS_ONLY
#include "checks.h"

namespace fgvc_ext {

// A call's results, what it reads, and the kernel's arguments, which point into both.
struct GlobalKMaxPoolCall {
  Tensor output, indices, values;
  std::optional<Tensor> weight;
  GlobalKMaxPool op;
};

inline GlobalKMaxPoolCall prepare_pool(const Tensor& features, int64_t k, const std::optional<Tensor>& weight,
                                       bool keep_values, bool wide_indices) {
  const Checks check("global_k_max_pool");
  const Layout4 layout = check.image("features", features);
  check.that(k >= 1 && k <= layout.positions(), "k must be in [1, H*W = ", layout.positions(), "], got ", k);
  check.that(wide_indices || layout.positions() <= kInt16Positions, "maps of ", layout.positions(),
             " positions need wide indices");
  if (weight) check.beside("weight", *weight, features, {k});
  const int64_t n = layout.samples, c = layout.channels;
  Tensor output = empty(features, {n, c});
  Tensor indices = empty(features, {n, c, k}, wide_indices ? ScalarType::Int : ScalarType::Short);
  Tensor values = empty(features, {n, c, keep_values ? k : 0}, accumulation(features));
  const auto weights = as_accumulation(weight, features);
  const GlobalKMaxPool op{.dtype = dtype_of(features),
                          .layout = layout,
                          .k = k,
                          .features = features.const_data_ptr(),
                          .weight = data_or_null(weights),
                          .output = output.mutable_data_ptr(),
                          .indices = indices.mutable_data_ptr(),
                          .narrow_indices = !wide_indices,
                          .values = keep_values ? values.mutable_data_ptr() : nullptr};
  return {output, indices, values, weights, op};
}

struct GlobalKMaxPoolBackwardCall {
  Tensor grad_features, grad_weight, grad, indices;
  std::optional<Tensor> values, weight;
  GlobalKMaxPoolBackward scatter;  // where grad_features is asked for
  GlobalKMaxPoolWeightGrad sum;    // where grad_weight is; its sums are the host's to allocate
};

inline GlobalKMaxPoolBackwardCall prepare_pool_backward(
    const Tensor& grad, const Tensor& indices, const std::optional<Tensor>& values, const std::optional<Tensor>& weight,
    const std::vector<int64_t>& size, const std::vector<int64_t>& stride, bool grad_features, bool grad_weight) {
  const Checks check("global_k_max_pool_backward");
  check.floating("grad", grad, 2);
  const int64_t n = grad.size(0), c = grad.size(1);
  check.that(indices.dim() == 3 && indices.size(2) >= 1, "indices must have shape [N,C,k]");
  const int64_t k = indices.size(2);
  const bool narrow = indices.scalar_type() == ScalarType::Short;
  check.saved("indices", indices, grad, narrow ? ScalarType::Short : ScalarType::Int, {n, c, k});
  if (weight) check.beside("weight", *weight, grad, {k});
  GlobalKMaxPoolBackwardCall call{.grad_features = empty(grad, {0}),
                                  .grad_weight = empty(grad, {0}),
                                  .grad = as_dense(grad),
                                  .indices = indices,
                                  .values = values,
                                  .weight = as_accumulation(weight, grad)};
  if (grad_features) {
    check.size_and_stride(size, stride);
    check.that(size[0] == n && size[1] == c, "size must begin with [", n, ", ", c, "], the size of grad");
    call.grad_features = empty_strided(grad, size, stride);
    const Layout4 layout = check.image("grad_features", call.grad_features);
    call.scatter = {.dtype = dtype_of(grad),
                    .layout = layout,
                    .k = k,
                    .grad = call.grad.const_data_ptr(),
                    .indices = indices.const_data_ptr(),
                    .narrow_indices = narrow,
                    .weight = data_or_null(call.weight),
                    .grad_features = call.grad_features.mutable_data_ptr()};
  }
  if (grad_weight) {
    check.that(values && weight, "the gradient of weight needs weight and values: forward must be told to keep them");
    check.saved("values", *values, grad, accumulation(grad), {n, c, k});
    call.sum = {.dtype = dtype_of(grad),
                .k = k,
                .maps = n * c,
                .grad = call.grad.const_data_ptr(),
                .values = values->const_data_ptr(),
                .sums = nullptr};
  }
  return call;
}

}  // namespace fgvc_ext
#endif
