// Gradient-boosting cross-entropy, subtle differences eq. 9–14: what its kernels take, and what both host sides check
// and allocate.
#pragma once

#include "tiles.h"

namespace fgvc_ext {

// As numbered in the operator's schema.
enum Reduction : int64_t { kNone, kMean, kSum };

// Four numbers per row of scores, which backward needs: [N] each, accumulation type. `log_sum` is
// log Σ exp(score − highest), so that large scores lose nothing.
struct BoostedRows {
  void *highest, *log_sum, *threshold;
  void* weight;  // of the row in the loss; until the losses are reduced, the row's loss stands here
};

struct GradientBoosting {
  Dtype dtype;
  int64_t classes, row_stride, column_stride;  // of scores
  const void* scores;                          // [N,C]
  const int64_t* target;                       // [N]
  int64_t k, ignore_index;
  BoostedRows rows;
};

struct GradientBoostingBackward {
  Dtype dtype;
  int64_t classes, row_stride, column_stride;  // of scores
  const void* scores;                          // [N,C]
  const int64_t* target;                       // [N]
  BoostedRows rows;
  const void* grad;  // [] or [N], accumulation type
  bool grad_per_sample;
  void* grad_scores;  // [N,C], dtype
  int64_t grad_row_stride, grad_column_stride;
};

}  // namespace fgvc_ext

#ifndef FGVC_KERNELS_ONLY
#include "checks.h"

namespace fgvc_ext {

// The four rows of `rows` [4,N].
inline BoostedRows boosted_rows(const Tensor& rows) {
  const int64_t bytes = rows.size(1) * (rows.scalar_type() == ScalarType::Double ? 8 : 4);
  char* const first = static_cast<char*>(rows.mutable_data_ptr());
  return {first, first + bytes, first + 2 * bytes, first + 3 * bytes};
}

// A call's results, what it reads, and the kernel's arguments, which point into both.
struct GradientBoostingCall {
  Tensor loss, rows, target;
  GradientBoosting op;
};

inline GradientBoostingCall prepare_boosting(const Tensor& scores, const Tensor& target, int64_t k, int64_t reduction,
                                             int64_t ignore_index) {
  const Checks check("gradient_boosting_cross_entropy");
  check.floating("scores", scores, 2);
  const int64_t samples = scores.size(0), classes = scores.size(1);
  check.that(classes > 0, "scores must have at least one class");
  check.that(k >= 1, "k must be at least 1, got ", k);
  check.that(reduction >= kNone && reduction <= kSum, "reduction must be 0, 1 or 2, got ", reduction);
  check.input("target", target, scores, ScalarType::Long, {samples});
  const Tensor labels = as_dense(target);
  const ScalarType dtype = accumulation(scores);
  Tensor rows = empty(scores, {4, samples}, dtype);
  Tensor loss = reduction == kNone ? empty(scores, {samples}, dtype) : empty(scores, {}, dtype);
  const GradientBoosting op{.dtype = dtype_of(scores),
                            .classes = classes,
                            .row_stride = scores.stride(0),
                            .column_stride = scores.stride(1),
                            .scores = scores.const_data_ptr(),
                            .target = labels.const_data_ptr<int64_t>(),
                            .k = std::min(k, classes),
                            .ignore_index = ignore_index,
                            .rows = boosted_rows(rows)};
  return {loss, rows, labels, op};
}

struct GradientBoostingBackwardCall {
  Tensor grad_scores, grad, target;
  GradientBoostingBackward op;
};

inline GradientBoostingBackwardCall prepare_boosting_backward(const Tensor& grad, const Tensor& scores,
                                                              const Tensor& target, const Tensor& rows) {
  const Checks check("gradient_boosting_cross_entropy_backward");
  check.floating("scores", scores, 2);
  const int64_t samples = scores.size(0);
  check.input("target", target, scores, ScalarType::Long, {samples});
  check.saved("rows", rows, scores, accumulation(scores), {4, samples});
  if (grad.dim() == 0) {
    check.input("grad", grad, scores, accumulation(scores), {});
  } else {
    check.input("grad", grad, scores, accumulation(scores), {samples});
  }
  const Tensor labels = as_dense(target), dense_grad = as_dense(grad);
  Tensor grad_scores = dense_like(scores);
  const GradientBoostingBackward op{.dtype = dtype_of(scores),
                                    .classes = scores.size(1),
                                    .row_stride = scores.stride(0),
                                    .column_stride = scores.stride(1),
                                    .scores = scores.const_data_ptr(),
                                    .target = labels.const_data_ptr<int64_t>(),
                                    .rows = boosted_rows(rows),
                                    .grad = dense_grad.const_data_ptr(),
                                    .grad_per_sample = grad.dim() == 1,
                                    .grad_scores = grad_scores.mutable_data_ptr(),
                                    .grad_row_stride = grad_scores.stride(0),
                                    .grad_column_stride = grad_scores.stride(1)};
  return {grad_scores, dense_grad, labels, op};
}

}  // namespace fgvc_ext
#endif
