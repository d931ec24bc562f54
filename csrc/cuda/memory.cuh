// Global memory, as kernels see it: nothing but loads and stores of a `Global`. The emulation records each of them and
// counts the 32-byte sectors that a warp touches; a test forbids pointers in every other .cuh file.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#ifdef FGVC_EXT_EMULATE_CUDA
#include <source_location>
// The place of the access in the source, which tells accesses apart.
#define FGVC_PLACE , std::source_location place = std::source_location::current()
#define FGVC_RECORD(address, bytes, stores) ::fgvc_ext::emulation::record_access(place, address, bytes, stores)
#else
#define FGVC_PLACE
#define FGVC_RECORD(address, bytes, stores)

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

// `Count` elements that one access moves.
template <class T, int Count>
struct alignas(sizeof(T) * Count) Chunk {
  T element[Count];
};

// An array in global memory. Its elements are numbered in any unsigned type; 32 bits are the fastest.
template <class T>
class Global {
 public:
  using Address = std::conditional_t<std::is_const_v<T>, const void*, void*>;
  using Element = std::remove_const_t<T>;

  __host__ __device__ explicit Global(Address data) : data_(static_cast<T*>(data)) {}
  // What may be written may be read.
  template <class Written>
    requires std::is_same_v<const Written, T>
  __host__ __device__ Global(const Global<Written>& written) : data_(written.data_) {}
  __device__ explicit operator bool() const { return data_ != nullptr; }

  template <class Index>
  __device__ __forceinline__ Global from(Index first) const {
    return Global(data_ + first);
  }
  template <class Index>
  __device__ __forceinline__ Element load(Index at FGVC_PLACE) const {
    FGVC_RECORD(data_ + at, sizeof(T), false);
    return data_[at];
  }
  template <class Index>
  __device__ __forceinline__ void store(Index at, Element value FGVC_PLACE) const {
    FGVC_RECORD(data_ + at, sizeof(T), true);
    data_[at] = value;
  }
  // `at` is the chunk's first element. Its address must be a multiple of the chunk's size.
  template <int Count, class Index>
  __device__ __forceinline__ Chunk<Element, Count> load_chunk(Index at FGVC_PLACE) const {
    FGVC_RECORD(data_ + at, sizeof(T) * Count, false);
    return *reinterpret_cast<const Chunk<Element, Count>*>(data_ + at);
  }
  template <int Count, class Index>
  __device__ __forceinline__ void store_chunk(Index at, const Chunk<Element, Count>& chunk FGVC_PLACE) const {
    FGVC_RECORD(data_ + at, sizeof(T) * Count, true);
    *reinterpret_cast<Chunk<Element, Count>*>(data_ + at) = chunk;
  }
  // How many bytes the array begins after a multiple of 32.
  __device__ unsigned past_sector() const { return static_cast<unsigned>(reinterpret_cast<uintptr_t>(data_) % 32); }

 private:
  template <class>
  friend class Global;

  T* data_;
};

// An array in the block's dynamic shared memory.
template <class T>
class Shared {
 public:
  // The array that begins `offset` bytes into it.
  __device__ static Shared at(unsigned offset) {
    return Shared(reinterpret_cast<T*>(dynamic_shared<unsigned char>() + offset));
  }
  __device__ __forceinline__ T& operator[](unsigned i) const { return data_[i]; }
  __device__ __forceinline__ Shared from(unsigned first) const { return Shared(data_ + first); }
  // `at` is the chunk's first element. Its address must be a multiple of the chunk's size.
  template <int Count>
  __device__ __forceinline__ Chunk<T, Count> load_chunk(unsigned at) const {
    return *reinterpret_cast<const Chunk<T, Count>*>(data_ + at);
  }

 private:
  __device__ explicit Shared(T* data) : data_(data) {}
  T* data_;
};

// Copies the block's bytes between shared and global memory. Each warp's access lies in one 32-byte sector.
template <int Threads>
__device__ void store_bytes(const Global<uint8_t>& memory, const Shared<uint8_t>& shared, unsigned count) {
  const unsigned skipped = memory.past_sector();
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < count + skipped; i += Threads)
    if (i >= skipped) memory.store(i - skipped, shared[i - skipped]);
}
template <int Threads>
__device__ void load_bytes(const Global<const uint8_t>& memory, const Shared<uint8_t>& shared, unsigned count) {
  const unsigned skipped = memory.past_sector();
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < count + skipped; i += Threads)
    if (i >= skipped) shared[i - skipped] = memory.load(i - skipped);
}

}  // namespace fgvc_ext::cuda
