#include "../../cuda/location_heatmap.cuh"

#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

template <class T, int Elements, class Index>
void by_group(const LocationLevel& level) {
  const LocationBlock block(level.layout.positions(), Elements);
  const int64_t parts = block.parts(level.layout.positions(), Elements);
  launch(sum_group<T, Elements, Index>, level.layout.samples * level.groups * parts, kLocationThreads, 0, nullptr,
         level, Maps<Index>(level.layout), block, Divisor<uint32_t>(parts));
}
template <class T, int Elements, class Index>
void by_position(const LocationLevel& level) {
  launch(sum_interleaved<T, Elements, Index>,
         blocks_for(level.layout.samples * level.layout.positions(), kWarpsPerBlock), kLocationThreads, 0, nullptr,
         level, Maps<Index>(level.layout));
}

// Two levels: the given one, and one of a single position.
template <class T, int Elements, class Index>
void run(void (*sum)(const LocationLevel&), const Layout4& layout, int64_t channels_per_group, int64_t height,
         int64_t width, Digest& digest) {
  using Value = Accumulation<T>;
  const int64_t groups = (layout.channels + channels_per_group - 1) / channels_per_group;
  const auto features = numbers<T>(layout.maps() * layout.positions(), 8);
  std::vector<Value> sums(layout.samples * groups * layout.positions()), second(layout.samples, Value(1));
  std::vector<uint8_t> masks(layout.samples * (layout.positions() + 1));
  std::vector<T> heatmap(layout.samples * height * width);

  LocationLevel level{};
  level.layout = layout;
  level.groups = groups;
  level.channels_per_group = channels_per_group;
  level.features = features.data();
  level.sums = sums.data();
  sum(level);

  LocationHeatmap op{};
  op.samples = layout.samples;
  op.levels = 2;
  op.height = height;
  op.width = width;
  op.level[0] = {layout.height, layout.width, groups, 0, sums.data()};
  op.level[1] = {1, 1, 1, layout.positions(), second.data()};
  op.mask_positions = layout.positions() + 1;
  op.masks = masks.data();
  op.heatmap = heatmap.data();
  launch(location_masks<Value>, op.samples * op.levels, kLocationThreads, 0, nullptr, op);
  launch(write_heatmap<T, Elements, Index>, op.samples * LocationImage<Index>::blocks_of_sample(op, Elements),
         kLocationThreads, 0, nullptr, op, LocationImage<Index>(op, Elements));
  digest.add(sums);
  digest.add(masks);
  digest.add(heatmap);
}

void launches(Digest& digest) {
  run<float, 4, uint32_t>(by_group<float, 4, uint32_t>, contiguous(2, 70, 8, 6), 64, 16, 24, digest);
  run<float, 1, uint64_t>(by_group<float, 1, uint64_t>, contiguous(1, 3, 17, 19), 2, 5, 40, digest);
  run<double, 1, uint32_t>(by_group<double, 1, uint32_t>, contiguous(2, 5, 1, 1), 64, 3, 3, digest);
  run<__nv_bfloat16, 8, uint32_t>(by_group<__nv_bfloat16, 8, uint32_t>, contiguous(1, 9, 4, 4), 4, 8, 16, digest);
  run<__half, 1, uint32_t>(by_position<__half, 1, uint32_t>, channels_last(2, 37, 3, 5), 37, 7, 9, digest);
  run<float, 4, uint64_t>(by_position<float, 4, uint64_t>, channels_last(1, 136, 4, 3), 136, 4, 8, digest);
}

const Registration registration("location_heatmap", launches);

}  // namespace
}  // namespace fgvc_ext::sanitizers
