// CUDA's C++ as far as this project's kernels use it, on the CPU: this header stands in for <cuda_runtime.h> where the
// sources are compiled by a host compiler. README.md says what kernels may use; execution.h runs them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <tuple>
#include <type_traits>

#include "execution.h"

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __shared__ FGVC_EXT_SHARED_STORAGE
#define __launch_bounds__(...)

// Default arguments that name the caller's place, for messages.
#define FGVC_EXT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace fgvc_ext {

// There is one device, the processor, and one stream, which is always done.
using Stream = std::nullptr_t;

struct DeviceGuard {
  template <class... Device>
  explicit DeviceGuard(const Device&...) {}
};

template <class... Device>
Stream current_stream(const Device&...) {
  return nullptr;
}

// <<<grid, block, shared_bytes, stream>>>. Returns when the kernel has run; throws where it breaks CUDA's rules.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
            Arguments&&... arguments) {
  const std::tuple<std::remove_const_t<Parameters>...> copies(std::forward<Arguments>(arguments)...);
  emulation::Machine::instance().run(grid, block, shared_bytes, [&] { std::apply(kernel, copies); });
}

// The block's dynamic shared memory, as many bytes as the launch asked for.
template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulation::Machine::instance().dynamic_shared());
}

// CUDA's own; in a host's C library they are new.
inline double cospi(double x) { return std::cos(3.14159265358979323846 * x); }
inline double sinpi(double x) { return std::sin(3.14159265358979323846 * x); }

namespace emulation {

// Called at every load and store of global memory.
inline void record_access(const std::source_location& place, const void* address, size_t bytes, bool stores) {
  if (Accesses::instance().counts) {
    Accesses::instance().record(Machine::instance().thread(), place, address, bytes, stores);
  }
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "warp collectives move values of up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline const Thread& gather(const char* name, unsigned mask, uint64_t value, const char* file, int line,
                            bool orders_memory = false) {
  return Machine::instance().meet({name, file, line, Scope::kWarp, orders_memory, mask, value});
}

// The value of lane `source`: undefined in CUDA where that lane does not take part, poison here.
template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, const char* file, int line) {
  return from_bits<T>(gather(name, mask, to_bits(value), file, line).gathered[source]);
}

template <class T, class Fold>
T reduce(const char* name, unsigned mask, T value, const char* file, int line, Fold fold) {
  const Thread& self = gather(name, mask, to_bits(value), file, line);
  bool first = true;
  T result{};
  for (int lane = 0; lane < 32; ++lane) {
    if (!(self.present >> lane & 1)) continue;
    const T other = from_bits<T>(self.gathered[lane]);
    result = first ? other : fold(result, other);
    first = false;
  }
  return result;
}

inline int lane() { return Machine::instance().lane(); }
inline int segment_begin(int width) { return lane() & ~(width - 1); }
inline int segment_end(int width) { return segment_begin(width) + width; }

}  // namespace emulation
}  // namespace fgvc_ext

// ---------------------------------------------------------------------------------------------------------- barriers

inline void __syncthreads(FGVC_EXT_HERE) {
  using namespace fgvc_ext::emulation;
  Machine::instance().meet({"__syncthreads", file, line, Scope::kBlock, true, 0, 0});
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, FGVC_EXT_HERE) {
  fgvc_ext::emulation::gather("__syncwarp", mask, 0, file, line, true);
}

