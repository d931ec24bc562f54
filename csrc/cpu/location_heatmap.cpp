#include "../common/location_heatmap.h"

#include "dispatch.h"

namespace fgvc_ext {

FGVC_KERNEL(location_sums, LocationLevel)
FGVC_KERNEL(location_masks, LocationHeatmap)
FGVC_KERNEL(location_heatmap, LocationHeatmap)

namespace {

// In channels_last these are the channels that are read side by side: a kilobyte of float32.
constexpr int64_t kChannelsPerGroup = 256;
int64_t group_size(const Layout4&) { return kChannelsPerGroup; }

Tensor location_heatmap(const std::vector<Tensor>& features, int64_t image_height, int64_t image_width) {
  const LocationHeatmapCall call = prepare_location(features, image_height, image_width, group_size);
  const LocationHeatmap& op = call.op;
  for (const LocationLevel& level : call.levels)
    run_on_rows(kernels::location_sums, level, level.layout.samples * level.groups,
                kChannelsPerGroup * level.layout.positions());
  run_on_rows(kernels::location_masks, op, op.samples * op.levels, op.mask_positions);
  run_on_rows(kernels::location_heatmap, op, op.samples * op.height, op.width);
  return call.heatmap;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) { m.impl("location_heatmap", TORCH_BOX(&location_heatmap)); }

}  // namespace fgvc_ext
