// Semantic grouping loss (deep bilinear transformation): k · Σ_ij (co_ij − gt_ij)², where co is the mean over the
// samples of the products of the channels' directions Z. The products of matrices are the library's; what stands here
// reads or writes each element once or twice: directions, co − gt with its share of the loss, and the gradient
// dU = (dZ − Z <Z, dZ>) / |V|. A warp has a map, or a lane a channel where channels lie side by side.
#pragma once

#include "../common/semantic_grouping_loss.h"
#include "index.cuh"
#include "loss_gradient.cuh"

namespace fgvc_ext::cuda {

constexpr int kGroupingThreads = kWarpsPerBlock * kWarp;
constexpr int64_t kResidualsPerBlock = 4 * kLossThreads;

// sqrt(Σ V² + 1e-10). A length that overflows has no direction: NaN, where dividing by infinity would give zeros.
template <class Value>
__device__ Value grouping_length(Value squares) {
  const Value all = squares + static_cast<Value>(kGroupingLengthEpsilon);
  return sqrt(all - all == 0 ? all : all - all);
}

// --- a warp per map ---

template <class T, int Elements, class Index>
__global__ void __launch_bounds__(kGroupingThreads)
    directions_of_maps(GroupingDirections op, Maps<Index> maps, Maps<Index> directions) {
  using Value = Accumulation<T>;
  const Index map = Index{blockIdx.x} * kWarpsPerBlock + warp_index();
  if (map >= maps.count) return;
  const auto memory = Global<const T>(op.features).from(maps.begin(map));
  const auto output = Global<Value>(op.directions).from(directions.begin(map));
  const Value offset = static_cast<Value>(kGroupingOffset);
  Value squares = 0;
  for (uint32_t position = lane_index() * Elements; position < maps.positions; position += kWarp * Elements) {
    const auto x = maps.template load<Elements>(memory, position);
#pragma unroll
    for (int e = 0; e < Elements; ++e) squares += (widen(x.element[e]) + offset) * (widen(x.element[e]) + offset);
  }
  const Value length = grouping_length(warp_reduce(squares, Sum()));
  if (lane_index() == 0) Global<Value>(op.lengths).store(map, length);
  for (uint32_t position = lane_index() * Elements; position < maps.positions; position += kWarp * Elements) {
    const auto x = maps.template load<Elements>(memory, position);
    Chunk<Value, Elements> z;
#pragma unroll
    for (int e = 0; e < Elements; ++e) z.element[e] = (widen(x.element[e]) + offset) / length;
    directions.template store<Elements>(output, position, z);
  }
}

template <class T, int Elements, class Index>
__global__ void __launch_bounds__(kGroupingThreads)
    grouping_map_gradients(GroupingGradient op, Maps<Index> directions, Maps<Index> outputs) {
  using Value = Accumulation<T>;
  const Index map = Index{blockIdx.x} * kWarpsPerBlock + warp_index();
  if (map >= directions.count) return;
  const auto z_memory = Global<const Value>(op.directions).from(directions.begin(map));
  const auto dz_memory = Global<const Value>(op.products).from(directions.begin(map));
  const auto output = Global<T>(op.grad_features).from(outputs.begin(map));
  Value along = 0;
  for (uint32_t position = lane_index() * Elements; position < outputs.positions; position += kWarp * Elements) {
    const auto z = directions.template load<Elements>(z_memory, position);
    const auto dz = directions.template load<Elements>(dz_memory, position);
#pragma unroll
    for (int e = 0; e < Elements; ++e) along += z.element[e] * dz.element[e];
  }
  along = warp_reduce(along, Sum());
  const Value factor = static_cast<Value>(op.factor) * Global<const Value>(op.grad).load(0u);
  const Value slope = factor / Global<const Value>(op.lengths).load(map);
  for (uint32_t position = lane_index() * Elements; position < outputs.positions; position += kWarp * Elements) {
    const auto z = directions.template load<Elements>(z_memory, position);
    const auto dz = directions.template load<Elements>(dz_memory, position);
    Chunk<T, Elements> chunk;
#pragma unroll
    for (int e = 0; e < Elements; ++e) chunk.element[e] = narrow<T>((dz.element[e] - z.element[e] * along) * slope);
    outputs.template store<Elements>(output, position, chunk);
  }
}

// --- interleaved channels: one channel per lane; the block's warps share the positions ---

// The sum over the block's warps for each lane's channel. All threads of the block must call.
template <class Value>
__device__ Value sum_of_channel(Value value) {
  __shared__ Value of_warp[kWarpsPerBlock][kWarp];
  of_warp[warp_index()][lane_index()] = value;
  __syncthreads();
  Value total = 0;
  for (int warp = 0; warp < kWarpsPerBlock; ++warp) total += of_warp[warp][lane_index()];
  return total;
}

template <class T, class Index>
__global__ void __launch_bounds__(kGroupingThreads)
    directions_of_channels(GroupingDirections op, ChannelGroups<Index> groups, Maps<Index> directions) {
  using Value = Accumulation<T>;
  const ChannelGroup<Index> group(groups, blockIdx.x);
  const Maps<Index>& maps = groups.maps;
  const auto memory = Global<const T>(op.features).from(group.begin + lane_index());
  const auto output = Global<Value>(op.directions).from(directions.begin(group.first_map) + lane_index());
  const Value offset = static_cast<Value>(kGroupingOffset);
  Value squares = 0;
  if (group.lane_has_channel)
    for (uint32_t position = warp_index(); position < maps.positions; position += kWarpsPerBlock) {
      const Value v = widen(memory.load(maps.offset(position))) + offset;
      squares += v * v;
    }
  const Value length = grouping_length(sum_of_channel(squares));
  if (!group.lane_has_channel) return;
  if (warp_index() == 0) Global<Value>(op.lengths).store(group.first_map + lane_index(), length);
  for (uint32_t position = warp_index(); position < maps.positions; position += kWarpsPerBlock)
    output.store(directions.offset(position), (widen(memory.load(maps.offset(position))) + offset) / length);
}

template <class T, class Index>
__global__ void __launch_bounds__(kGroupingThreads)
    grouping_channel_gradients(GroupingGradient op, ChannelGroups<Index> groups, Maps<Index> outputs) {
  using Value = Accumulation<T>;
  const ChannelGroup<Index> group(groups, blockIdx.x);
  const Maps<Index>& directions = groups.maps;
  const auto z = Global<const Value>(op.directions).from(group.begin + lane_index());
  const auto dz = Global<const Value>(op.products).from(group.begin + lane_index());
  const auto output = Global<T>(op.grad_features).from(outputs.begin(group.first_map) + lane_index());
  Value along = 0;
  if (group.lane_has_channel)
    for (uint32_t position = warp_index(); position < outputs.positions; position += kWarpsPerBlock)
      along += z.load(directions.offset(position)) * dz.load(directions.offset(position));
  along = sum_of_channel(along);
  if (!group.lane_has_channel) return;
  const Value factor = static_cast<Value>(op.factor) * Global<const Value>(op.grad).load(0u);
  const Value slope = factor / Global<const Value>(op.lengths).load(group.first_map + lane_index());
  for (uint32_t position = warp_index(); position < outputs.positions; position += kWarpsPerBlock) {
    const Index at = directions.offset(position);
    output.store(outputs.offset(position), narrow<T>((dz.load(at) - z.load(at) * along) * slope));
  }
}

// --- co − gt in place of the products, and each block's Σ (co − gt)² ---

template <class Value>
__global__ void __launch_bounds__(kLossThreads) grouping_residuals(GroupingResidual op) {
  const int64_t count = op.channels * op.channels, first = static_cast<int64_t>(blockIdx.x) * kResidualsPerBlock;
  const auto residual = Global<Value>(op.residual);
  double total = 0;
  for (int64_t at = first + threadIdx.x; at < first + kResidualsPerBlock && at < count; at += kLossThreads) {
    const int64_t i = at / op.channels, j = at - i * op.channels;
    const Value together = i / op.per_group == j / op.per_group ? Value(1) : Value(0);
    const Value r = residual.load(at) / static_cast<Value>(op.divisor) - together;
    residual.store(at, r);
    total += static_cast<double>(r) * r;
  }
  total = block_reduce<kLossThreads>(total, Sum());
  if (threadIdx.x == 0) Global<Value>(op.losses).store(blockIdx.x, static_cast<Value>(total));
}

}  // namespace fgvc_ext::cuda
