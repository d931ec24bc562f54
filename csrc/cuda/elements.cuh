// Elements of the contract's dtypes on the device: conversion to the accumulation type, and keys that order them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../common/dtype.h"
#include "../common/layout.h"

namespace fgvc_ext::cuda {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;

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

// a · b, rounded before it is added to anything: the compiler may not contract it.
#ifdef FGVC_EXT_EMULATE_CUDA
__device__ __forceinline__ float rounded_product(float a, float b) { return a * b; }
__device__ __forceinline__ double rounded_product(double a, double b) { return a * b; }
#else
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }
#endif

// Keys are unsigned numbers in the order of the values: −0 and +0 share one, all NaN share the largest. No value has
// the key 0, which stands for nothing.
__device__ __forceinline__ uint32_t ordered_key(float x) {
#ifdef FGVC_EXT_EMULATE_CUDA
  // A GPU's addition gives every NaN the bits 0x7FFFFFFF (CUDA programming guide, "Floating-Point Standard").
  const uint32_t bits = x != x ? 0x7FFFFFFFu : __float_as_uint(x + 0.f);
#else
  const uint32_t bits = __float_as_uint(x + 0.f);  // −0 becomes +0
#endif
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ uint64_t ordered_key(double x) {
  if (x != x) return ~uint64_t{0};
  const auto bits = static_cast<uint64_t>(__double_as_longlong(x + 0.));
  return bits ^ (static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) | uint64_t{1} << 63);
}
__device__ __forceinline__ float value_of_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}
__device__ __forceinline__ double value_of_key(uint64_t key) {
  const uint64_t sign = uint64_t{1} << 63;
  return __longlong_as_double(static_cast<long long>(key & sign ? key & ~sign : ~key));
}

// Keys of 16-bit floats need 16 bits: here the upper ones of a word, whose lower ones are free.
__device__ __forceinline__ uint32_t upper_key(__nv_bfloat16 x) { return ordered_key(widen(x)) & 0xFFFF0000u; }
__device__ __forceinline__ uint32_t upper_key(__half x) {
  uint32_t bits = __half_as_ushort(x);
  if ((bits & 0x7FFFu) > 0x7C00u) bits = 0x7FFFu;  // NaN
  if (bits == 0x8000u) bits = 0;                   // −0
  return (bits & 0x8000u ? ~bits : bits | 0x8000u) << 16;
}
__device__ __forceinline__ float value_of_upper_key(uint32_t key, __nv_bfloat16) {
  return value_of_key(key & 0x80000000u ? key & 0xFFFF0000u : key | 0xFFFFu);
}
__device__ __forceinline__ float value_of_upper_key(uint32_t key, __half) {
  return widen(__ushort_as_half(static_cast<uint16_t>((key & 0x80000000u ? key & 0x7FFFFFFFu : ~key) >> 16)));
}

template <class T>
using KeyOf = decltype(ordered_key(Accumulation<T>{}));

// How many elements one access may move: 16 bytes where every map begins and ends at a multiple of them, else 8, else
// one element.
template <class T>
int chunk_size(const void* data, const Layout4& layout, int most = 16) {
  if (!layout.map_is_contiguous()) return 1;
  const int64_t size = static_cast<int64_t>(sizeof(T));
  for (int elements = 16 / static_cast<int>(size) < most ? 16 / static_cast<int>(size) : most;
       elements * size >= 8 && elements > 1; elements /= 2) {
    const auto aligned = [&](int64_t count) { return count % elements == 0; };
    if (reinterpret_cast<uintptr_t>(data) % (elements * size) == 0 && aligned(layout.positions()) &&
        (layout.samples == 1 || aligned(layout.stride[0])) && (layout.channels == 1 || aligned(layout.stride[1])))
      return elements;
  }
  return 1;
}

}  // namespace fgvc_ext::cuda
