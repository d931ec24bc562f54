#include "../common/location_heatmap.h"

#include "dispatch.h"

namespace fgvc_ext {

FGVC_KERNEL(location_sums_of_positions, LocationLevel)
FGVC_KERNEL(location_sums_of_groups, LocationLevel)
FGVC_KERNEL(location_masks, LocationHeatmap)
FGVC_KERNEL(location_heatmap, LocationHeatmap)

namespace {

bool channels_are_interleaved(const Layout4& layout) {
  return layout.channels_are_contiguous() && !layout.map_is_contiguous();
}

// Interleaved channels are one group: work is cut by positions there.
int64_t group_size(const Layout4& layout) {
  constexpr int64_t kChannelsPerGroup = 256;
  return channels_are_interleaved(layout) ? layout.channels : kChannelsPerGroup;
}

void sum_channels(const LocationLevel& level) {
  const Layout4& layout = level.layout;
  if (channels_are_interleaved(layout)) {
    run_on_rows(kernels::location_sums_of_positions, level, layout.samples * layout.height,
                layout.width * layout.channels);
  } else {
    run_on_rows(kernels::location_sums_of_groups, level, layout.samples * level.groups,
                level.channels_per_group * layout.positions());
  }
}

Tensor location_heatmap(const std::vector<Tensor>& features, int64_t image_height, int64_t image_width) {
  const LocationHeatmapCall call = prepare_location(features, image_height, image_width, group_size);
  const LocationHeatmap& op = call.op;
  for (const LocationLevel& level : call.levels) sum_channels(level);
  run_on_rows(kernels::location_masks, op, op.samples * op.levels, op.mask_positions);
  run_on_rows(kernels::location_heatmap, op, op.samples * op.height, op.width);
  return call.heatmap;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) { m.impl("location_heatmap", TORCH_BOX(&location_heatmap)); }

}  // namespace fgvc_ext
