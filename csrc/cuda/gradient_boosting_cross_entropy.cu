#include "gradient_boosting_cross_entropy.cuh"

#include <algorithm>

#include "../common/gradient_boosting.h"
#include "launch.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

// One warp needs no barriers; rows of more classes keep a whole block busy.
constexpr int64_t kWarpClasses = 1024;

template <class Value>
void reduce(const Launcher& launch, const GradientBoosting& op, int64_t samples, int64_t reduction, Tensor& loss,
            Tensor& scale) {
  launch(reduce_losses<Value>, 1, kReduceThreads, 0, static_cast<const Value*>(op.losses), op.target, samples,
         op.ignore_index, reduction == kMean, loss.mutable_data_ptr<Value>(), scale.mutable_data_ptr<Value>());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gradient_boosting_cross_entropy(const Tensor& scores, const Tensor& target,
                                                                           int64_t k, int64_t reduction,
                                                                           int64_t ignore_index) {
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  const Launcher launch(scores);
  const Tensor labels = as_dense(target);
  GradientBoosting op = arguments(scores, labels, k, ignore_index);
  const int64_t samples = scores.size(0);
  const ScalarType dtype = accumulation(scores);
  Tensor losses = empty(scores, {samples}, dtype), loss = empty(scores, {}, dtype), scale = empty(scores, {}, dtype);
  Tensor log_sum = empty(scores, {samples}, dtype), threshold = empty(scores, {samples}, dtype);
  op.losses = losses.mutable_data_ptr();
  op.log_sum = log_sum.mutable_data_ptr();
  op.threshold = threshold.mutable_data_ptr();
  if (op.classes <= kWarpClasses) {
    FGVC_SWITCH_CUDA_DTYPE(op.dtype, launch(boosted_loss<T, 32>, samples, 32, 0, op));
  } else {
    FGVC_SWITCH_CUDA_DTYPE(op.dtype, launch(boosted_loss<T, 256>, samples, 256, 0, op));
  }
  dtype == ScalarType::Double ? reduce<double>(launch, op, samples, reduction, loss, scale)
                              : reduce<float>(launch, op, samples, reduction, loss, scale);
  return {reduction == kNone ? losses : loss, log_sum, threshold, scale};
}

Tensor gradient_boosting_cross_entropy_backward(const Tensor& grad, const Tensor& scores, const Tensor& target,
                                                const Tensor& log_sum, const Tensor& threshold, const Tensor& scale,
                                                int64_t ignore_index) {
  const Launcher launch(scores);
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
  FGVC_SWITCH_CUDA_DTYPE(forward.dtype, launch(boosted_gradient<T, 256>, scores.size(0), 256, 0, op));
  return grad_scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("gradient_boosting_cross_entropy", TORCH_BOX(&gradient_boosting_cross_entropy));
  m.impl("gradient_boosting_cross_entropy_backward", TORCH_BOX(&gradient_boosting_cross_entropy_backward));
}

}  // namespace fgvc_ext
