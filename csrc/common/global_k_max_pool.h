// What the host sides of global k-max pooling share, CPU and CUDA.
#pragma once

#include "arguments.h"
#include "tensor.h"

namespace fgvc_ext {

inline void check_arguments(const Layout4& layout, int64_t k, const std::optional<Tensor>& weight, bool wide_indices) {
  STD_TORCH_CHECK(k >= 1 && k <= layout.positions(), "k must be in [1, H*W = ", layout.positions(), "], got ", k);
  STD_TORCH_CHECK(!weight || weight->numel() == k, "weight must have shape [", k, "]");
  STD_TORCH_CHECK(wide_indices || layout.positions() <= kInt16Positions, "maps of ", layout.positions(),
                  " positions need wide indices");
}

// What forward saved must be of these maps.
inline void check_indices(const Tensor& grad, const Tensor& indices, const Layout4& layout) {
  STD_TORCH_CHECK(
      indices.dim() == 3 && grad.numel() == layout.maps() && indices.numel() == layout.maps() * indices.size(2),
      "grad and indices must be of ", layout.maps(), " maps");
}
inline void check_values(const Tensor& grad, const std::optional<Tensor>& values, const std::optional<Tensor>& weight) {
  STD_TORCH_CHECK(values && weight && values->dim() == 3 && values->size(2) == weight->numel() &&
                      values->numel() == grad.numel() * weight->numel(),
                  "the gradient of weight needs weight [k] and values [", grad.numel(), ", k]");
}

}  // namespace fgvc_ext
