#include "../common/gradient_boosting_cross_entropy.h"

#include "dispatch.h"
#include "labels.h"

namespace fgvc_ext {

FGVC_KERNEL(gradient_boosting_cross_entropy, GradientBoosting)
FGVC_KERNEL(gradient_boosting_cross_entropy_backward, GradientBoostingBackward)

namespace {

// The loss from the rows' losses, in the order of the samples, whatever the thread count. Each row's loss is then
// replaced by the row's weight, which backward needs.
template <class Value>
void reduce(const GradientBoosting& op, int64_t samples, int64_t used, int64_t reduction, Value* loss) {
  auto* losses = static_cast<Value*>(op.rows.weight);
  auto* weights = losses;
  const Value weight = reduction == kMean ? Value(1) / static_cast<Value>(used) : Value(1);
  double total = 0;
  for (int64_t row = 0; row < samples; ++row) {
    if (reduction == kNone) loss[row] = losses[row];
    total += losses[row];
    weights[row] = op.target[row] == op.ignore_index ? Value(0) : weight;
  }
  if (reduction != kNone) *loss = static_cast<Value>(reduction == kMean ? total / static_cast<double>(used) : total);
}

std::tuple<Tensor, Tensor> gradient_boosting_cross_entropy(const Tensor& scores, const Tensor& target, int64_t k,
                                                           int64_t reduction, int64_t ignore_index) {
  GradientBoostingCall call = prepare_boosting(scores, target, k, reduction, ignore_index);
  const GradientBoosting& op = call.op;
  const int64_t samples = scores.size(0);
  const int64_t used =
      check_labels("gradient_boosting_cross_entropy", "target", op.target, samples, op.classes, ignore_index);
  run_on_rows(kernels::gradient_boosting_cross_entropy, op, samples, op.classes);
  if (op.dtype == Dtype::float64) {
    reduce(op, samples, used, reduction, call.loss.mutable_data_ptr<double>());
  } else {
    reduce(op, samples, used, reduction, call.loss.mutable_data_ptr<float>());
  }
  return {call.loss, call.rows};
}

Tensor gradient_boosting_cross_entropy_backward(const Tensor& grad, const Tensor& scores, const Tensor& target,
                                                const Tensor& rows) {
  const GradientBoostingBackwardCall call = prepare_boosting_backward(grad, scores, target, rows);
  run_on_rows(kernels::gradient_boosting_cross_entropy_backward, call.op, scores.size(0), call.op.classes);
  return call.grad_scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) {
  m.impl("gradient_boosting_cross_entropy", TORCH_BOX(&gradient_boosting_cross_entropy));
  m.impl("gradient_boosting_cross_entropy_backward", TORCH_BOX(&gradient_boosting_cross_entropy_backward));
}

}  // namespace fgvc_ext
