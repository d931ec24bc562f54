#include "../../cuda/spatial_attention_map.cuh"

#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

// The sums of each group of channels: by one warp per map, by one lane per channel, or in two steps.
template <class T, int Values, int Elements, class Index>
void by_map(const SpatialAttentionMap& op) {
  const size_t shared = kWarpsPerBlock * op.layout.positions() * sizeof(Accumulation<T>);
  launch(weigh_maps<T, Values, Elements, Index>, op.layout.samples * op.groups, kAttentionThreads, shared, nullptr, op,
         Maps<Index>(op.layout));
}
template <class T, class Index>
void by_channel(const SpatialAttentionMap& op) {
  launch(weigh_channels<T, Index>, op.layout.samples * op.groups, kAttentionThreads,
         op.layout.positions() * sizeof(Accumulation<T>), nullptr, op, Maps<Index>(op.layout));
}
template <class T, class Index>
void by_position(const SpatialAttentionMap& op) {
  using Value = Accumulation<T>;
  std::vector<Value> means(op.layout.maps());
  const Maps<Index> maps(op.layout);
  launch(channel_means<T, Index>, op.layout.maps(), kAttentionThreads, 0, nullptr, Global<const T>(op.features), maps,
         Global<Value>(means.data()));
  const dim3 grid(op.layout.samples * op.groups, blocks_for(op.layout.positions(), kAttentionThreads));
  launch(weigh_positions<T, Index>, grid, kAttentionThreads, 0, nullptr, op, maps, Global<const Value>(means.data()));
}

template <class T, int Elements, class Index>
void to_map(const SpatialAttentionMapBackward& op) {
  launch(gradient_of_maps<T, Elements, Index>, blocks_for(op.layout.maps(), kWarpsPerBlock), kAttentionThreads, 0,
         nullptr, op, Maps<Index>(op.layout), Maps<Index>(op.grad_layout));
}
template <class T, class Index>
void to_channel(const SpatialAttentionMapBackward& op) {
  launch(gradient_of_channels<T, Index>, ChannelGroups<Index>::blocks(op.layout), kAttentionThreads, 0, nullptr, op,
         ChannelGroups<Index>(op.layout), Maps<Index>(op.grad_layout));
}

template <class T>
void run(void (*weigh)(const SpatialAttentionMap&), void (*gradient)(const SpatialAttentionMapBackward&),
         const Layout4& layout, int64_t channels_per_group, Digest& digest) {
  using Value = Accumulation<T>;
  const int64_t positions = layout.positions();
  const auto features = numbers<T>(layout.maps() * positions, 12), grad = numbers<T>(layout.samples * positions, 13);
  const int64_t groups = blocks_for(layout.channels, channels_per_group);
  std::vector<Value> sums(layout.samples * groups * positions);
  std::vector<T> map(grad.size()), grad_features(features.size());

  SpatialAttentionMap forward{};
  forward.layout = layout;
  forward.groups = groups;
  forward.channels_per_group = channels_per_group;
  forward.features = features.data();
  forward.sums = sums.data();
  forward.map = map.data();
  weigh(forward);
  launch(attention_totals<T>, blocks_for(layout.samples * positions, kAttentionThreads), kAttentionThreads, 0, nullptr,
         forward, positions);

  SpatialAttentionMapBackward backward{};
  backward.layout = backward.grad_layout = layout;
  backward.features = features.data();
  backward.grad = grad.data();
  backward.grad_features = grad_features.data();
  gradient(backward);

  digest.add(sums);
  digest.add(map);
  digest.add(grad_features);
}

void launches(Digest& digest) {
  using U32 = uint32_t;
  using U64 = uint64_t;
  using BF16 = __nv_bfloat16;
  run<float>(by_map<float, 8, 1, U32>, to_map<float, 1, U32>, contiguous(2, 19, 7, 7), 16, digest);
  run<float>(by_map<float, 8, 4, U64>, to_map<float, 4, U64>, contiguous(1, 9, 14, 14), 256, digest);
  run<float>(by_map<float, 32, 4, U32>, to_map<float, 2, U32>, contiguous(1, 3, 20, 20), 2, digest);
  run<float>(by_position<float, U32>, to_map<float, 1, U32>, contiguous(1, 3, 40, 40), 2, digest);
  run<float>(by_channel<float, U32>, to_channel<float, U32>, channels_last(2, 45, 5, 9), 40, digest);
  run<double>(by_channel<double, U64>, to_channel<double, U64>, channels_last(1, 33, 3, 3), 256, digest);
  run<double>(by_position<double, U64>, to_map<double, 1, U32>, channels_last(2, 3, 6, 5), 2, digest);
  run<BF16>(by_map<BF16, 8, 8, U32>, to_map<BF16, 8, U32>, contiguous(2, 5, 8, 8), 3, digest);
  run<__half>(by_channel<__half, U32>, to_channel<__half, U32>, channels_last(1, 2, 1, 1), 256, digest);
}

const Registration registration("spatial_attention_map", launches);

}  // namespace
}  // namespace fgvc_ext::sanitizers
