#include "gradient_boosting_cross_entropy.cuh"

#include "launch.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

template <class T>
void losses_of_rows(const Launcher& on, const GradientBoosting& op, int64_t samples) {
  const int64_t blocks_of_warps = ceil_divide(samples, kWarpsPerBlock);
  if (op.classes <= kClassesPerLane * kWarp) {
    on.launch(boosted_loss_of_warp<T, kClassesPerLane>, blocks_of_warps, kRowThreads, 0, op, samples);
  } else if (op.classes <= kMoreClassesPerLane * kWarp) {
    on.launch(boosted_loss_of_warp<T, kMoreClassesPerLane>, blocks_of_warps, kRowThreads, 0, op, samples);
  } else {
    on.launch(boosted_loss_of_block<T>, samples, kRowThreads, 0, op);
  }
}

template <class Value>
void reduce(const Launcher& on, const GradientBoosting& op, int64_t samples, int64_t reduction, Tensor& loss) {
  on.launch(reduce_losses<Value>, 1, kRowThreads, 0, Global<Value>(op.rows.weight), Global<const int64_t>(op.target),
            samples, op.ignore_index, static_cast<Reduction>(reduction), Global<Value>(loss.mutable_data_ptr()));
}

std::tuple<Tensor, Tensor> gradient_boosting_cross_entropy(const Tensor& scores, const Tensor& target, int64_t k,
                                                           int64_t reduction, int64_t ignore_index) {
  const Launcher on(scores);
  GradientBoostingCall call = prepare_boosting(scores, target, k, reduction, ignore_index);
  const GradientBoosting& op = call.op;
  const int64_t samples = scores.size(0);
  FGVC_SWITCH_CUDA_DTYPE(op.dtype, losses_of_rows<T>(on, op, samples));
  op.dtype == Dtype::float64 ? reduce<double>(on, op, samples, reduction, call.loss)
                             : reduce<float>(on, op, samples, reduction, call.loss);
  return {call.loss, call.rows};
}

Tensor gradient_boosting_cross_entropy_backward(const Tensor& grad, const Tensor& scores, const Tensor& target,
                                                const Tensor& rows) {
  const Launcher on(scores);
  const GradientBoostingBackwardCall call = prepare_boosting_backward(grad, scores, target, rows);
  const GradientBoostingBackward& op = call.op;
  FGVC_SWITCH_CUDA_DTYPE(op.dtype, on.launch(boosted_gradient<T>, scores.size(0), kRowThreads, 0, op));
  return call.grad_scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("gradient_boosting_cross_entropy", TORCH_BOX(&gradient_boosting_cross_entropy));
  m.impl("gradient_boosting_cross_entropy_backward", TORCH_BOX(&gradient_boosting_cross_entropy_backward));
}

}  // namespace fgvc_ext
