// Elements of the contract's dtypes on the device: conversion to the accumulation type, and chunks of up to 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../common/dtype.h"
#include "../common/layout.h"

#ifndef FGVC_EXT_EMULATE_CUDA
namespace fgvc_ext {

// The block's dynamic shared memory, as many bytes as the launch asked for.
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

}  // namespace fgvc_ext
#endif

namespace fgvc_ext::cuda {

constexpr int kMapsPerBlock = 8;  // a warp a map; neighbouring channels share the sectors of a channels_last tensor

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(Accumulation<T> x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half(x);
}

// `Count` elements that one memory access moves.
template <class T, int Count>
struct alignas(sizeof(T) * Count) Chunk {
  T element[Count];
};

// How many elements one access may move: 16 bytes where maps and their memory are aligned to it, else 8, else one
// element.
template <class T>
int chunk_size(const void* data, const Layout4& layout) {
  if (!layout.map_is_contiguous()) return 1;
  for (int bytes = 16; bytes > static_cast<int>(sizeof(T)); bytes /= 2) {
    const auto aligned = [&](int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)) % bytes == 0; };
    if (reinterpret_cast<uintptr_t>(data) % bytes == 0 && aligned(layout.positions()) && aligned(layout.stride[0]) &&
        aligned(layout.stride[1]))
      return bytes / static_cast<int>(sizeof(T));
  }
  return 1;
}

// The memory of one map.
template <class T>
struct Map {
  T* data;
  int64_t width, row_stride, column_stride;
  bool contiguous;

  __device__ static Map at(void* base, const Layout4& layout, int64_t map) {
    const int64_t sample = map / layout.channels, channel = map - sample * layout.channels;
    return {static_cast<T*>(base) + layout.offset(sample, channel), layout.width, layout.stride[2], layout.stride[3],
            layout.map_is_contiguous()};
  }
  __device__ int64_t offset(int64_t position) const {
    if (contiguous) return position;
    const int64_t y = position / width;
    return y * row_stride + (position - y * width) * column_stride;
  }
  __device__ T& operator[](int64_t position) const { return data[offset(position)]; }

  template <int Count>
  __device__ Chunk<T, Count> load(int64_t position) const {
    if constexpr (Count == 1) {
      return {{(*this)[position]}};
    } else {
      return *reinterpret_cast<const Chunk<T, Count>*>(data + position);
    }
  }
};

}  // namespace fgvc_ext::cuda
