// Reductions over a warp and over a block, in an order that depends on nothing but the block's size.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fgvc_ext::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
// NaN where either is NaN.
struct Largest {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};

// Every lane gets the result. All 32 lanes must call.
template <class T, class Combine>
__device__ T warp_reduce(T value, Combine combine) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, distance);
    // Both partners combine in the order of their lanes, so that they hold the same bits.
    value = threadIdx.x & distance ? combine(other, value) : combine(value, other);
  }
  return value;
}

// Every thread gets the result. All threads of the one-dimensional block must call.
template <int Threads, class T, class Combine>
__device__ T block_reduce(T value, Combine combine) {
  value = warp_reduce(value, combine);
  if constexpr (Threads > kWarp) {
    __shared__ T of_warp[Threads / kWarp];
    __syncthreads();  // the last call's values have been read
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = of_warp[0];
    for (int warp = 1; warp < Threads / kWarp; ++warp) value = combine(value, of_warp[warp]);
  }
  return value;
}

}  // namespace fgvc_ext::cuda
