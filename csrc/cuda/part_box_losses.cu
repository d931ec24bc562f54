#include "part_box_losses.cuh"

#include "launch.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

template <class T>
void losses_of_boxes(const Launcher& on, PartBoxLossesCall& call) {
  using Value = Accumulation<T>;
  const PartBoxLosses& op = call.op;
  const Value samples = static_cast<Value>(op.samples);
  const Global<const Value> none(nullptr);
  on.launch(part_boxes_of_sample<T>, ceil_divide(op.samples, kWarpsPerBlock), kPartBoxThreads, 0, op);
  on.launch(sum_losses<Value>, 1, kLossThreads, 0, Global<const Value>(op.overlaps), op.samples, samples, none,
            static_cast<Value>(op.iou_weight), Global<Value>(call.overlap.mutable_data_ptr()));
  on.launch(sum_losses<Value>, 1, kLossThreads, 0, Global<const Value>(op.areas), op.samples, samples, none, Value(1),
            Global<Value>(call.area.mutable_data_ptr()));
}

std::tuple<Tensor, Tensor, Tensor> part_box_losses(const Tensor& boxes, const Tensor& valid, const Tensor& object_area,
                                                   double iou_weight, int64_t parts, double min_area, int64_t area_mode,
                                                   bool detach_denominator) {
  const Launcher on(boxes);
  PartBoxLossesCall call =
      prepare_part_box_losses(boxes, valid, object_area, iou_weight, parts, min_area, area_mode, detach_denominator);
  FGVC_SWITCH_CUDA_DTYPE(call.op.dtype, losses_of_boxes<T>(on, call));
  return {call.overlap, call.area, call.gradients};
}

Tensor part_box_losses_backward(const std::optional<Tensor>& grad_overlap, const std::optional<Tensor>& grad_area,
                                const Tensor& gradients, ScalarType dtype) {
  const Launcher on(gradients);
  const LossGradientCall call =
      prepare_loss_gradient("part_box_losses_backward", {grad_overlap, grad_area}, gradients, dtype);
  FGVC_SWITCH_CUDA_DTYPE(call.op.dtype, on.launch(scale_gradients<T>, ceil_divide(call.op.values, kLossThreads),
                                                  kLossThreads, 0, call.op));
  return call.output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("part_box_losses", TORCH_BOX(&part_box_losses));
  m.impl("part_box_losses_backward", TORCH_BOX(&part_box_losses_backward));
}

}  // namespace fgvc_ext
