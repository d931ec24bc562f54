// Spatial attention map, knowledge transfer eq. 1: M = mean_c(g_c · F_c) with g_c = mean_p F_c(p).
//
// A block adds up g_c F_c over one group of channels of one sample, in registers or shared memory, so that features are
// read from memory once; a second kernel adds up the groups in their order. Backward needs Σ_p F_c(p) and
// Σ_q dM(q) F_c(q) of each channel, for which it reads the features once; what it writes follows from them and from dM.
#pragma once

#include "../common/spatial_attention_map.h"
#include "index.cuh"
#include "reduction.cuh"

namespace fgvc_ext::cuda {

constexpr int kAttentionThreads = kWarpsPerBlock * kWarp;
constexpr int64_t kChannelsPerGroup = 256;
// Values of a map that one lane holds in registers: maps of up to 256 or 1,024 positions.
constexpr int kFewValues = 8, kMoreValues = 32;

// The block's group of channels.
struct AttentionGroup {
  int64_t sample, first_channel, channels;

  template <class Op>
  __device__ AttentionGroup(const Op& op, int64_t number)
      : sample(number / op.groups), first_channel((number - sample * op.groups) * op.channels_per_group) {
    const int64_t left = op.layout.channels - first_channel;
    channels = left < op.channels_per_group ? left : op.channels_per_group;
  }
};

// --- forward: maps whose positions lie side by side, one warp per map ---

template <class T, int Values, int Elements, class Index>
__global__ void __launch_bounds__(kAttentionThreads) weigh_maps(SpatialAttentionMap op, Maps<Index> maps) {
  using Value = Accumulation<T>;
  constexpr int kChunks = Values / Elements;
  const auto of_warp = dynamic_shared<Value>();  // [warps][positions]
  const AttentionGroup group(op, blockIdx.x);
  const uint32_t positions = maps.positions;
  const unsigned lane = lane_index(), warp = warp_index();
  Value sums[kChunks][Elements] = {};
  for (int64_t c = warp; c < group.channels; c += kWarpsPerBlock) {
    const auto map = static_cast<Index>(group.sample * op.layout.channels + group.first_channel + c);
    const auto memory = Global<const T>(op.features).from(maps.begin(map));
    Value x[kChunks][Elements], total = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const uint32_t position = (i * kWarp + lane) * Elements;
      if (position < positions) {
        const auto chunk = maps.template load<Elements>(memory, position);
#pragma unroll
        for (int e = 0; e < Elements; ++e) x[i][e] = widen(chunk.element[e]);
      } else {
#pragma unroll
        for (int e = 0; e < Elements; ++e) x[i][e] = 0;
      }
#pragma unroll
      for (int e = 0; e < Elements; ++e) total += x[i][e];
    }
    const Value gain = warp_reduce(total, Sum()) / static_cast<Value>(positions);
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
#pragma unroll
      for (int e = 0; e < Elements; ++e) sums[i][e] += gain * x[i][e];
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i)
#pragma unroll
    for (int e = 0; e < Elements; ++e) {
      const uint32_t position = (i * kWarp + lane) * Elements + e;
      if (position < positions) of_warp[warp * positions + position] = sums[i][e];
    }
  __syncthreads();
  const auto output = Global<Value>(op.sums).from(static_cast<int64_t>(blockIdx.x) * positions);
  for (uint32_t position = threadIdx.x; position < positions; position += kAttentionThreads) {
    Value total = of_warp[position];
    for (int other = 1; other < kWarpsPerBlock; ++other) total += of_warp[other * positions + position];
    output.store(position, total);
  }
}

// --- forward: interleaved channels, one channel per lane; a warp takes every eighth position ---

