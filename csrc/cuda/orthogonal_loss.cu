#include "orthogonal_loss.cuh"

#include "launch.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

template <class T>
void losses_of_samples(const Launcher& on, const OrthogonalLoss& op, Tensor& loss) {
  using Value = Accumulation<T>;
  on.launch(orthogonal_sample<T>, op.samples, kOrthogonalThreads, 0, op);
  on.launch(sum_losses<Value>, 1, kLossThreads, 0, Global<const Value>(op.losses), op.samples, Value(1),
            Global<const Value>(nullptr), Value(1), Global<Value>(loss.mutable_data_ptr()));
}

std::tuple<Tensor, Tensor> orthogonal_loss(const Tensor& student_map, const Tensor& teacher_maps) {
  const Launcher on(student_map);
  OrthogonalLossCall call = prepare_orthogonal_loss(student_map, teacher_maps);
  FGVC_SWITCH_CUDA_DTYPE(call.op.dtype, losses_of_samples<T>(on, call.op, call.loss));
  return {call.loss, call.gradient};
}

Tensor orthogonal_loss_backward(const Tensor& grad, const Tensor& gradients, ScalarType dtype) {
  const Launcher on(gradients);
  const LossGradientCall call = prepare_loss_gradient("orthogonal_loss_backward", {grad}, gradients, dtype);
  FGVC_SWITCH_CUDA_DTYPE(call.op.dtype, on.launch(scale_gradients<T>, ceil_divide(call.op.values, kLossThreads),
                                                  kLossThreads, 0, call.op));
  return call.output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("orthogonal_loss", TORCH_BOX(&orthogonal_loss));
  m.impl("orthogonal_loss_backward", TORCH_BOX(&orthogonal_loss_backward));
}

}  // namespace fgvc_ext
