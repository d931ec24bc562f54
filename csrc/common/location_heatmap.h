// Location heat map, dual attention fusion section 3.2: what its kernels take, and what both host sides check and
// allocate.
#pragma once

#include <cmath>

#include "tiles.h"

namespace fgvc_ext {

constexpr int64_t kMostLevels = 8;
constexpr int64_t kMaskPitch = 32;  // bytes: each level's mask begins with a sector of memory
constexpr int kNoMask = 128;        // of a level whose mean is NaN; more than all masks of a pixel add up to

// The first step, for one level of features: the sum over its channels, in groups.
struct LocationLevel {
  Dtype dtype;
  Layout4 layout;
  int64_t groups, channels_per_group;
  const void* features;
  void* sums;  // [N,groups,h·w], accumulation type
};

// A level as the further steps see it.
struct LocationMask {
  int64_t height, width, groups;
  int64_t first;  // of its positions in a row of `masks`
  void* sums;     // [N,groups,h·w], accumulation type; the second step writes the groups' sum to the first one

  FGVC_HOST_DEVICE int64_t positions() const { return height * width; }
};

struct LocationHeatmap {
  Dtype dtype;
  int64_t samples, levels;
  int64_t height, width;  // of the image
  LocationMask level[kMostLevels];
  int64_t mask_positions;  // of all levels together, each rounded up to kMaskPitch
  uint8_t* masks;          // [N,mask_positions]: one, zero, or kNoMask
  void* heatmap;           // [N,H,W], dtype
};

// The source under the middle of position i of `count`: floor((i + 0.5) · source_count / count).
static inline FGVC_HOST_DEVICE int64_t nearest(int64_t i, int64_t count, int64_t source_count) {
  return (2 * i + 1) * source_count / (2 * count);
}

// Of the masks of a pixel, added up: the share of those that are one.
template <class Value>
static inline FGVC_HOST_DEVICE Value location_share(int total, int64_t levels) {
  if (total >= kNoMask) return static_cast<Value>(NAN);
  return static_cast<Value>(total) / static_cast<Value>(levels);
}

}  // namespace fgvc_ext

#ifndef FGVC_KERNELS_ONLY
#include "checks.h"

namespace fgvc_ext {

// A call's results, what it reads, and the kernels' arguments, which point into both.
struct LocationHeatmapCall {
  Tensor heatmap, masks;
  std::vector<Tensor> sums;
  std::vector<LocationLevel> levels;
  LocationHeatmap op;
};

// Groups of a size that follows from a level's layout, so that the order of the sums does not depend on who adds them
// up.
inline LocationHeatmapCall prepare_location(const std::vector<Tensor>& features, int64_t image_height,
                                            int64_t image_width, int64_t (*group_size)(const Layout4&)) {
  const Checks check("location_heatmap");
  const auto levels = static_cast<int64_t>(features.size());
  check.that(levels >= 1 && levels <= kMostLevels, "features must hold 1 to ", kMostLevels, " levels, got ", levels);
  check.that(image_height >= 1 && image_width >= 1 && image_height <= INT32_MAX / image_width,
             "image_size must have sides of at least 1, and at most 2^31 - 1 pixels, got ", image_height, ", ",
             image_width);
  const Tensor& first = features[0];
  std::vector<Tensor> all_sums;
  std::vector<LocationLevel> steps;
  LocationHeatmap op{};
  for (int64_t number = 0; number < levels; ++number) {
    const std::string name = "features[" + std::to_string(number) + "]";
    const Tensor& level = features[number];
    const Layout4 layout = check.image(name.c_str(), level);
    check.that(layout.channels > 0 && layout.positions() > 0, name, " must have C, H and W of at least 1");
    check.beside(name.c_str(), level, first, {first.size(0), layout.channels, layout.height, layout.width});
    const int64_t channels_per_group = group_size(layout);
    const int64_t groups = ceil_divide(layout.channels, channels_per_group);
    all_sums.push_back(empty(first, {layout.samples, groups, layout.positions()}, accumulation(first)));
    steps.push_back({.dtype = dtype_of(level),
                     .layout = layout,
                     .groups = groups,
                     .channels_per_group = channels_per_group,
                     .features = level.const_data_ptr(),
                     .sums = all_sums.back().mutable_data_ptr()});
    op.level[number] = {layout.height, layout.width, groups, op.mask_positions, all_sums.back().mutable_data_ptr()};
    op.mask_positions += ceil_divide(layout.positions(), kMaskPitch) * kMaskPitch;
  }
  Tensor heatmap = empty(first, {first.size(0), 1, image_height, image_width});
  Tensor masks = empty(first, {first.size(0), op.mask_positions}, ScalarType::Byte);
  op.dtype = dtype_of(first);
  op.samples = first.size(0);
  op.levels = levels;
  op.height = image_height;
  op.width = image_width;
  op.masks = masks.mutable_data_ptr<uint8_t>();
  op.heatmap = heatmap.mutable_data_ptr();
  return {heatmap, masks, all_sums, steps, op};
}

}  // namespace fgvc_ext
#endif
