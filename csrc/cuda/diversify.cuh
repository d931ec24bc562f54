// Diversification block, subtle differences eq. 1–8: a warp a map. The warp draws its map's random words into shared
// memory, finds the maximum, and sums what is visible and what is hidden; a lane owns whole bytes of the bit mask.
#pragma once

#include "../common/arguments.h"
#include "../common/philox.h"
#include "elements.cuh"
#include "reduction.cuh"

namespace fgvc_ext::cuda {

constexpr int kByte = 8;  // positions of one byte of the mask

// Which draws of one map hide: four bits for every Philox call.
class Draws {
 public:
  __device__ Draws(const Diversify& op, int64_t map, uint8_t* drawn) : op_(op), drawn_(drawn) {
    const int64_t sample = map / op.layout.channels;
    seed_ = static_cast<uint64_t>(op.seed[op.seed_per_sample ? sample : 0]);
    sample_ = op.seed_per_sample ? 0 : static_cast<uint32_t>(sample);
    channel_ = static_cast<uint32_t>(map - sample * op.layout.channels);
  }
  __device__ void draw_all(int64_t calls) {
    for (int64_t number = threadIdx.x % kWarp; number < calls; number += kWarp) drawn_[number] = call(number);
    __syncwarp();
  }
  __device__ bool hides(int64_t draw) const {
    const unsigned four = drawn_ ? drawn_[draw / 4] : call(draw / 4);
    return four >> draw % 4 & 1;
  }

 private:
  __device__ uint8_t call(int64_t number) const {
    const auto words = philox<>({{static_cast<uint32_t>(number), channel_, sample_, kDiversifyStream}}, seed_);
    unsigned four = 0;
    for (int i = 0; i < 4; ++i) {
      const uint64_t threshold = number == 0 && i == 0 ? op_.peak_threshold : op_.patch_threshold;
      four |= static_cast<unsigned>(words.word[i] < threshold) << i;
    }
    return static_cast<uint8_t>(four);
  }

