#include "location_heatmap.cuh"

#include "launch.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

// Enough groups to fill the device, large enough that their sums are small beside what they add up. A warp adds up all
// channels of a position where they lie side by side.
int64_t group_size(const Layout4& layout) {
  constexpr int64_t kChannelsPerGroup = 64;
  return channels_are_interleaved(layout) ? layout.channels : kChannelsPerGroup;
}

// How many neighbouring channels one access may move: as in a map of one row, whose columns the channels are.
template <class T>
int channel_chunk_size(const LocationLevel& level) {
  const Layout4& layout = level.layout;
  const int64_t step = layout.width == 1 ? layout.stride[2] : layout.stride[3];
  const Layout4 rows{layout.samples, layout.positions(), 1, layout.channels, {layout.stride[0], step, 1, 1}};
  return chunk_size<T>(level.features, rows);
}

template <class T>
void sum_channels(const Launcher& on, LocationLevel level) {
  const Layout4& layout = level.layout;
  const int64_t positions = layout.positions();
  with_index(layout, [&](auto index) {
    using Index = decltype(index);
    if (channels_are_interleaved(layout)) {
      with_elements<T>(channel_chunk_size<T>(level), [&](auto elements) {
        on.launch(sum_interleaved<T, elements, Index>, ceil_divide(layout.samples * positions, kWarpsPerBlock),
                  kLocationThreads, 0, level, Maps<Index>(layout));
      });
      return;
    }
    with_elements<T>(chunk_size<T>(level.features, layout), [&](auto elements) {
      const LocationBlock block(positions, elements);
      const int64_t parts = block.parts(positions, elements);
      on.launch(sum_group<T, elements, Index>, layout.samples * level.groups * parts, kLocationThreads, 0, level,
                Maps<Index>(layout), block, Divisor<uint32_t>(parts));
    });
  });
}

template <class T>
void write_image(const Launcher& on, const LocationHeatmap& op) {
  on.launch(location_masks<Accumulation<T>>, op.samples * op.levels, kLocationThreads, 0, op);
  int64_t longest = 0;
  for (int64_t number = 0; number < op.levels; ++number)
    longest = std::max({longest, op.level[number].height, op.level[number].width});
  const bool small = std::max(op.height, op.width) <= INT32_MAX / (2 * longest + 1) / 2;
  with_elements<T>(op.width % (16 / sizeof(T)) == 0 ? 16 / sizeof(T) : 1, [&](auto elements) {
    const auto write = [&](auto index) {
      using Index = decltype(index);
      on.launch(write_heatmap<T, elements, Index>, op.samples * LocationImage<Index>::blocks_of_sample(op, elements),
                kLocationThreads, 0, op, LocationImage<Index>(op, elements));
    };
    small ? write(uint32_t{}) : write(uint64_t{});
  });
}

Tensor location_heatmap(const std::vector<Tensor>& features, int64_t image_height, int64_t image_width) {
  const LocationHeatmapCall call = prepare_location(features, image_height, image_width, group_size);
  const Launcher on(features[0]);
  for (const LocationLevel& level : call.levels) FGVC_SWITCH_CUDA_DTYPE(level.dtype, sum_channels<T>(on, level));
  FGVC_SWITCH_CUDA_DTYPE(call.op.dtype, write_image<T>(on, call.op));
  return call.heatmap;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("location_heatmap", TORCH_BOX(&location_heatmap));
}

}  // namespace fgvc_ext
