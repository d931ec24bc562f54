#include <limits>
#include <stdexcept>
#include <string>

#include "../common/gradient_boosting.h"
#include "parallel.h"

namespace fgvc_ext {
namespace {

using torch::stable::parallel_for;

int64_t rows_per_task(int64_t classes) { return std::max<int64_t>(1, kValuesPerTask / classes); }

// Nothing may be thrown inside a parallel loop, so the labels are looked at before it; returns how many count.
int64_t check_labels(const Tensor& target, int64_t classes, int64_t ignore_index) {
  const auto* labels = target.const_data_ptr<int64_t>();
  int64_t used = 0;
  for (int64_t row = 0; row < target.numel(); ++row) {
    if (labels[row] == ignore_index) continue;
    if (labels[row] < 0 || labels[row] >= classes)  // std::out_of_range reaches Python as IndexError
      throw std::out_of_range("gradient_boosting_cross_entropy: target[" + std::to_string(row) +
                              "] = " + std::to_string(labels[row]) + " is not in [0, " + std::to_string(classes) +
                              "), the range of " + std::to_string(classes) +
                              " classes, nor ignore_index = " + std::to_string(ignore_index));
    ++used;
  }
  return used;
}

// In the order of the samples, whatever the thread count.
template <class Value>
void reduce(const Tensor& losses, int64_t used, int64_t reduction, Tensor& loss, Tensor& scale) {
  const Value factor = reduction == kMean ? Value(1) / static_cast<Value>(used) : Value(1);
  double total = 0;
  for (int64_t row = 0; row < losses.numel(); ++row) total += losses.const_data_ptr<Value>()[row];
  *scale.mutable_data_ptr<Value>() = factor;
  *loss.mutable_data_ptr<Value>() =
      reduction == kMean ? static_cast<Value>(total / static_cast<double>(used)) : static_cast<Value>(total);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gradient_boosting_cross_entropy(const Tensor& scores, const Tensor& target,
                                                                           int64_t k, int64_t reduction,
                                                                           int64_t ignore_index) {
  const Tensor labels = as_dense(target);
  GradientBoosting op = arguments(scores, labels, k, ignore_index);
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  const int64_t samples = scores.size(0), used = check_labels(labels, op.classes, ignore_index);
  const ScalarType dtype = accumulation(scores);
  Tensor losses = empty(scores, {samples}, dtype), scale = empty(scores, {}, dtype);
  Tensor log_sum = empty(scores, {samples}, dtype), threshold = empty(scores, {samples}, dtype);
  op.losses = losses.mutable_data_ptr();
  op.log_sum = log_sum.mutable_data_ptr();
  op.threshold = threshold.mutable_data_ptr();
  op.k = std::min(k, op.classes);
  parallel_for(0, samples, rows_per_task(op.classes), [&](int64_t begin, int64_t end) {
    const Scratch scratch(op.scratch_bytes());
    kernels().gradient_boosting_cross_entropy(op, begin, end, scratch.data());
  });
  Tensor loss = empty(scores, {}, dtype);
  dtype == ScalarType::Double ? reduce<double>(losses, used, reduction, loss, scale)
                              : reduce<float>(losses, used, reduction, loss, scale);
  return {reduction == kNone ? losses : loss, log_sum, threshold, scale};
}

Tensor gradient_boosting_cross_entropy_backward(const Tensor& grad, const Tensor& scores, const Tensor& target,
                                                const Tensor& log_sum, const Tensor& threshold, const Tensor& scale,
                                                int64_t ignore_index) {
  const Tensor labels = as_dense(target), dense_grad = as_dense(grad);
  Tensor grad_scores = torch::stable::empty_like(scores);
  GradientBoosting forward = arguments(scores, labels, 1, ignore_index);
  forward.log_sum = log_sum.data_ptr();
  forward.threshold = threshold.data_ptr();
  const GradientBoostingBackward op{forward,
                                    dense_grad.const_data_ptr(),
                                    grad.dim() == 1,
                                    scale.const_data_ptr(),
                                    grad_scores.mutable_data_ptr(),
                                    grad_scores.stride(0),
                                    grad_scores.stride(1)};
  parallel_for(0, scores.size(0), rows_per_task(forward.classes), [&](int64_t begin, int64_t end) {
    const Scratch scratch(op.scratch_bytes());
    kernels().gradient_boosting_cross_entropy_backward(op, begin, end, scratch.data());
  });
  return grad_scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) {
  m.impl("gradient_boosting_cross_entropy", TORCH_BOX(&gradient_boosting_cross_entropy));
  m.impl("gradient_boosting_cross_entropy_backward", TORCH_BOX(&gradient_boosting_cross_entropy_backward));
}

}  // namespace fgvc_ext
