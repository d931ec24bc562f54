// What the host sides of gradient-boosting cross-entropy share, CPU and CUDA.
#pragma once

#include "arguments.h"
#include "tensor.h"

namespace fgvc_ext {

// `rows` is [4,N], what backward needs of each row: highest score, log Σ exp, threshold t_k, weight in the loss. The
// row's loss stands in the place of its weight until the losses are reduced. k and ignore_index are forward's own.
inline GradientBoosting arguments(const Tensor& scores, const Tensor& target, Tensor& rows) {
  STD_TORCH_CHECK(scores.dim() == 2 && scores.size(1) > 0, "scores must have shape [N,C] with C of at least 1");
  const int64_t samples = scores.size(0);
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == samples && target.scalar_type() == ScalarType::Long,
                  "target must be int64 [", samples, "]");
  STD_TORCH_CHECK(rows.numel() == 4 * samples, "rows must have shape [4, ", samples, "]");
  const int64_t bytes = samples * (accumulation(scores) == ScalarType::Double ? 8 : 4);
  char* const first = static_cast<char*>(rows.mutable_data_ptr());
  return {dtype_of(scores),
          scores.size(1),
          scores.stride(0),
          scores.stride(1),
          scores.const_data_ptr(),
          target.const_data_ptr<int64_t>(),
          0,
          0,
          first,
          first + bytes,
          first + 2 * bytes,
          first + 3 * bytes};
}

inline GradientBoostingBackward backward_arguments(const GradientBoosting& forward, const Tensor& grad,
                                                   Tensor& grad_scores) {
  return {forward,
          grad.const_data_ptr(),
          grad.dim() == 1,
          forward.losses,
          grad_scores.mutable_data_ptr(),
          grad_scores.stride(0),
          grad_scores.stride(1)};
}

}  // namespace fgvc_ext
