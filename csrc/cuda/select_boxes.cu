#include "select_boxes.cuh"

#include "launch.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

// Whether an access may move a box: its numbers lie side by side and begin at a multiple of their bytes.
template <class B>
bool boxes_are_chunks(const SelectBoxes& op) {
  return op.box_stride[2] == 1 && op.box_stride[1] == 4 && (op.samples == 1 || op.box_stride[0] % 4 == 0) &&
         reinterpret_cast<uintptr_t>(op.boxes) % (4 * sizeof(B)) == 0;
}

template <class T, class B>
void select_of(const Launcher& on, const SelectBoxes& op, const Tensor& left) {
  on.launch(select_of_image<T, B>, op.samples, kSelectThreads, 0, op, Global<Accumulation<T>>(left.mutable_data_ptr()),
            boxes_are_chunks<B>(op));
}

// Boxes have the scores' dtype, or float beside half.
template <class T>
void select_beside(const Launcher& on, const SelectBoxes& op, const Tensor& left) {
  if (op.boxes_dtype == op.dtype) return select_of<T, T>(on, op, left);
  select_of<T, Accumulation<T>>(on, op, left);
}

std::tuple<Tensor, Tensor> select_boxes(const Tensor& scores, const Tensor& boxes, const Tensor& candidates,
                                        double iou_threshold, int64_t top) {
  const Launcher on(scores);
  const SelectBoxesCall call = prepare_select_boxes(scores, boxes, candidates, iou_threshold, top);
  const Tensor left = empty(scores, {call.op.samples, call.op.boxes_per_sample}, accumulation(scores));
  FGVC_SWITCH_CUDA_DTYPE(call.op.dtype, select_beside<T>(on, call.op, left));
  return {call.indices, call.valid};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) { m.impl("select_boxes", TORCH_BOX(&select_boxes)); }

}  // namespace fgvc_ext
