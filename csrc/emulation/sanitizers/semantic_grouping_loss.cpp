#include "../../cuda/semantic_grouping_loss.cuh"

#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

template <class T, int Elements, class Index>
void by_map(const GroupingDirections& forward, const GroupingGradient& backward) {
  const unsigned blocks = blocks_for(forward.layout.maps(), kWarpsPerBlock);
  const Maps<Index> maps(forward.layout), directions(forward.directions_layout);
  launch(directions_of_maps<T, Elements, Index>, blocks, kGroupingThreads, 0, nullptr, forward, maps, directions);
  launch(grouping_map_gradients<T, Elements, Index>, blocks, kGroupingThreads, 0, nullptr, backward, directions, maps);
}
template <class T, class Index>
void by_channel(const GroupingDirections& forward, const GroupingGradient& backward) {
  const ChannelGroups<Index> groups(forward.layout), of_directions(forward.directions_layout);
  const auto blocks = static_cast<unsigned>(ChannelGroups<Index>::blocks(forward.layout));
  launch(directions_of_channels<T, Index>, blocks, kGroupingThreads, 0, nullptr, forward, groups,
         Maps<Index>(forward.directions_layout));
  launch(grouping_channel_gradients<T, Index>, blocks, kGroupingThreads, 0, nullptr, backward, of_directions,
         Maps<Index>(forward.layout));
}

template <class T>
void run(void (*kernels)(const GroupingDirections&, const GroupingGradient&), const Layout4& layout,
         const Layout4& directions_layout, Digest& digest) {
  using Value = Accumulation<T>;
  const auto features = numbers<T>(layout.maps() * layout.positions(), 17);
  const auto products = numbers<Value>(static_cast<int64_t>(features.size()), 18), grad = numbers<Value>(1, 19);
  std::vector<Value> directions(features.size()), lengths(layout.maps());
  std::vector<T> grad_features(features.size());

  GroupingDirections forward{};
  forward.layout = layout;
  forward.directions_layout = directions_layout;
  forward.features = features.data();
  forward.directions = directions.data();
  forward.lengths = lengths.data();

  GroupingGradient backward{};
  backward.directions_layout = directions_layout;
  backward.grad_layout = layout;
  backward.factor = 0.5;
  backward.grad = grad.data();
  backward.directions = directions.data();
  backward.lengths = lengths.data();
  backward.products = products.data();
  backward.grad_features = grad_features.data();

  kernels(forward, backward);
  digest.add(directions);
  digest.add(lengths);
  digest.add(grad_features);
}

template <class Value>
void compare(int64_t channels, int64_t per_group, Digest& digest) {
  auto residual = numbers<Value>(channels * channels, 20);
  const unsigned blocks = blocks_for(channels * channels, kResidualsPerBlock);
  std::vector<Value> losses(blocks);
  GroupingResidual op{};
  op.channels = channels;
  op.per_group = per_group;
  op.divisor = 3;
  op.residual = residual.data();
  op.losses = losses.data();
  launch(grouping_residuals<Value>, blocks, kLossThreads, 0, nullptr, op);
  digest.add(residual);
  digest.add(losses);
}

void launches(Digest& digest) {
  using U32 = uint32_t;
  using U64 = uint64_t;
  const auto rows = [](int64_t n, int64_t c, int64_t h, int64_t w) {
    return Layout4{n, c, h, w, {h * w, n * h * w, w, 1}};
  };
  run<float>(by_map<float, 4, U32>, contiguous(2, 9, 6, 6), rows(2, 9, 6, 6), digest);
  run<double>(by_map<double, 1, U64>, contiguous(1, 3, 5, 7), rows(1, 3, 5, 7), digest);
  run<__nv_bfloat16>(by_map<__nv_bfloat16, 4, U32>, contiguous(1, 17, 12, 12), rows(1, 17, 12, 12), digest);
  run<float>(by_channel<float, U32>, channels_last(2, 45, 3, 5), channels_last(2, 45, 3, 5), digest);
  run<__half>(by_channel<__half, U64>, channels_last(1, 32, 1, 2), channels_last(1, 32, 1, 2), digest);
  compare<float>(40, 8, digest);
  compare<double>(3, 3, digest);
}

const Registration registration("semantic_grouping_loss", launches);

}  // namespace
}  // namespace fgvc_ext::sanitizers