  const Diversify& op_;
  uint8_t* drawn_;  // null: too many draws for shared memory, every look calls Philox
  uint64_t seed_;
  uint32_t sample_, channel_;
};

// Eight neighbouring positions; those beyond the map are `padding`.
template <class T, int Elements>
__device__ void load_byte(const Map<const T>& memory, int64_t first, int64_t positions, Accumulation<T> padding,
                          Accumulation<T> (&x)[kByte]) {
#pragma unroll
  for (int i = 0; i < kByte; i += Elements) {
    if (first + i + Elements <= positions) {
      const auto chunk = memory.template load<Elements>(first + i);
#pragma unroll
      for (int e = 0; e < Elements; ++e) x[i + e] = widen(chunk.element[e]);
    } else {
#pragma unroll
      for (int e = 0; e < Elements; ++e) x[i + e] = first + i + e < positions ? widen(memory[first + i + e]) : padding;
    }
  }
}

template <class T, int Elements>
__global__ void __launch_bounds__(kMapsPerBlock* kWarp) suppress_and_pool(Diversify op, int64_t calls, bool draws_fit) {
  using Value = Accumulation<T>;
  const int64_t map = static_cast<int64_t>(blockIdx.x) * kMapsPerBlock + threadIdx.x / kWarp;
  if (map >= op.layout.maps()) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t positions = op.layout.positions(), bytes = op.bytes_per_map(), columns = op.patch_columns();
  const auto memory = Map<const T>::at(const_cast<void*>(op.maps), op.layout, map);

  Draws draws(op, map, draws_fit ? dynamic_shared<uint8_t>() + threadIdx.x / kWarp * calls : nullptr);
  if (draws_fit) draws.draw_all(calls);
  const bool hide_peaks = draws.hides(0);

  Value x[kByte], peak = static_cast<Value>(-INFINITY);
  for (int64_t byte = lane; byte < bytes; byte += kWarp) {
    load_byte<T, Elements>(memory, byte * kByte, positions, static_cast<Value>(-INFINITY), x);
#pragma unroll
    for (int i = 0; i < kByte; ++i) peak = Largest()(peak, x[i]);
  }
  peak = warp_reduce(peak, Largest());  // NaN where the map has one: nothing equals it, so it has no peaks

  Value visible = 0, hidden = 0;
  for (int64_t byte = lane; byte < bytes; byte += kWarp) {
    // The values of a map of up to 256 positions are still in registers.
    if (bytes > kWarp) load_byte<T, Elements>(memory, byte * kByte, positions, 0, x);
    unsigned suppressed = 0;
#pragma unroll
    for (int i = 0; i < kByte; ++i) {
      const int64_t position = byte * kByte + i;
      if (position >= positions) break;
      const int64_t row = position / op.layout.width, column = position - row * op.layout.width;
      const bool hide =
          x[i] == peak ? hide_peaks : draws.hides(1 + row / op.patch_size * columns + column / op.patch_size);
      (hide ? hidden : visible) += x[i];
      suppressed |= static_cast<unsigned>(hide) << i;
    }
    op.bits[map * bytes + byte] = static_cast<uint8_t>(suppressed);
  }
  const Value total = warp_reduce(visible, Sum()) + static_cast<Value>(op.alpha) * warp_reduce(hidden, Sum());
  if (lane == 0) static_cast<T*>(op.scores)[map] = narrow<T>(total / static_cast<Value>(positions));
}

// A thread writes the eight positions of one byte. Neighbouring threads take neighbouring memory: bytes of a map where
// maps are contiguous, else channels.
__device__ inline void spread_byte(const SpreadBits& op, int64_t thread, int64_t& map, int64_t& first,
                                   unsigned& suppressed) {
  const int64_t bytes = (op.layout.positions() + kByte - 1) / kByte, channels = op.layout.channels;
  int64_t byte;
  if (op.layout.map_is_contiguous()) {
    map = thread / bytes;
    byte = thread - map * bytes;
  } else {
    const int64_t rest = thread / channels, sample = rest / bytes;
    byte = rest - sample * bytes;
    map = sample * channels + (thread - rest * channels);
  }
  first = byte * kByte;
  suppressed = op.bits[map * bytes + byte];
}

constexpr int kSpreadThreads = 256;

template <class T, int Elements>
__global__ void __launch_bounds__(kSpreadThreads) spread_gradient(SpreadBits op, int64_t threads) {
  using Value = Accumulation<T>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kSpreadThreads + threadIdx.x;
  if (thread >= threads) return;
  int64_t map, first;
  unsigned suppressed;
  spread_byte(op, thread, map, first, suppressed);
  const Value share = widen(static_cast<const T*>(op.grad)[map]) / static_cast<Value>(op.layout.positions());
  const T plain = narrow<T>(share), hidden = narrow<T>(share * static_cast<Value>(op.alpha));
  const auto memory = Map<T>::at(op.output, op.layout, map);
#pragma unroll
  for (int i = 0; i < kByte; i += Elements) {
    if (first + i >= op.layout.positions()) return;
    Chunk<T, Elements> chunk;
#pragma unroll
    for (int e = 0; e < Elements; ++e) chunk.element[e] = suppressed >> (i + e) & 1 ? hidden : plain;
    *reinterpret_cast<Chunk<T, Elements>*>(&memory[first + i]) = chunk;
  }
}

inline __global__ void __launch_bounds__(kSpreadThreads) spread_mask(SpreadBits op, int64_t threads) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kSpreadThreads + threadIdx.x;
  if (thread >= threads) return;
  int64_t map, first;
  unsigned suppressed;
  spread_byte(op, thread, map, first, suppressed);
  const auto memory = Map<uint8_t>::at(op.output, op.layout, map);
  for (int i = 0; i < kByte && first + i < op.layout.positions(); ++i) memory[first + i] = suppressed >> i & 1;
}

}  // namespace fgvc_ext::cuda
