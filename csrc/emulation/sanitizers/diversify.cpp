#include "../../cuda/diversify.cuh"

#include "../../cuda/spread_bits.cuh"
#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

// The mask of maps: by one warp per map, by one lane per channel, by one block per map.
template <class T, int Elements, class Index>
void by_map(const Diversify& op) {
  const Patches patches(op);
  launch(suppress_and_pool<T, Elements, Index>, blocks_for(op.layout.maps(), kWarpsPerBlock), kDiversifyThreads,
         DiversifyShared(patches, op.layout.positions(), kWarpsPerBlock).bits, nullptr, op, patches,
         Maps<Index>(op.layout));
}
template <class T, class Index>
void by_channel(const Diversify& op) {
  const Patches patches(op);
  launch(suppress_channels<T, Index>, ChannelGroups<Index>::blocks(op.layout), kDiversifyThreads,
         DiversifyShared(patches, op.layout.positions(), kWarp).bits, nullptr, op, patches,
         ChannelGroups<Index>(op.layout));
}
template <class T, bool DrawsFit>
void by_block(const Diversify& op) {
  const Patches patches(op);
  launch(suppress_large<T, uint32_t>, op.layout.maps(), kDiversifyThreads, DrawsFit ? patches.calls * 4 : 0, nullptr,
         op, patches, Maps<uint32_t>(op.layout), DrawsFit);
}

template <class T, class Op, int Elements, class Index>
void to_map(const Op& op) {
  const auto chunks = blocks_for(op.layout.positions(), Elements);
  launch(spread_maps<T, Op, Elements, Index>, blocks_for(op.layout.maps() * chunks, kSpreadThreads), kSpreadThreads, 0,
         nullptr, op, Maps<Index>(op.layout), Divisor<Index>(chunks));
}
template <class T, class Op, class Index>
void to_channel(const Op& op) {
  launch(spread_channels<T, Op, Index>, ChannelGroups<Index>::blocks(op.layout), kSpreadThreads,
         kWarp * blocks_for(op.layout.positions(), kByte), nullptr, op, ChannelGroups<Index>(op.layout));
}

template <class T>
void run(void (*suppress)(const Diversify&), void (*spread)(const SpreadGradient&),
         void (*spread_mask)(const SpreadMask&), const Layout4& layout, int64_t patch_size, bool seed_per_sample,
         Digest& digest) {
  const int64_t maps = layout.maps(), bytes = (layout.positions() + kByte - 1) / kByte;
  const auto features = numbers<T>(maps * layout.positions(), 4), grad = numbers<T>(maps, 5);
  std::vector<int64_t> seed(seed_per_sample ? layout.samples : 1, -17);
  std::vector<T> scores(maps), grad_maps(features.size());
  std::vector<uint8_t> bits(maps * bytes), mask(features.size());

  Diversify forward{};
  forward.layout = layout;
  forward.maps = features.data();
  forward.seed = seed.data();
  forward.seed_per_sample = seed_per_sample;
  forward.peak_threshold = forward.patch_threshold = uint64_t{1} << 31;
  forward.patch_size = patch_size;
  forward.alpha = 0.1;
  forward.scores = scores.data();
  forward.bits = bits.data();
  suppress(forward);

  SpreadGradient backward{};
  backward.layout = layout;
  backward.grad = grad.data();
  backward.bits = bits.data();
  backward.alpha = 0.1;
  backward.output = grad_maps.data();
  spread(backward);
  SpreadMask shown{};
  shown.layout = layout;
  shown.bits = bits.data();
  shown.output = mask.data();
  spread_mask(shown);

  digest.add(scores);
  digest.add(bits);
  digest.add(grad_maps);
  digest.add(mask);
}

void launches(Digest& digest) {
  using U32 = uint32_t;
  using U64 = uint64_t;
  using BF16 = __nv_bfloat16;
  using Gradient = SpreadGradient;
  using Mask = SpreadMask;
  constexpr int64_t kWhole = 6;  // a patch that holds the map
  run<float>(by_map<float, 1, U32>, to_map<float, Gradient, 1, U32>, to_map<uint8_t, Mask, 1, U32>,
             contiguous(2, 5, 7, 7), 3, true, digest);
  run<float>(by_map<float, 4, U32>, to_map<float, Gradient, 4, U64>, to_map<uint8_t, Mask, 1, U32>,
             contiguous(1, 9, 14, 14), 3, false, digest);
  run<float>(by_channel<float, U32>, to_channel<float, Gradient, U32>, to_channel<uint8_t, Mask, U32>,
             channels_last(2, 3, 5, 9), 2, true, digest);
  run<float>(by_block<float, true>, to_map<float, Gradient, 2, U32>, to_map<uint8_t, Mask, 1, U64>,
             contiguous(1, 2, 20, 17), 1, true, digest);
  run<double>(by_map<double, 2, U64>, to_map<double, Gradient, 2, U32>, to_map<uint8_t, Mask, 1, U32>,
              contiguous(1, 8, 6, 5), 4, true, digest);
  run<double>(by_block<double, false>, to_channel<double, Gradient, U64>, to_channel<uint8_t, Mask, U64>,
              channels_last(3, 3, 1, 1), 3, false, digest);
  run<BF16>(by_map<BF16, 8, U32>, to_map<BF16, Gradient, 8, U32>, to_map<uint8_t, Mask, 8, U32>,
            contiguous(2, 5, 8, 40), 3, true, digest);
  run<__half>(by_map<__half, 4, U32>, to_map<__half, Gradient, 4, U32>, to_map<uint8_t, Mask, 1, U32>,
              contiguous(1, 11, 2, 6), kWhole, false, digest);
  run<__half>(by_channel<__half, U64>, to_channel<__half, Gradient, U32>, to_channel<uint8_t, Mask, U32>,
              channels_last(1, 39, 4, 4), 9, true, digest);
}

const Registration registration("diversify", launches);

}  // namespace
}  // namespace fgvc_ext::sanitizers