// ---------------------------------------------------------------------------------------------------- warp collectives

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, FGVC_EXT_HERE) {
  using namespace fgvc_ext::emulation;
  return shuffle("__shfl_sync", mask, value, segment_begin(width) + (source & (width - 1)), file, line);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, FGVC_EXT_HERE) {
  using namespace fgvc_ext::emulation;
  const int source = lane() - static_cast<int>(delta);
  return shuffle("__shfl_up_sync", mask, value, source >= segment_begin(width) ? source : lane(), file, line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, FGVC_EXT_HERE) {
  using namespace fgvc_ext::emulation;
  const int source = lane() + static_cast<int>(delta);
  return shuffle("__shfl_down_sync", mask, value, source < segment_end(width) ? source : lane(), file, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, FGVC_EXT_HERE) {
  using namespace fgvc_ext::emulation;
  const int source = lane() ^ lane_mask;
  return shuffle("__shfl_xor_sync", mask, value, source < segment_end(width) ? source : lane(), file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, FGVC_EXT_HERE) {
  const auto& self = fgvc_ext::emulation::gather("__ballot_sync", mask, predicate != 0, file, line);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (self.present >> lane & 1) votes |= static_cast<unsigned>(self.gathered[lane]) << lane;
  }
  return votes;
}

inline int __any_sync(unsigned mask, int predicate, FGVC_EXT_HERE) {
  return fgvc_ext::emulation::reduce("__any_sync", mask, int{predicate != 0}, file, line, std::bit_or<int>());
}

inline int __all_sync(unsigned mask, int predicate, FGVC_EXT_HERE) {
  return fgvc_ext::emulation::reduce("__all_sync", mask, int{predicate != 0}, file, line, std::bit_and<int>());
}

// For int and unsigned, as in CUDA (compute capability 8.0 on).
#define FGVC_EXT_REDUCE(NAME, EXPRESSION)                                                                    \
  template <class T>                                                                                         \
  T NAME(unsigned mask, T value, FGVC_EXT_HERE) {                                                            \
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>, #NAME " takes int and unsigned");   \
    return fgvc_ext::emulation::reduce(#NAME, mask, value, file, line, [](T a, T b) { return EXPRESSION; }); \
  }
FGVC_EXT_REDUCE(__reduce_add_sync, static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
FGVC_EXT_REDUCE(__reduce_min_sync, a < b ? a : b)
FGVC_EXT_REDUCE(__reduce_max_sync, a > b ? a : b)
FGVC_EXT_REDUCE(__reduce_and_sync, a& b)
FGVC_EXT_REDUCE(__reduce_or_sync, a | b)
FGVC_EXT_REDUCE(__reduce_xor_sync, a ^ b)
#undef FGVC_EXT_REDUCE

// ------------------------------------------------------------------------------------------------- integers and bits

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }

inline unsigned __float_as_uint(float x) {
  return fgvc_ext::emulation::from_bits<unsigned>(fgvc_ext::emulation::to_bits(x));
}
inline int __float_as_int(float x) { return fgvc_ext::emulation::from_bits<int>(fgvc_ext::emulation::to_bits(x)); }
inline float __uint_as_float(unsigned x) {
  return fgvc_ext::emulation::from_bits<float>(fgvc_ext::emulation::to_bits(x));
}
inline float __int_as_float(int x) { return fgvc_ext::emulation::from_bits<float>(fgvc_ext::emulation::to_bits(x)); }
inline long long __double_as_longlong(double x) { return static_cast<long long>(fgvc_ext::emulation::to_bits(x)); }
inline double __longlong_as_double(long long x) {
  return fgvc_ext::emulation::from_bits<double>(fgvc_ext::emulation::to_bits(x));
}

template <class T>
std::enable_if_t<std::is_arithmetic_v<T>, T> min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
std::enable_if_t<std::is_arithmetic_v<T>, T> max(T a, T b) {
  return a < b ? b : a;
}

// ------------------------------------------------------------------------------------------------------------- memory

template <class T>
T __ldg(const T* address) {
  return *address;
}

// Atomics on integers; on floating point they would make results depend on the order, so there are none.
template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  static_assert(std::is_integral_v<T>, "atomics on floating point are not deterministic");
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* address, std::common_type_t<T> value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicAnd(T* address, std::common_type_t<T> value) {
  return __atomic_fetch_and(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicExch(T* address, std::common_type_t<T> value) {
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <class T>
T atomicMin(T* address, std::common_type_t<T> value) {
  static_assert(std::is_integral_v<T>);
  T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < seen &&
         !__atomic_compare_exchange_n(address, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
  static_assert(std::is_integral_v<T>);
  T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (seen < value &&
         !__atomic_compare_exchange_n(address, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}

#undef FGVC_EXT_HERE