template <class T, class Index>
__global__ void __launch_bounds__(kAttentionThreads) weigh_channels(SpatialAttentionMap op, Maps<Index> maps) {
  using Value = Accumulation<T>;
  __shared__ Value of_warp[kWarpsPerBlock][kWarp];
  const auto sums = dynamic_shared<Value>();  // [positions]
  const AttentionGroup group(op, blockIdx.x);
  const uint32_t positions = maps.positions;
  const unsigned lane = lane_index(), warp = warp_index();
  for (uint32_t position = threadIdx.x; position < positions; position += kAttentionThreads) sums[position] = 0;
  for (int64_t done = 0; done < group.channels; done += kWarp) {
    const bool taken = done + lane < group.channels;
    const auto map = static_cast<Index>(group.sample * op.layout.channels + group.first_channel + done);
    const auto memory = Global<const T>(op.features).from(maps.begin(map) + lane);
    Value total = 0;
    if (taken)
      for (uint32_t position = warp; position < positions; position += kWarpsPerBlock)
        total += widen(memory.load(maps.offset(position)));
    __syncthreads();  // what the last channels left here has been read
    of_warp[warp][lane] = total;
    __syncthreads();
    Value gain = 0;
    for (int other = 0; other < kWarpsPerBlock; ++other) gain += of_warp[other][lane];
    gain /= static_cast<Value>(positions);
    for (uint32_t position = warp; position < positions; position += kWarpsPerBlock) {
      const Value x = taken ? gain * widen(memory.load(maps.offset(position))) : Value(0);
      const Value of_channels = warp_reduce(x, Sum());
      if (lane == 0) sums[position] += of_channels;
    }
  }
  __syncthreads();
  const auto output = Global<Value>(op.sums).from(static_cast<int64_t>(blockIdx.x) * positions);
  for (uint32_t position = threadIdx.x; position < positions; position += kAttentionThreads)
    output.store(position, sums[position]);
}

// --- forward: any layout and size, in two steps that both read the features ---

template <class T, class Index>
__global__ void __launch_bounds__(kAttentionThreads)
    channel_means(Global<const T> features, Maps<Index> maps, Global<Accumulation<T>> means) {
  using Value = Accumulation<T>;
  const Index map = blockIdx.x;
  const auto memory = features.from(maps.begin(map));
  Value total = 0;
  for (uint32_t position = threadIdx.x; position < maps.positions; position += kAttentionThreads)
    total += widen(memory.load(maps.offset(position)));
  total = block_reduce<kAttentionThreads>(total, Sum());
  if (threadIdx.x == 0) means.store(map, total / static_cast<Value>(maps.positions));
}

template <class T, class Index>
__global__ void __launch_bounds__(kAttentionThreads)
    weigh_positions(SpatialAttentionMap op, Maps<Index> maps, Global<const Accumulation<T>> means) {
  using Value = Accumulation<T>;
  const AttentionGroup group(op, blockIdx.x);
  const auto output = Global<Value>(op.sums).from(static_cast<int64_t>(blockIdx.x) * maps.positions);
  for (uint32_t position = blockIdx.y * kAttentionThreads + threadIdx.x; position < maps.positions;
       position += gridDim.y * kAttentionThreads) {
    Value total = 0;
    for (int64_t c = 0; c < group.channels; ++c) {
      const auto map = static_cast<Index>(group.sample * op.layout.channels + group.first_channel + c);
      const auto memory = Global<const T>(op.features).from(maps.begin(map));
      total += means.load(map) * widen(memory.load(maps.offset(position)));
    }
    output.store(position, total);
  }
}

// The sum over the groups, in their order, divided by C: one thread per position.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads) attention_totals(SpatialAttentionMap op, int64_t positions) {
  using Value = Accumulation<T>;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kAttentionThreads + threadIdx.x;
  const int64_t sample = number / positions, position = number - sample * positions;
  if (sample >= op.layout.samples) return;
  const auto sums = Global<const Value>(op.sums).from(sample * op.groups * positions + position);
  Value total = sums.load(0);
  for (int64_t group = 1; group < op.groups; ++group) total += sums.load(group * positions);
  Global<T>(op.map).store(number, narrow<T>(total / static_cast<Value>(op.layout.channels)));
}

// --- backward: dF_c(p) = (Σ F_c · dM(p) + Σ_q dM(q) F_c(q)) / (C·H·W) ---

