#include "../common/heatmap_to_boxes.h"

#include "dispatch.h"

namespace fgvc_ext {

FGVC_KERNEL(heatmap_to_boxes, HeatmapToBoxes)

namespace {

Tensor heatmap_to_boxes(const Tensor& heatmaps, double threshold, int64_t image_height, int64_t image_width,
                        double min_size) {
  const HeatmapToBoxesCall call = prepare_boxes(heatmaps, threshold, image_height, image_width, min_size);
  run_on_rows(kernels::heatmap_to_boxes, call.op, call.op.maps, call.op.height * call.op.width);
  return call.boxes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) { m.impl("heatmap_to_boxes", TORCH_BOX(&heatmap_to_boxes)); }

}  // namespace fgvc_ext
