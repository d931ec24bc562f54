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
void reduce(const Launcher& launch, const GradientBoosting& op, int64_t samples, int64_t reduction, Tensor& loss) {
  launch(reduce_losses<Value>, 1, kReduceThreads, 0, static_cast<Value*>(op.losses), op.target, samples,
         op.ignore_index, static_cast<Reduction>(reduction), loss.mutable_data_ptr<Value>());
}

std::tuple<Tensor, Tensor> gradient_boosting_cross_entropy(const Tensor& scores, const Tensor& target, int64_t k,
                                                           int64_t reduction, int64_t ignore_index) {
  const Launcher launch(scores);
  const Tensor labels = as_dense(target);
  const int64_t samples = labels.numel();
  const ScalarType dtype = accumulation(scores);
  Tensor rows = empty(scores, {4, samples}, dtype);
  Tensor loss = reduction == kNone ? empty(scores, {samples}, dtype) : empty(scores, {}, dtype);
  GradientBoosting op = arguments(scores, labels, rows);
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  op.k = k;
  op.ignore_index = ignore_index;
  if (op.classes <= kWarpClasses) {
    FGVC_SWITCH_CUDA_DTYPE(op.dtype, launch(boosted_loss<T, 32>, samples, 32, 0, op));
  } else {
    FGVC_SWITCH_CUDA_DTYPE(op.dtype, launch(boosted_loss<T, 256>, samples, 256, 0, op));
  }
  dtype == ScalarType::Double ? reduce<double>(launch, op, samples, reduction, loss)
                              : reduce<float>(launch, op, samples, reduction, loss);
  return {loss, rows};
}

Tensor gradient_boosting_cross_entropy_backward(const Tensor& grad, const Tensor& scores, const Tensor& target,
                                                const Tensor& rows) {
  const Launcher launch(scores);
  const Tensor labels = as_dense(target), dense_grad = as_dense(grad);
  Tensor grad_scores = dense_like(scores), forward_rows = rows;
  const auto op = backward_arguments(arguments(scores, labels, forward_rows), dense_grad, grad_scores);
  FGVC_SWITCH_CUDA_DTYPE(op.forward.dtype, launch(boosted_gradient<T, 256>, scores.size(0), 256, 0, op));
  return grad_scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("gradient_boosting_cross_entropy", TORCH_BOX(&gradient_boosting_cross_entropy));
  m.impl("gradient_boosting_cross_entropy_backward", TORCH_BOX(&gradient_boosting_cross_entropy_backward));
}

}  // namespace fgvc_ext
