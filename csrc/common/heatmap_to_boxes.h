// Boxes around the hot part of heat maps, ELoPE section 5: what the kernel takes, and what both host sides check and
// allocate.
#pragma once

#include "tiles.h"

namespace fgvc_ext {

struct HeatmapToBoxes {
  Dtype dtype;
  int64_t maps, height, width;
  int64_t stride[3];  // of heatmaps
  const void* heatmaps;
  double threshold;
  int64_t image_height, image_width;  // pixels
  double min_size;                    // pixels
  void* boxes;                        // [N,4] x1, y1, x2, y2, accumulation type
};

}  // namespace fgvc_ext

#ifndef FGVC_KERNELS_ONLY
#include "checks.h"

namespace fgvc_ext {

struct HeatmapToBoxesCall {
  Tensor boxes;
  HeatmapToBoxes op;
};

inline HeatmapToBoxesCall prepare_boxes(const Tensor& heatmaps, double threshold, int64_t image_height,
                                        int64_t image_width, double min_size) {
  const Checks check("heatmap_to_boxes");
  check.floating("heatmaps", heatmaps, 3);
  const int64_t maps = heatmaps.size(0), height = heatmaps.size(1), width = heatmaps.size(2);
  check.that(height > 0 && width > 0, "heatmaps must have H and W of at least 1");
  check.that(height <= INT32_MAX / width, "heatmaps must have at most 2^31 - 1 positions");
  check.that(image_height >= 1 && image_width >= 1, "image_size must be at least 1, got ", image_height, ", ",
             image_width);
  Tensor boxes = empty(heatmaps, {maps, 4}, accumulation(heatmaps));
  const HeatmapToBoxes op{.dtype = dtype_of(heatmaps),
                          .maps = maps,
                          .height = height,
                          .width = width,
                          .stride = {heatmaps.stride(0), heatmaps.stride(1), heatmaps.stride(2)},
                          .heatmaps = heatmaps.const_data_ptr(),
                          .threshold = threshold,
                          .image_height = image_height,
                          .image_width = image_width,
                          .min_size = min_size,
                          .boxes = boxes.mutable_data_ptr()};
  return {boxes, op};
}

}  // namespace fgvc_ext
#endif
