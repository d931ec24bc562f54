#include "gradient_boosting_cross_entropy.cuh"

#include <algorithm>

#include "../common/gradient_boosting_cross_entropy.h"
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
  GradientBoostingCall call = prepare_boosting(scores, target, k, reduction, ignore_index);
  const GradientBoosting& op = call.op;
  const int64_t samples = scores.size(0);
  if (op.classes <= kWarpClasses) {
    FGVC_SWITCH_CUDA_DTYPE(op.dtype, launch(boosted_loss<T, 32>, samples, 32, 0, op));
  } else {
    FGVC_SWITCH_CUDA_DTYPE(op.dtype, launch(boosted_loss<T, 256>, samples, 256, 0, op));
  }
  op.dtype == Dtype::float64 ? reduce<double>(launch, op, samples, reduction, call.loss)
                             : reduce<float>(launch, op, samples, reduction, call.loss);
  return {call.loss, call.rows};
}

Tensor gradient_boosting_cross_entropy_backward(const Tensor& grad, const Tensor& scores, const Tensor& target,
                                                const Tensor& rows) {
  const Launcher launch(scores);
  const GradientBoostingBackwardCall call = prepare_boosting_backward(grad, scores, target, rows);
  const GradientBoostingBackward& op = call.op;
  FGVC_SWITCH_CUDA_DTYPE(op.forward.dtype, launch(boosted_gradient<T, 256>, scores.size(0), 256, 0, op));
  return call.grad_scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("gradient_boosting_cross_entropy", TORCH_BOX(&gradient_boosting_cross_entropy));
  m.impl("gradient_boosting_cross_entropy_backward", TORCH_BOX(&gradient_boosting_cross_entropy_backward));
}

}  // namespace fgvc_ext
