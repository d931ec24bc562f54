// Everything that reaches a kernel is checked here, on the host of either device: what the public functions have
// checked already, and what only somebody can get wrong who calls torch.ops.fgvc_ext by hand. Reads metadata, never
// memory.
#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include "tensor.h"

namespace fgvc_ext {

class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}

  template <class... Message>
  void that(bool condition, const Message&... message) const {
    if (condition) return;
    std::ostringstream text;
    ((text << op_ << ": ") << ... << message);
    throw std::runtime_error(text.str());
  }

  // A tensor of one of the contract's floating dtypes, of any strides.
  void floating(const char* name, const Tensor& tensor, int64_t dims) const {
    that(is_floating(tensor), name, " must be of dtype float32, float64, bfloat16 or float16");
    that(tensor.dim() == dims, name, " must have ", dims, " dimensions, got ", tensor.dim());
  }

  // A floating tensor [N,C,H,W]. 32 bits name the positions of a map.
  Layout4 image(const char* name, const Tensor& tensor) const {
    floating(name, tensor, 4);
    const int64_t height = tensor.size(2), width = tensor.size(3);
    that(width == 0 || height <= INT32_MAX / width, name, " must have maps of at most 2^31 - 1 positions");
    return layout_of(tensor);
  }

  // A further input: of one dtype, beside the first tensor; any strides.
  void input(const char* name, const Tensor& tensor, const Tensor& first, ScalarType dtype,
             std::initializer_list<int64_t> size) const {
    that(tensor.scalar_type() == dtype, name, " must be of dtype ", torch::headeronly::toString(dtype), ", got ",
         torch::headeronly::toString(tensor.scalar_type()));
    has_size(name, tensor, size);
    on_device_of(name, tensor, first);
  }

  // A further floating input: of the first one's dtype, or of the dtype in which it accumulates.
  void beside(const char* name, const Tensor& tensor, const Tensor& first, std::initializer_list<int64_t> size) const {
    const ScalarType dtype = tensor.scalar_type();
    that(dtype == first.scalar_type() || dtype == accumulation(first), name, " must be of dtype ",
         torch::headeronly::toString(first.scalar_type()), " or ", torch::headeronly::toString(accumulation(first)),
         ", got ", torch::headeronly::toString(dtype));
    has_size(name, tensor, size);
    on_device_of(name, tensor, first);
  }

  // What forward kept for backward: contiguous, as forward made it.
  void saved(const char* name, const Tensor& tensor, const Tensor& first, ScalarType dtype,
             std::initializer_list<int64_t> size) const {
    input(name, tensor, first, dtype, size);
    that(tensor.is_contiguous(), name, " must be contiguous, as forward saved it");
  }

  void seed(const Tensor& tensor, const Tensor& first) const {
    if (tensor.dim() == 0) return input("seed", tensor, first, ScalarType::Long, {});
    input("seed", tensor, first, ScalarType::Long, {first.size(0)});
  }

  // Of a gradient [N,C,H,W] that is to be allocated: elements side by side, none of them twice.
  void size_and_stride(const std::vector<int64_t>& size, const std::vector<int64_t>& stride) const {
    that(size.size() == 4 && stride.size() == 4, "size and stride must have 4 entries");
    that(is_dense(size, stride), "size and stride must be those of a dense tensor without overlap");
  }

 private:
  static bool is_floating(const Tensor& tensor) {
    const ScalarType dtype = tensor.scalar_type();
    return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
           dtype == ScalarType::Half;
  }

  void has_size(const char* name, const Tensor& tensor, std::initializer_list<int64_t> size) const {
    const auto actual = tensor.sizes();
    if (actual.size() == size.size() && std::equal(size.begin(), size.end(), actual.begin())) return;
    that(false, name, " must have shape [", list(size), "], got [", list(actual), "]");
  }

  void on_device_of(const char* name, const Tensor& tensor, const Tensor& first) const {
    that(device_type(tensor) == device_type(first) && tensor.get_device_index() == first.get_device_index(), name,
         " must be on the device of the first tensor");
  }

  static bool is_dense(const std::vector<int64_t>& size, const std::vector<int64_t>& stride) {
    for (size_t i = 0; i < size.size(); ++i)
      if (size[i] < 0 || stride[i] < 0) return false;
    // Without elements any strides are those of a dense tensor, as in torch.
    if (std::find(size.begin(), size.end(), 0) != size.end()) return true;
    std::vector<size_t> order(size.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return stride[a] < stride[b]; });
    int64_t elements = 1;
    for (const size_t i : order) {
      if (size[i] > 1 && stride[i] != elements) return false;
      if (__builtin_mul_overflow(elements, size[i], &elements)) return false;
    }
    return true;
  }

  template <class Sizes>
  static std::string list(const Sizes& sizes) {
    std::string text;
    for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return text;
  }

  const char* op_;
};

}  // namespace fgvc_ext
