#include "../../cuda/diversify.cuh"

#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

template <class T>
void run(void (*pool)(Diversify, int64_t, bool), void (*spread)(SpreadBits, int64_t), const Layout4& layout,
         int64_t patch_size, bool draws_in_shared, Digest& digest) {
  const int64_t maps = layout.maps(), bytes = (layout.positions() + kByte - 1) / kByte;
  const auto features = numbers<T>(maps * layout.positions(), 4), grad = numbers<T>(maps, 5);
  std::vector<int64_t> seed(draws_in_shared ? layout.samples : 1, -17);
  std::vector<T> scores(maps), grad_maps(features.size());
  std::vector<uint8_t> bits(maps * bytes), mask(features.size());

  Diversify forward{};
  forward.layout = layout;
  forward.maps = features.data();
  forward.seed = seed.data();
  forward.seed_per_sample = draws_in_shared;
  forward.peak_threshold = forward.patch_threshold = uint64_t{1} << 31;
  forward.patch_size = patch_size;
  forward.alpha = 0.1;
  forward.scores = scores.data();
  forward.bits = bits.data();
  const int64_t calls = blocks_for(1 + forward.patch_rows() * forward.patch_columns(), 4);
  launch(pool, blocks_for(maps, kMapsPerBlock), kMapsPerBlock * kWarp, draws_in_shared ? calls * kMapsPerBlock : 0,
         nullptr, forward, calls, draws_in_shared);

  SpreadBits backward{};
  backward.layout = layout;
  backward.grad = grad.data();
  backward.bits = bits.data();
  backward.alpha = 0.1;
  backward.output = grad_maps.data();
  launch(spread, blocks_for(maps * bytes, kSpreadThreads), kSpreadThreads, 0, nullptr, backward, maps * bytes);
  backward.output = mask.data();
  launch(spread_mask, blocks_for(maps * bytes, kSpreadThreads), kSpreadThreads, 0, nullptr, backward, maps * bytes);

  digest.add(scores);
  digest.add(bits);
  digest.add(grad_maps);
  digest.add(mask);
}

}  // namespace

void diversify(Digest& digest) {
  run<float>(suppress_and_pool<float, 1>, spread_gradient<float, 1>, contiguous(2, 5, 7, 7), 3, true, digest);
  run<float>(suppress_and_pool<float, 4>, spread_gradient<float, 4>, contiguous(1, 9, 14, 14), 3, true, digest);
  run<float>(suppress_and_pool<float, 1>, spread_gradient<float, 1>, channels_last(2, 3, 5, 9), 2, false, digest);
  run<float>(suppress_and_pool<float, 2>, spread_gradient<float, 2>, contiguous(1, 2, 20, 17), 1, true, digest);
  run<double>(suppress_and_pool<double, 2>, spread_gradient<double, 2>, contiguous(1, 8, 6, 5), 4, true, digest);
  run<double>(suppress_and_pool<double, 1>, spread_gradient<double, 1>, channels_last(3, 3, 1, 1), 3, false, digest);
  run<__nv_bfloat16>(suppress_and_pool<__nv_bfloat16, 8>, spread_gradient<__nv_bfloat16, 8>, contiguous(2, 5, 8, 9), 3,
                     true, digest);
  run<__half>(suppress_and_pool<__half, 2>, spread_gradient<__half, 2>, contiguous(1, 11, 3, 6), 2, false, digest);
  run<__half>(suppress_and_pool<__half, 1>, spread_gradient<__half, 1>, channels_last(1, 9, 4, 4), 9, true, digest);
}

}  // namespace fgvc_ext::sanitizers