// One warp per map, in any layout; more than one element per access where both tensors' maps allow it.
template <class T, int Elements, class Index>
__global__ void __launch_bounds__(kAttentionThreads)
    gradient_of_maps(SpatialAttentionMapBackward op, Maps<Index> maps, Maps<Index> grad_maps) {
  using Value = Accumulation<T>;
  const Index map = Index{blockIdx.x} * kWarpsPerBlock + warp_index();
  if (map >= maps.count) return;
  Index channel;
  const Index sample = maps.channels.divide(map, channel);
  const auto memory = Global<const T>(op.features).from(maps.begin(map));
  const auto output = Global<T>(op.grad_features).from(grad_maps.begin(map));
  const auto grad = Global<const T>(op.grad).from(sample * maps.positions);
  const auto grad_at = [&](uint32_t position) {
    if constexpr (Elements > 1) {
      return grad.template load_chunk<Elements>(position);
    } else {
      return Chunk<T, 1>{{grad.load(position)}};
    }
  };

  Value slope = 0, offset = 0;
  for (uint32_t position = lane_index() * Elements; position < maps.positions; position += kWarp * Elements) {
    const auto x = maps.template load<Elements>(memory, position);
    const auto g = grad_at(position);
#pragma unroll
    for (int e = 0; e < Elements; ++e) {
      slope += widen(x.element[e]);
      offset += widen(x.element[e]) * widen(g.element[e]);
    }
  }
  const Value share = 1 / static_cast<Value>(op.layout.channels) / static_cast<Value>(maps.positions);
  slope = warp_reduce(slope, Sum()) * share;
  offset = warp_reduce(offset, Sum()) * share;
  for (uint32_t position = lane_index() * Elements; position < maps.positions; position += kWarp * Elements) {
    const auto g = grad_at(position);
    Chunk<T, Elements> chunk;
#pragma unroll
    for (int e = 0; e < Elements; ++e) chunk.element[e] = narrow<T>(slope * widen(g.element[e]) + offset);
    grad_maps.template store<Elements>(output, position, chunk);
  }
}

// Interleaved channels, one channel per lane; the block's warps share the positions.
template <class T, class Index>
__global__ void __launch_bounds__(kAttentionThreads)
    gradient_of_channels(SpatialAttentionMapBackward op, ChannelGroups<Index> groups, Maps<Index> grad_maps) {
  using Value = Accumulation<T>;
  __shared__ Value of_warp[2][kWarpsPerBlock][kWarp];
  const ChannelGroup<Index> group(groups, blockIdx.x);
  const Maps<Index>& maps = groups.maps;
  const unsigned lane = lane_index(), warp = warp_index();
  const bool taken = lane < group.channels;
  Index channel;
  const Index sample = maps.channels.divide(group.first_map, channel);
  const auto memory = Global<const T>(op.features).from(group.begin + lane);
  const auto output = Global<T>(op.grad_features).from(grad_maps.begin(group.first_map) + lane);
  const auto grad = Global<const T>(op.grad).from(sample * maps.positions);

  Value slope = 0, offset = 0;
  if (taken)
    for (uint32_t position = warp; position < maps.positions; position += kWarpsPerBlock) {
      const Value x = widen(memory.load(maps.offset(position)));
      slope += x;
      offset += x * widen(grad.load(position));
    }
  of_warp[0][warp][lane] = slope;
  of_warp[1][warp][lane] = offset;
  __syncthreads();
  if (!taken) return;
  slope = offset = 0;
  for (int other = 0; other < kWarpsPerBlock; ++other) {
    slope += of_warp[0][other][lane];
    offset += of_warp[1][other][lane];
  }
  const Value share = 1 / static_cast<Value>(op.layout.channels) / static_cast<Value>(maps.positions);
  for (uint32_t position = warp; position < maps.positions; position += kWarpsPerBlock)
    output.store(grad_maps.offset(position), narrow<T>(slope * share * widen(grad.load(position)) + offset * share));
}

}  // namespace fgvc_ext::cuda
