#include "class_mean_loss.cuh"

#include "launch.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

template <class T, class M>
void losses(const Launcher& on, const ClassMeanLossCall& call, Tensor& within, Tensor& between) {
  using Value = Accumulation<T>;
  const ClassMeanLoss& op = call.op;
  const int64_t n = op.samples, e = op.size;
  const Tensor& like = call.features;
  Tensor lead = empty(like, {n}, ScalarType::Int), count = empty(like, {n}, ScalarType::Int);
  Tensor means = empty(like, {n, e}), residuals = empty(like, {n, e}), pulls = empty(like, {n, e});
  Tensor of_rows = empty(like, {2, n}), pairs = empty(like, {1});
  const Global<Value> rows(of_rows.mutable_data_ptr());
  const ClassMeanWork<Value> work{Global<int32_t>(lead.mutable_data_ptr()),
                                  Global<int32_t>(count.mutable_data_ptr()),
                                  Global<Value>(means.mutable_data_ptr()),
                                  Global<Value>(residuals.mutable_data_ptr()),
                                  Global<Value>(pulls.mutable_data_ptr()),
                                  rows,
                                  rows.from(n),
                                  Global<Value>(pairs.mutable_data_ptr())};
  on.launch(class_features<T>, n, kClassThreads, 0, op, work);
  on.launch(class_means<T, M>, n, kClassThreads, 0, op, work);
  on.launch(class_distances<T, M>, n, kClassThreads, 0, op, work);
  on.launch(class_gradients<T>, n, kClassThreads, 0, op, work);
  const Global<const Value> none(nullptr);
  on.launch(sum_losses<Value>, 1, kLossThreads, 0, work.within, n, static_cast<Value>(n), none, Value(0.5),
            Global<Value>(within.mutable_data_ptr()));
  on.launch(sum_losses<Value>, 1, kLossThreads, 0, work.between, n, Value(1), work.pairs,
            static_cast<Value>(op.gamma / 4), Global<Value>(between.mutable_data_ptr()));
}

// Class means have the embeddings' dtype, or float beside half.
template <class T>
void losses_beside_means(const Launcher& on, ClassMeanLossCall& call) {
  if (call.op.means_dtype == call.op.dtype) return losses<T, T>(on, call, call.within, call.between);
  losses<T, Accumulation<T>>(on, call, call.within, call.between);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> class_mean_loss(const Tensor& embeddings, const Tensor& labels,
                                                           const Tensor& class_means, double alpha, double margin,
                                                           double gamma, bool normalize) {
  const Launcher on(embeddings);
  ClassMeanLossCall call = prepare_class_mean_loss(embeddings, labels, class_means, alpha, margin, gamma, normalize);
  FGVC_SWITCH_CUDA_DTYPE(call.op.dtype, losses_beside_means<T>(on, call));
  return {call.within, call.between, call.batch_means, call.gradients};
}

Tensor class_mean_loss_backward(const std::optional<Tensor>& grad_within, const std::optional<Tensor>& grad_between,
                                const Tensor& gradients, ScalarType dtype) {
  const Launcher on(gradients);
  const LossGradientCall call =
      prepare_loss_gradient("class_mean_loss_backward", {grad_within, grad_between}, gradients, dtype);
  FGVC_SWITCH_CUDA_DTYPE(call.op.dtype, on.launch(scale_gradients<T>, ceil_divide(call.op.values, kLossThreads),
                                                  kLossThreads, 0, call.op));
  return call.output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("class_mean_loss", TORCH_BOX(&class_mean_loss));
  m.impl("class_mean_loss_backward", TORCH_BOX(&class_mean_loss_backward));
}

}  // namespace fgvc_ext
