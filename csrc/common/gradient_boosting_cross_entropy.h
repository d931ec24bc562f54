// What the host sides of gradient-boosting cross-entropy share, CPU and CUDA.
#pragma once

#include "arguments.h"
#include "tensor.h"

namespace fgvc_ext {

// `rows` is [4,N], what backward needs of each row: highest score, log Σ exp, threshold t_k, weight in the loss. The
// row's loss stands in the place of its weight until the losses are reduced.
inline GradientBoosting row_arguments(const Tensor& scores, const Tensor& target, Tensor& rows, int64_t k,
                                      int64_t ignore_index) {
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
          k,
          ignore_index,
          first,
          first + bytes,
          first + 2 * bytes,
          first + 3 * bytes};
}

// A call's results, what it reads, and the kernel's arguments, which point into both.
struct GradientBoostingCall {
  Tensor loss, rows, target;
  GradientBoosting op;
};

inline GradientBoostingCall prepare_boosting(const Tensor& scores, const Tensor& target, int64_t k, int64_t reduction,
                                             int64_t ignore_index) {
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  const Tensor labels = as_dense(target);
  const int64_t samples = labels.numel();
  const ScalarType dtype = accumulation(scores);
  Tensor rows = empty(scores, {4, samples}, dtype);
  Tensor loss = reduction == kNone ? empty(scores, {samples}, dtype) : empty(scores, {}, dtype);
  const GradientBoosting op = row_arguments(scores, labels, rows, k, ignore_index);
  return {loss, rows, labels, op};
}

struct GradientBoostingBackwardCall {
  Tensor grad_scores, grad, target, rows;
  GradientBoostingBackward op;
};

inline GradientBoostingBackwardCall prepare_boosting_backward(const Tensor& grad, const Tensor& scores,
                                                              const Tensor& target, const Tensor& saved) {
  const Tensor labels = as_dense(target), dense_grad = as_dense(grad);
  Tensor grad_scores = dense_like(scores), rows = saved;
  const GradientBoosting forward = row_arguments(scores, labels, rows, 0, 0);  // both count in forward alone
  const GradientBoostingBackward op{forward,
                                    dense_grad.const_data_ptr(),
                                    grad.dim() == 1,
                                    forward.losses,
                                    grad_scores.mutable_data_ptr(),
                                    grad_scores.stride(0),
                                    grad_scores.stride(1)};
  return {grad_scores, dense_grad, labels, rows, op};
}

}  // namespace fgvc_ext
