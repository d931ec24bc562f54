#include "../../cuda/global_k_max_pool.cuh"

#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

template <class T>
void run(void (*pool)(GlobalKMaxPool), void (*scatter)(GlobalKMaxPoolBackward), const Layout4& layout, int64_t k,
         Digest& digest) {
  using Value = Accumulation<T>;
  const int64_t maps = layout.maps();
  const auto features = numbers<T>(maps * layout.positions(), 1), grad = numbers<T>(maps, 2);
  const auto weight = numbers<Value>(k, 3);
  std::vector<T> output(maps), grad_features(features.size());
  std::vector<int16_t> indices(maps * k);
  std::vector<Value> values(maps * k), grad_weight(k);
  const dim3 grid(blocks_for(maps, kMapsPerBlock)), block(kMapsPerBlock * kWarp);

  GlobalKMaxPool forward{};
  forward.layout = layout;
  forward.k = k;
  forward.features = features.data();
  forward.weight = weight.data();
  forward.output = output.data();
  forward.indices = indices.data();
  forward.narrow_indices = true;
  forward.values = values.data();
  launch(pool, grid, block, 0, nullptr, forward);

  GlobalKMaxPoolBackward backward{};
  backward.layout = layout;
  backward.k = k;
  backward.grad = grad.data();
  backward.indices = indices.data();
  backward.narrow_indices = true;
  backward.weight = weight.data();
  backward.grad_features = grad_features.data();
  launch(scatter, grid, block, 0, nullptr, backward);

  const int64_t chunks = blocks_for(maps, kMapsPerChunk);
  std::vector<Value> sums(chunks * k);
  GlobalKMaxPoolWeightGrad of_weight{};
  of_weight.k = k;
  of_weight.grad = grad.data();
  of_weight.values = values.data();
  of_weight.sums = sums.data();
  launch(sum_weight_gradient<T>, static_cast<unsigned>(chunks), kWeightThreads, 0, nullptr, of_weight, maps);
  launch(sum_chunks<Value>, static_cast<unsigned>(k), kWeightThreads, 0, nullptr, sums.data(), grad_weight.data(),
         chunks, k);

  digest.add(output);
  digest.add(indices);
  digest.add(values);
  digest.add(grad_features);
  digest.add(grad_weight);
}

}  // namespace

void global_k_max_pool(Digest& digest) {
  run<float>(pool_with_lists<float, 4, 1>, scatter_gradient<float, 1>, contiguous(2, 5, 7, 7), 4, digest);
  run<float>(pool_with_lists<float, 4, 4>, scatter_gradient<float, 4>, contiguous(1, 9, 14, 14), 3, digest);
  run<float>(pool_with_lists<float, 16, 1>, scatter_gradient<float, 1>, channels_last(1, 10, 6, 5), 16, digest);
  run<float>(pool_rank_by_rank<float>, scatter_gradient<float, 2>, contiguous(1, 3, 5, 6), 30, digest);
  run<double>(pool_with_lists<double, 8, 2>, scatter_gradient<double, 2>, contiguous(1, 8, 4, 6), 7, digest);
  run<double>(pool_rank_by_rank<double>, scatter_gradient<double, 1>, channels_last(2, 3, 5, 5), 17, digest);
  run<__nv_bfloat16>(pool_with_lists<__nv_bfloat16, 1, 8>, scatter_gradient<__nv_bfloat16, 8>, contiguous(2, 5, 8, 8),
                     1, digest);
  run<__half>(pool_with_lists<__half, 4, 2>, scatter_gradient<__half, 2>, contiguous(1, 11, 3, 6), 2, digest);
  run<__half>(pool_with_lists<__half, 1, 1>, scatter_gradient<__half, 1>, channels_last(3, 3, 1, 1), 1, digest);
}

}  // namespace fgvc_ext::sanitizers
