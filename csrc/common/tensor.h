// What the host side of every operator needs of a tensor, on the stable ABI; the same for CPU and CUDA.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "dtype.h"
#include "layout.h"

// The emulated build (csrc/emulation) registers the CUDA sources under another name, for CPU tensors.
#ifndef FGVC_NAMESPACE
#define FGVC_NAMESPACE fgvc_ext
#endif

namespace fgvc_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}
inline ScalarType accumulation(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Layout4 layout_of(const Tensor& tensor) {
  return {tensor.size(0),
          tensor.size(1),
          tensor.size(2),
          tensor.size(3),
          {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)}};
}

inline int32_t device_type(const Tensor& tensor) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

// Allocates without the dispatcher, which would cost several microseconds a tensor.
inline Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& size, const std::vector<int64_t>& stride,
                            ScalarType dtype) {
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), stride.data(),
                                                         type, device_type(like), like.get_device_index(), &handle));
  return Tensor(handle);
}
inline Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& size, const std::vector<int64_t>& stride) {
  return empty_strided(like, size, stride, like.scalar_type());
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  std::vector<int64_t> stride(size.size());
  uint64_t elements = 1;  // unsigned: beside a zero, sizes may be so large that their product wraps around
  for (size_t i = size.size(); i-- > 0; elements *= std::max<int64_t>(size[i], 1))
    stride[i] = static_cast<int64_t>(elements);
  return empty_strided(like, size, stride, dtype);
}
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size) {
  return empty(like, size, like.scalar_type());
}

// Dense, in the layout that torch.empty_like gives.
inline Tensor dense_like(const Tensor& like, ScalarType dtype) {
  if (!like.is_contiguous()) return torch::stable::to(torch::stable::empty_like(like), dtype);
  const auto size = like.sizes();
  return empty(like, {size.begin(), size.end()}, dtype);
}
inline Tensor dense_like(const Tensor& like) {
  return like.is_contiguous() ? dense_like(like, like.scalar_type()) : torch::stable::empty_like(like);
}

inline Tensor as_dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Contiguous and in the dtype in which the operator on `like` accumulates.
inline std::optional<Tensor> as_accumulation(const std::optional<Tensor>& tensor, const Tensor& like) {
  if (!tensor) return std::nullopt;
  const ScalarType dtype = accumulation(like);
  return as_dense(tensor->scalar_type() == dtype ? *tensor : torch::stable::to(*tensor, dtype));
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

}  // namespace fgvc_ext
