// What the host sides of global k-max pooling share, CPU and CUDA.
#pragma once

#include "arguments.h"
#include "tensor.h"

namespace fgvc_ext {

// A call's results, what it reads, and the kernel's arguments, which point into both.
struct GlobalKMaxPoolCall {
  Tensor output, indices, values;
  std::optional<Tensor> weight;
  GlobalKMaxPool op;
};

inline GlobalKMaxPoolCall prepare_pool(const Tensor& features, int64_t k, const std::optional<Tensor>& weight,
                                       bool keep_values, bool wide_indices) {
  const Layout4 layout = layout_of(features);
  STD_TORCH_CHECK(k >= 1 && k <= layout.positions(), "k must be in [1, H*W = ", layout.positions(), "], got ", k);
  STD_TORCH_CHECK(!weight || weight->numel() == k, "weight must have shape [", k, "]");
  STD_TORCH_CHECK(wide_indices || layout.positions() <= kInt16Positions, "maps of ", layout.positions(),
                  " positions need wide indices");
  Tensor output = empty(features, {layout.samples, layout.channels});
  Tensor indices =
      empty(features, {layout.samples, layout.channels, k}, wide_indices ? ScalarType::Int : ScalarType::Short);
  Tensor values = empty(features, {layout.samples, layout.channels, keep_values ? k : 0}, accumulation(features));
  const auto weights = as_accumulation(weight, features);
  const GlobalKMaxPool op{dtype_of(features),
                          layout,
                          k,
                          features.const_data_ptr(),
                          data_or_null(weights),
                          output.mutable_data_ptr(),
                          indices.mutable_data_ptr(),
                          !wide_indices,
                          keep_values ? values.mutable_data_ptr() : nullptr};
  return {output, indices, values, weights, op};
}

// `grad` is dense, `weight` of its accumulation type; the indices must be of these maps.
inline GlobalKMaxPoolBackward scatter_arguments(const Tensor& grad, const Tensor& indices,
                                                const std::optional<Tensor>& weight, Tensor& features) {
  const Layout4 layout = layout_of(features);
  STD_TORCH_CHECK(
      indices.dim() == 3 && grad.numel() == layout.maps() && indices.numel() == layout.maps() * indices.size(2),
      "grad and indices must be of ", layout.maps(), " maps");
  return {dtype_of(grad),           layout,
          indices.size(2),          grad.const_data_ptr(),
          indices.const_data_ptr(), indices.scalar_type() == ScalarType::Short,
          data_or_null(weight),     features.mutable_data_ptr()};
}

// What forward saved must be of these maps.
inline void check_values(const Tensor& grad, const std::optional<Tensor>& values, const std::optional<Tensor>& weight) {
  STD_TORCH_CHECK(values && weight && values->dim() == 3 && values->size(2) == weight->numel() &&
                      values->numel() == grad.numel() * weight->numel(),
                  "the gradient of weight needs weight [k] and values [", grad.numel(), ", k]");
}

}  // namespace fgvc_ext
