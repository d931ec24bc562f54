// What the host sides of gradient-boosting cross-entropy share, CPU and CUDA.
#pragma once

#include "arguments.h"
#include "tensor.h"

namespace fgvc_ext {

// As numbered in the operator's schema.
enum Reduction : int64_t { kNone, kMean, kSum };

inline GradientBoosting arguments(const Tensor& scores, const Tensor& target, int64_t k, int64_t ignore_index) {
  STD_TORCH_CHECK(scores.dim() == 2 && scores.size(1) > 0, "scores must have shape [N,C] with C of at least 1");
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == scores.size(0) && target.scalar_type() == ScalarType::Long,
                  "target must be int64 [", scores.size(0), "]");
  return {dtype_of(scores),
          scores.size(1),
          scores.stride(0),
          scores.stride(1),
          scores.const_data_ptr(),
          target.const_data_ptr<int64_t>(),
          k,
          ignore_index,
          nullptr,
          nullptr,
          nullptr};
}

}  // namespace fgvc_ext
