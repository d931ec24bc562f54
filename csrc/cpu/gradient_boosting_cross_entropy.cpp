#include <limits>
#include <stdexcept>
#include <string>

#include "../common/gradient_boosting_cross_entropy.h"
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

// In the order of the samples, whatever the thread count. `rows` are the losses, which become the weights.
template <class Value>
void reduce(Value* rows, const Tensor& target, int64_t ignore_index, int64_t used, int64_t reduction, Tensor& loss) {
  const auto* labels = target.const_data_ptr<int64_t>();
  const Value weight = reduction == kMean ? Value(1) / static_cast<Value>(used) : Value(1);
  auto* result = loss.mutable_data_ptr<Value>();
  double total = 0;
  for (int64_t row = 0; row < target.numel(); ++row) {
    if (reduction == kNone) result[row] = rows[row];
    total += rows[row];
    rows[row] = labels[row] == ignore_index ? Value(0) : weight;
  }
  if (reduction != kNone) *result = static_cast<Value>(reduction == kMean ? total / static_cast<double>(used) : total);
}

std::tuple<Tensor, Tensor> gradient_boosting_cross_entropy(const Tensor& scores, const Tensor& target, int64_t k,
                                                           int64_t reduction, int64_t ignore_index) {
  GradientBoostingCall call = prepare_boosting(scores, target, k, reduction, ignore_index);
  GradientBoosting& op = call.op;
  const int64_t used = check_labels(call.target, op.classes, ignore_index);
  op.k = std::min(k, op.classes);  // so much scratch memory, whatever was asked for
  parallel_for(0, scores.size(0), rows_per_task(op.classes), [&](int64_t begin, int64_t end) {
    const Scratch scratch(op.scratch_bytes());
    kernels().gradient_boosting_cross_entropy(op, begin, end, scratch.data());
  });
  if (op.dtype == Dtype::float64) {
    reduce(static_cast<double*>(op.losses), call.target, ignore_index, used, reduction, call.loss);
  } else {
    reduce(static_cast<float*>(op.losses), call.target, ignore_index, used, reduction, call.loss);
  }
  return {call.loss, call.rows};
}

Tensor gradient_boosting_cross_entropy_backward(const Tensor& grad, const Tensor& scores, const Tensor& target,
                                                const Tensor& rows) {
  const GradientBoostingBackwardCall call = prepare_boosting_backward(grad, scores, target, rows);
  const GradientBoostingBackward& op = call.op;
  parallel_for(0, scores.size(0), rows_per_task(op.forward.classes), [&](int64_t begin, int64_t end) {
    const Scratch scratch(op.scratch_bytes());
    kernels().gradient_boosting_cross_entropy_backward(op, begin, end, scratch.data());
  });
  return call.grad_scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) {
  m.impl("gradient_boosting_cross_entropy", TORCH_BOX(&gradient_boosting_cross_entropy));
  m.impl("gradient_boosting_cross_entropy_backward", TORCH_BOX(&gradient_boosting_cross_entropy_backward));
}

}  // namespace fgvc_ext
