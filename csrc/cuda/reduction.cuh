// Reductions over a warp and over a block, in an order that depends on nothing but the block's size.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "elements.cuh"

namespace fgvc_ext::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ unsigned lane_index() { return threadIdx.x % kWarp; }
__device__ __forceinline__ unsigned warp_index() { return threadIdx.x / kWarp; }

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Larger {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Smaller {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

// Every lane gets the result, the same bits: `combine` must not care for the order of its two operands. All 32 lanes
// must call.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

// Integers reduce in one instruction from compute capability 8.0 on.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
__device__ __forceinline__ unsigned warp_reduce(unsigned value, Sum) { return __reduce_add_sync(kAllLanes, value); }
__device__ __forceinline__ unsigned warp_reduce(unsigned value, Larger) { return __reduce_max_sync(kAllLanes, value); }
__device__ __forceinline__ uint64_t warp_reduce(uint64_t value, Larger larger) {
  const auto high = static_cast<unsigned>(value >> 32), highest = warp_reduce(high, larger);
  const unsigned lowest = warp_reduce(high == highest ? static_cast<unsigned>(value) : 0u, larger);
  return static_cast<uint64_t>(highest) << 32 | lowest;
}
#endif

// Every thread gets the result. All threads of the one-dimensional block must call.
template <int Threads, class T, class Combine>
__device__ T block_reduce(T value, Combine combine) {
  value = warp_reduce(value, combine);
  if constexpr (Threads > kWarp) {
    __shared__ T of_warp[Threads / kWarp];
    __syncthreads();  // the last call's values have been read
    if (lane_index() == 0) of_warp[warp_index()] = value;
    __syncthreads();
    value = of_warp[0];
    for (int warp = 1; warp < Threads / kWarp; ++warp) value = combine(value, of_warp[warp]);
  }
  return value;
}

}  // namespace fgvc_ext::cuda
