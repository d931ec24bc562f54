// Bits of the suppression mask, spread over maps: the gradient of the diversification block (subtle differences, eq.
// 5–8), or the mask itself.
#pragma once

#include "../common/diversify.h"
#include "index.cuh"
#include "reduction.cuh"

namespace fgvc_ext::cuda {

constexpr int kSpreadThreads = kWarpsPerBlock * kWarp;
constexpr unsigned kBitsPerByte = 8;

// What plain and hidden positions of a map get.
template <class T>
struct Shades {
  T plain, hidden;
};

template <class T, class Index>
__device__ __forceinline__ Shades<T> shades_of(const SpreadGradient& op, Index map, uint32_t positions) {
  using Value = Accumulation<T>;
  const Value share = widen(Global<const T>(op.grad).load(map)) / static_cast<Value>(positions);
  return {narrow<T>(share), narrow<T>(share * static_cast<Value>(op.alpha))};
}
template <class T, class Index>
__device__ __forceinline__ Shades<T> shades_of(const SpreadMask&, Index, uint32_t) {
  return {0, 1};
}

// One thread per `Elements` neighbouring positions of a map, at most a byte of the mask.
template <class T, class Op, int Elements, class Index>
__global__ void __launch_bounds__(kSpreadThreads) spread_maps(Op op, Maps<Index> maps, Divisor<Index> chunks) {
  static_assert(Elements <= kBitsPerByte);
  Index chunk_of_map;
  const Index map = chunks.divide(Index{blockIdx.x} * kSpreadThreads + threadIdx.x, chunk_of_map);
  if (map >= maps.count) return;
  const auto position = static_cast<uint32_t>(chunk_of_map) * Elements;
  const uint32_t bytes = (maps.positions + kBitsPerByte - 1) / kBitsPerByte;
  const unsigned byte = Global<const uint8_t>(op.bits).load(map * bytes + position / kBitsPerByte);
  const Shades<T> shades = shades_of<T>(op, map, maps.positions);
  Chunk<T, Elements> chunk;
#pragma unroll
  for (int e = 0; e < Elements; ++e)
    chunk.element[e] = byte >> (position % kBitsPerByte + e) & 1 ? shades.hidden : shades.plain;
  maps.template store<Elements>(Global<T>(op.output).from(maps.begin(map)), position, chunk);
}

// One lane per channel: the block brings the bits of its 32 channels to shared memory, and its warps take turns at the
// positions.
template <class T, class Op, class Index>
__global__ void __launch_bounds__(kSpreadThreads) spread_channels(Op op, ChannelGroups<Index> groups) {
  const ChannelGroup<Index> group(groups, blockIdx.x);
  const Maps<Index>& maps = groups.maps;
  const uint32_t bytes = (maps.positions + kBitsPerByte - 1) / kBitsPerByte;
  const auto bits = Shared<uint8_t>::at(0);
  load_bytes<kSpreadThreads>(Global<const uint8_t>(op.bits).from(group.first_map * bytes), bits,
                             group.channels * bytes);
  __syncthreads();
  const unsigned lane = lane_index();
  if (!group.lane_has_channel) return;
  const Shades<T> shades = shades_of<T>(op, group.first_map + lane, maps.positions);
  const auto memory = Global<T>(op.output).from(group.begin + lane);
  const auto spread = [&](uint32_t byte, unsigned count) {
    const unsigned hidden = bits[lane * bytes + byte];
    const auto there = memory.from(byte * kBitsPerByte * maps.column_stride);
#pragma unroll
    for (unsigned i = 0; i < kBitsPerByte; ++i)
      if (i < count) there.store(i * maps.column_stride, hidden >> i & 1 ? shades.hidden : shades.plain);
  };
  const uint32_t whole = maps.positions / kBitsPerByte;
#pragma unroll 1
  for (uint32_t byte = warp_index(); byte < whole; byte += kWarpsPerBlock) spread(byte, kBitsPerByte);
  if (whole < bytes && warp_index() == whole % kWarpsPerBlock) spread(whole, maps.positions % kBitsPerByte);
}

}  // namespace fgvc_ext::cuda
