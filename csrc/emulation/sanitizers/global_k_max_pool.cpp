#include "../../cuda/global_k_max_pool.cuh"

#include "../../cuda/global_k_max_pool_backward.cuh"
#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

// Features, pooled: by one warp per map, or a block; by one lane per channel; sorted.
template <class T, int Elements, int Warps, class Index>
void by_map(const GlobalKMaxPool& op) {
  const auto maps = op.layout.maps();
  launch(pool_maps<T, Elements, Warps, Index>, blocks_for(maps, kWarpsPerBlock / Warps), kPoolThreads, 0, nullptr, op,
         Maps<Index>(op.layout));
}
template <class T, int Capacity, class Index>
void by_channel(const GlobalKMaxPool& op) {
  launch(pool_channels<T, Capacity, Index>, ChannelGroups<Index>::blocks(op.layout), kPoolThreads, 0, nullptr, op,
         ChannelGroups<Index>(op.layout));
}
template <class T, class Index>
void by_sorting(const GlobalKMaxPool& op) {
  launch(pool_sorted<T, Index>, op.layout.maps(), kPoolThreads, 0, nullptr, op, Maps<Index>(op.layout));
}

template <class T, int Elements, class Index>
void to_map(const GlobalKMaxPoolBackward& op) {
  const dim3 grid(blocks_for(op.layout.maps(), kWarpsPerBlock), blocks_for(op.layout.positions(), kScatterPart));
  launch(scatter_maps<T, Elements, Index>, grid, kScatterThreads, 0, nullptr, op, Maps<Index>(op.layout));
}
template <class T, int Capacity, class Index>
void to_channel(const GlobalKMaxPoolBackward& op) {
  const dim3 grid(ChannelGroups<Index>::blocks(op.layout), blocks_for(op.layout.positions(), kScatterPart));
  launch(scatter_channels<T, Capacity, Index>, grid, kScatterThreads, 0, nullptr, op, ChannelGroups<Index>(op.layout));
}

template <class T>
void run(void (*pool)(const GlobalKMaxPool&), void (*scatter)(const GlobalKMaxPoolBackward&), const Layout4& layout,
         int64_t k, Digest& digest) {
  using Value = Accumulation<T>;
  const int64_t maps = layout.maps();
  const auto features = numbers<T>(maps * layout.positions(), 1), grad = numbers<T>(maps, 2);
  const auto weight = numbers<Value>(k, 3);
  std::vector<T> output(maps), grad_features(features.size());
  std::vector<int16_t> indices(maps * k);
  std::vector<Value> values(maps * k), grad_weight(k);

  GlobalKMaxPool forward{};
  forward.layout = layout;
  forward.k = k;
  forward.features = features.data();
  forward.weight = weight.data();
  forward.output = output.data();
  forward.indices = indices.data();
  forward.narrow_indices = true;
  forward.values = values.data();
  pool(forward);
  digest.add(output);
  digest.add(indices);
  digest.add(values);

  indices.back() = -1;  // saved tensors that are wrong do no harm
  indices.front() = static_cast<int16_t>(layout.positions());
  GlobalKMaxPoolBackward backward{};
  backward.layout = layout;
  backward.k = k;
  backward.grad = grad.data();
  backward.indices = indices.data();
  backward.narrow_indices = true;
  backward.weight = weight.data();
  backward.grad_features = grad_features.data();
  scatter(backward);

  const int64_t chunks = blocks_for(maps, kMapsPerChunk);
  std::vector<Value> sums(chunks * k);
  GlobalKMaxPoolWeightGrad of_weight{};
  of_weight.k = k;
  of_weight.maps = maps;
  of_weight.grad = grad.data();
  of_weight.values = values.data();
  of_weight.sums = sums.data();
  launch(sum_weight_gradient<T, uint32_t>, static_cast<unsigned>(chunks), kWeightThreads, 0, nullptr, of_weight,
         static_cast<uint32_t>(maps));
  launch(sum_chunks<Value>, static_cast<unsigned>(k), kWeightThreads, 0, nullptr, Global<const Value>(sums.data()),
         Global<Value>(grad_weight.data()), chunks, k);
  digest.add(grad_features);
  digest.add(grad_weight);
}

void launches(Digest& digest) {
  using U32 = uint32_t;
  using U64 = uint64_t;
  using BF16 = __nv_bfloat16;
  run<float>(by_map<float, 1, 1, U32>, to_map<float, 1, U32>, contiguous(2, 5, 7, 7), 4, digest);
  run<float>(by_map<float, 4, 1, U32>, to_map<float, 4, U64>, contiguous(1, 9, 14, 14), 3, digest);
  run<float>(by_map<float, 4, 8, U64>, to_map<float, 4, U32>, contiguous(1, 2, 36, 36), 32, digest);
  run<float>(by_channel<float, 16, U32>, to_channel<float, 16, U32>, channels_last(1, 10, 6, 5), 16, digest);
  run<float>(by_sorting<float, U32>, to_map<float, 2, U32>, contiguous(1, 3, 5, 8), 40, digest);
  run<float>(by_sorting<float, U32>, to_map<float, 4, U32>, contiguous(1, 1, 48, 48), 2100, digest);
  run<double>(by_map<double, 2, 1, U64>, to_map<double, 2, U32>, contiguous(1, 8, 4, 6), 7, digest);
  run<double>(by_channel<double, 8, U64>, to_channel<double, 8, U64>, channels_last(2, 33, 5, 5), 7, digest);
  run<double>(by_sorting<double, U64>, to_map<double, 1, U64>, channels_last(2, 3, 7, 5), 33, digest);
  run<BF16>(by_map<BF16, 8, 1, U32>, to_map<BF16, 8, U32>, contiguous(2, 5, 8, 8), 1, digest);
  run<BF16>(by_channel<BF16, 4, U32>, to_channel<BF16, 4, U32>, channels_last(2, 40, 14, 14), 4, digest);
  run<__half>(by_map<__half, 4, 1, U32>, to_map<__half, 4, U32>, contiguous(1, 11, 2, 6), 2, digest);
  run<__half>(by_channel<__half, 1, U32>, to_channel<__half, 1, U32>, channels_last(3, 3, 1, 1), 1, digest);
}

const Registration registration("global_k_max_pool", launches);

}  // namespace
}  // namespace fgvc_ext::sanitizers
