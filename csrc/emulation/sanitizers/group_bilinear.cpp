#include "../../cuda/group_bilinear.cuh"
#include "../../cuda/group_bilinear_interleaved.cuh"

#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

template <class T, int Elements, class Index>
void by_position(const GroupBilinear& forward, const GroupBilinearBackward& backward) {
  const Layout4& layout = forward.input.layout;
  const Maps<Index> maps(layout), outputs(forward.output_layout);
  const DeviceResize resize(forward.resize);
  const unsigned pieces = blocks_for(layout.positions(), kWarp * Elements), p = forward.input.per_group;
  const unsigned windows = blocks_for(p, kWindowRows) * blocks_for(p, kWindowColumns<Elements>);
  const size_t shared =
      kWindowWarps * kWindowRows * kWindowColumns<Elements> * kWarp * Elements * sizeof(Accumulation<T>);
  const unsigned pieces_of_all = pieces * layout.samples;
  launch(pool_positions<T, Elements, Index>, dim3(pieces_of_all, blocks_for(windows, kWindowWarps)), kWindowThreads,
         shared, nullptr, forward, maps, outputs, resize, Divisor<uint32_t>(pieces));
  const unsigned blocks = blocks_for(p, kWindowRows) * blocks_for(forward.input.groups, kGroupsPerBlock);
  launch(gradient_of_positions<T, Elements, Index>, dim3(pieces_of_all, blocks), kWindowThreads,
         kSlopes * kWarp * Elements * sizeof(Accumulation<T>), nullptr, backward, maps, outputs, maps, resize,
         Divisor<uint32_t>(pieces));
}

template <class T, class Index>
void by_channel(const GroupBilinear& forward, const GroupBilinearBackward& backward) {
  const Layout4& layout = forward.input.layout;
  const Maps<Index> maps(layout), outputs(forward.output_layout);
  const DeviceResize resize(forward.resize);
  const unsigned positions = layout.positions(), blocks = layout.samples * positions;
  const int64_t values = layout.channels + forward.resize.channels + forward.input.responses();
  launch(pool_interleaved<T, Index>, blocks, kBilinearThreads, layout.channels * sizeof(Accumulation<T>), nullptr,
         forward, maps, outputs, resize, Divisor<uint32_t>(positions));
  launch(gradient_of_interleaved<T, Index>, blocks, kBilinearThreads, values * sizeof(Accumulation<T>), nullptr,
         backward, maps, outputs, maps, resize, Divisor<uint32_t>(positions));
}

template <class T>
void run(void (*kernels)(const GroupBilinear&, const GroupBilinearBackward&), const Layout4& layout,
         const Layout4& output_layout, int64_t groups, Digest& digest) {
  using Value = Accumulation<T>;
  const int64_t positions = layout.positions(), channels = output_layout.channels;
  const auto features = numbers<T>(layout.maps() * positions, 14);
  const auto grad = numbers<T>(layout.samples * channels * positions, 15);
  const auto code = numbers<Value>(layout.channels, 16);
  std::vector<T> output(grad.size()), grad_features(features.size());

  GroupBilinear forward{};
  forward.input.layout = layout;
  forward.input.groups = groups;
  forward.input.per_group = layout.channels / groups;
  forward.input.scale = 0.03125;
  forward.input.features = features.data();
  forward.input.position = groups % 2 ? nullptr : code.data();
  forward.output_layout = output_layout;
  forward.resize = {forward.input.responses(), channels};
  forward.output = output.data();

  GroupBilinearBackward backward{};
  backward.input = forward.input;
  backward.grad_layout = output_layout;
  backward.grad_features_layout = layout;
  backward.resize = forward.resize;
  backward.grad = grad.data();
  backward.grad_features = grad_features.data();

  kernels(forward, backward);
  digest.add(output);
  digest.add(grad_features);
}

void launches(Digest& digest) {
  using U32 = uint32_t;
  using U64 = uint64_t;
  using BF16 = __nv_bfloat16;
  run<float>(by_position<float, 1, U32>, contiguous(2, 15, 5, 7), contiguous(2, 15, 5, 7), 3, digest);
  run<float>(by_position<float, 2, U64>, contiguous(1, 16, 6, 6), contiguous(1, 16, 6, 6), 4, digest);
  run<double>(by_position<double, 1, U32>, channels_last(1, 36, 4, 3), channels_last(1, 5, 4, 3), 18, digest);
  run<BF16>(by_position<BF16, 4, U32>, contiguous(1, 18, 12, 12), contiguous(1, 40, 12, 12), 1, digest);
  run<float>(by_channel<float, U32>, channels_last(2, 18, 3, 4), channels_last(2, 18, 3, 4), 3, digest);
  run<double>(by_channel<double, U64>, channels_last(1, 16, 2, 2), channels_last(1, 16, 2, 2), 4, digest);
  run<__half>(by_channel<__half, U32>, channels_last(1, 12, 2, 3), channels_last(1, 1, 2, 3), 2, digest);
}

const Registration registration("group_bilinear", launches);

}  // namespace
}  // namespace fgvc_ext::sanitizers
