// Global k-max pooling, ELoPE eq. 2–4, backward. Of the features: zero, but grad · weight_r / k at the position of rank
// r; what is written carries the entries with it, so that memory is written once. Of the weights: Σ grad · value_r / k.
#pragma once

#include "../common/global_k_max_pool.h"
#include "index.cuh"
#include "reduction.cuh"

namespace fgvc_ext::cuda {

constexpr int kScatterThreads = kWarpsPerBlock * kWarp;
constexpr uint32_t kScatterPart = 4096;  // positions of a map that one warp writes, or one block of all its channels

template <class Index>
__device__ __forceinline__ int32_t load_index(const GlobalKMaxPoolBackward& op, Index at) {
  return op.narrow_indices ? Global<const int16_t>(op.indices).load(at) : Global<const int32_t>(op.indices).load(at);
}

// weight_r · share, where `share` is the map's grad / k.
template <class Value>
__device__ __forceinline__ Value entry_of_rank(const GlobalKMaxPoolBackward& op, uint32_t rank, Value share) {
  return op.weight ? share * Global<const Value>(op.weight).load(rank) : share;
}

// One warp per part of a map. Indices out of the map are skipped.
template <class T, int Elements, class Index>
__global__ void __launch_bounds__(kScatterThreads) scatter_maps(GlobalKMaxPoolBackward op, Maps<Index> maps) {
  using Value = Accumulation<T>;
  const unsigned lane = lane_index(), k = static_cast<unsigned>(op.k);
  const Index map = Index{blockIdx.x} * kWarpsPerBlock + warp_index();
  if (map >= maps.count) return;
  const auto memory = Global<T>(op.grad_features).from(maps.begin(map));
  const Value share = widen(Global<const T>(op.grad).load(map)) / static_cast<Value>(k);
  const bool in_registers = k <= kWarp;  // each lane one rank
  int32_t of_rank = -1;
  Value entry = 0;
  if (in_registers && lane < k) {
    of_rank = load_index(op, map * k + lane);
    entry = entry_of_rank(op, lane, share);
  }
#pragma unroll 1
  for (uint32_t part = blockIdx.y * kScatterPart; part < maps.positions; part += gridDim.y * kScatterPart) {
    const uint32_t end = part + kScatterPart < maps.positions ? part + kScatterPart : maps.positions;
#pragma unroll 1
    for (uint32_t first = part; first < end; first += kWarp * Elements) {
      const uint32_t position = first + lane * Elements;
      Chunk<T, Elements> chunk;
#pragma unroll
      for (int e = 0; e < Elements; ++e) chunk.element[e] = narrow<T>(0);
#pragma unroll 1
      for (unsigned rank = 0; in_registers && rank < k; ++rank) {
        const uint32_t at = __shfl_sync(kAllLanes, of_rank, rank) - position;
        const T value = narrow<T>(__shfl_sync(kAllLanes, entry, rank));
#pragma unroll
        for (unsigned e = 0; e < Elements; ++e)
          if (at == e) chunk.element[e] = value;
      }
      if (position < end) maps.template store<Elements>(memory, position, chunk);
    }
    if (in_registers) continue;
    __syncwarp();  // no entry may be overwritten by another lane's zero
#pragma unroll 1
    for (unsigned rank = lane; rank < k; rank += kWarp) {
      const int64_t index = load_index(op, map * k + rank);
      if (index >= part && index < end)
        memory.store(maps.offset(static_cast<uint32_t>(index)), narrow<T>(entry_of_rank(op, rank, share)));
    }
  }
}

// k ≤ Capacity, one lane per channel: a lane holds the ranks of its channel, and the block's warps take turns at its
// positions.
template <class T, int Capacity, class Index>
__global__ void __launch_bounds__(kScatterThreads)
    scatter_channels(GlobalKMaxPoolBackward op, ChannelGroups<Index> groups) {
  using Value = Accumulation<T>;
  __shared__ int32_t indices[kWarp * Capacity];
  const ChannelGroup<Index> group(groups, blockIdx.x);
  const Maps<Index>& maps = groups.maps;
  const unsigned lane = lane_index(), k = static_cast<unsigned>(op.k);
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < group.channels * k; i += kScatterThreads)
    indices[i] = load_index(op, group.first_map * k + i);
  __syncthreads();
  if (!group.lane_has_channel) return;

  const Value share = widen(Global<const T>(op.grad).load(group.first_map + lane)) / static_cast<Value>(k);
  uint32_t of_rank[Capacity];
  T entry[Capacity];
#pragma unroll
  for (unsigned i = 0; i < Capacity; ++i) {
    of_rank[i] = i < k ? indices[lane * k + i] : ~0u;
    entry[i] = narrow<T>(i < k ? entry_of_rank(op, i, share) : 0);
  }
  const auto memory = Global<T>(op.grad_features).from(group.begin + lane);
#pragma unroll 1
  for (uint32_t part = blockIdx.y * kScatterPart; part < maps.positions; part += gridDim.y * kScatterPart) {
    const uint32_t end = part + kScatterPart < maps.positions ? part + kScatterPart : maps.positions;
#pragma unroll 4
    for (uint32_t position = part + warp_index(); position < end; position += kWarpsPerBlock) {
      T value = narrow<T>(0);
#pragma unroll
      for (int i = 0; i < Capacity; ++i)
        if (of_rank[i] == position) value = entry[i];
      memory.store(position * maps.column_stride, value);
    }
  }
}

constexpr int kWeightThreads = 256;
constexpr int64_t kMapsPerChunk = 1024;

// Σ grad · value_r / k of one chunk of maps: the block's row of sums [chunks,k]. Threads lie along the ranks, which are
// side by side in memory, and what is left of the block along the maps.
template <class T, class Index>
__global__ void __launch_bounds__(kWeightThreads) sum_weight_gradient(GlobalKMaxPoolWeightGrad op, Index maps) {
  using Value = Accumulation<T>;
  __shared__ Value partial[kWeightThreads];
  const unsigned k = static_cast<unsigned>(op.k), along = k < kWeightThreads ? k : kWeightThreads;
  const unsigned rows = kWeightThreads / along, row = threadIdx.x / along, column = threadIdx.x % along;
  const Index begin = Index{blockIdx.x} * kMapsPerChunk;
  const Index end = maps - begin < kMapsPerChunk ? maps : begin + kMapsPerChunk;
  for (unsigned rank = column; rank - column < k; rank += along) {
    Value total = 0;
    if (row < rows && rank < k)
      for (Index map = begin + row; map < end; map += rows)
        total += widen(Global<const T>(op.grad).load(map)) * Global<const Value>(op.values).load(map * k + rank);
    partial[threadIdx.x] = total;
    __syncthreads();
    if (row == 0 && rank < k) {
      for (unsigned i = 1; i < rows; ++i) total += partial[i * along + column];
      Global<Value>(op.sums).store(Index{blockIdx.x} * k + rank, total / static_cast<Value>(k));
    }
    __syncthreads();
  }
}

// The second stage: one block per rank.
template <class Value>
__global__ void __launch_bounds__(kWeightThreads)
    sum_chunks(Global<const Value> sums, Global<Value> total, int64_t chunks, int64_t k) {
  Value of_thread = 0;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kWeightThreads)
    of_thread += sums.load(chunk * k + blockIdx.x);
  of_thread = block_reduce<kWeightThreads>(of_thread, Sum());
  if (threadIdx.x == 0) total.store(blockIdx.x, of_thread);
}

}  // namespace fgvc_ext::cuda
