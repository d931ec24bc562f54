#include "heatmap_to_boxes.cuh"

#include "launch.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

Tensor heatmap_to_boxes(const Tensor& heatmaps, double threshold, int64_t image_height, int64_t image_width,
                        double min_size) {
  const Launcher on(heatmaps);
  const HeatmapToBoxesCall call = prepare_boxes(heatmaps, threshold, image_height, image_width, min_size);
  FGVC_SWITCH_CUDA_DTYPE(call.op.dtype, on.launch(box_of_map<T>, ceil_divide(call.op.maps, kWarpsPerBlock), kBoxThreads,
                                                  0, call.op, Divisor<uint32_t>(call.op.width)));
  return call.boxes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("heatmap_to_boxes", TORCH_BOX(&heatmap_to_boxes));
}

}  // namespace fgvc_ext
