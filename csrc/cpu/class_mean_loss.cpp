#include "../common/class_mean_loss.h"

#include <numeric>

#include "dispatch.h"
#include "labels.h"
#include "sums.h"

namespace fgvc_ext {

FGVC_KERNEL(class_mean_features, ClassMeanLoss)
FGVC_KERNEL(class_mean_within, ClassMeanLoss)
FGVC_KERNEL(class_mean_between, ClassMeanLoss)
FGVC_KERNEL(class_mean_loss_backward, LossGradient)

namespace {

// The samples by class, and where each class begins; the classes that the batch lacks cost nothing.
struct Groups {
  explicit Groups(const ClassMeanLoss& op) : order(op.samples) {
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(),
              [&](int64_t a, int64_t b) { return op.labels[a] != op.labels[b] ? op.labels[a] < op.labels[b] : a < b; });
    for (int64_t i = 0; i < op.samples; ++i)
      if (i == 0 || op.labels[order[i]] != op.labels[order[i - 1]]) start.push_back(i);
    start.push_back(op.samples);
  }
  int64_t count() const { return static_cast<int64_t>(start.size()) - 1; }

  std::vector<int64_t> order, start;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> class_mean_loss(const Tensor& embeddings, const Tensor& labels,
                                                           const Tensor& class_means, double alpha, double margin,
                                                           double gamma, bool normalize) {
  ClassMeanLossCall call = prepare_class_mean_loss(embeddings, labels, class_means, alpha, margin, gamma, normalize);
  ClassMeanLoss& op = call.op;
  check_labels("class_mean_loss", "labels", op.labels, op.samples, op.classes);
  const Groups groups(op);
  Tensor means = empty(call.features, {groups.count(), op.size});
  Tensor within = empty(call.features, {groups.count()}), between = empty(call.features, {groups.count()});
  op.groups = groups.count();
  op.order = groups.order.data();
  op.start = groups.start.data();
  op.means = means.mutable_data_ptr();
  op.within = within.mutable_data_ptr();
  op.between = between.mutable_data_ptr();

  run_on_rows(kernels::class_mean_features, op, op.samples, op.size);
  run_on_rows(kernels::class_mean_within, op, op.groups, op.size);
  run_on_rows(kernels::class_mean_between, op, op.groups, op.size * op.groups);

  write_sum(within, 2. * static_cast<double>(op.samples), call.within);
  const double pairs = static_cast<double>(op.groups) * static_cast<double>(op.groups - 1) / 2;
  write_sum(between, std::max(1., pairs) * 4, call.between, gamma);
  return {call.within, call.between, call.batch_means, call.gradients};
}

Tensor class_mean_loss_backward(const std::optional<Tensor>& grad_within, const std::optional<Tensor>& grad_between,
                                const Tensor& gradients, ScalarType dtype) {
  const LossGradientCall call =
      prepare_loss_gradient("class_mean_loss_backward", {grad_within, grad_between}, gradients, dtype);
  run_on_rows(kernels::class_mean_loss_backward, call.op, call.op.values, 1);
  return call.output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) {
  m.impl("class_mean_loss", TORCH_BOX(&class_mean_loss));
  m.impl("class_mean_loss_backward", TORCH_BOX(&class_mean_loss_backward));
}

}  // namespace fgvc_ext
