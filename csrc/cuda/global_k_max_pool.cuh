// Global k-max pooling, ELoPE eq. 2–4: a warp a map. Every lane keeps the best of what it reads in a sorted list in
// registers; the lists are then merged, one rank a round.
#pragma once

#include "../common/arguments.h"
#include "elements.cuh"
#include "reduction.cuh"

namespace fgvc_ext::cuda {

constexpr int kListLimit = 16;  // larger k take the best of the rest, k times

// A value and where it stands: larger first, NaN the largest, among equals the lower index.
template <class Value>
struct Ranked {
  Value value;
  int32_t index;

  __device__ static Ranked none() { return {static_cast<Value>(-INFINITY), INT32_MAX}; }
  __device__ bool before(const Ranked& other) const {
    if (value > other.value) return true;
    if (value < other.value) return false;
    const bool nan = value != value, other_nan = other.value != other.value;
    return nan != other_nan ? nan : index < other.index;
  }
};

template <class Value>
__device__ Ranked<Value> warp_first(Ranked<Value> best) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Ranked<Value> other{__shfl_xor_sync(kAllLanes, best.value, distance),
                              __shfl_xor_sync(kAllLanes, best.index, distance)};
    if (other.before(best)) best = other;
  }
  return best;
}

// Writes rank after rank of one map, and in the end their mean.
template <class T>
class RankWriter {
 public:
  using Value = Accumulation<T>;
  __device__ RankWriter(const GlobalKMaxPool& op, int64_t map) : op_(op), map_(map) {}

  __device__ void write(int64_t rank, const Ranked<Value>& found) {
    const auto* weight = static_cast<const Value*>(op_.weight);
    total_ += weight ? weight[rank] * found.value : found.value;
    if (threadIdx.x % kWarp != 0) return;
    const int64_t at = map_ * op_.k + rank;
    if (op_.narrow_indices) {
      static_cast<int16_t*>(op_.indices)[at] = static_cast<int16_t>(found.index);
    } else {
      static_cast<int32_t*>(op_.indices)[at] = found.index;
    }
    if (op_.values) static_cast<Value*>(op_.values)[at] = found.value;
  }
  __device__ void write_mean() const {
    if (threadIdx.x % kWarp == 0)
      static_cast<T*>(op_.output)[map_] = narrow<T>(static_cast<Value>(total_ / static_cast<double>(op_.k)));
  }

 private:
  const GlobalKMaxPool& op_;
  int64_t map_;
  double total_ = 0;  // a large k is a long sum
};

// k ≤ Capacity. `Elements` of a map move at a time.
template <class T, int Capacity, int Elements>
__global__ void __launch_bounds__(kMapsPerBlock* kWarp) pool_with_lists(GlobalKMaxPool op) {
  using Value = Accumulation<T>;
  const int64_t map = static_cast<int64_t>(blockIdx.x) * kMapsPerBlock + threadIdx.x / kWarp;
  if (map >= op.layout.maps()) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t positions = op.layout.positions();
  const auto memory = Map<const T>::at(const_cast<void*>(op.features), op.layout, map);

  Ranked<Value> list[Capacity];
#pragma unroll
  for (int i = 0; i < Capacity; ++i) list[i] = Ranked<Value>::none();
  for (int64_t position = lane * Elements; position < positions; position += kWarp * Elements) {
    const auto chunk = memory.template load<Elements>(position);
#pragma unroll
    for (int e = 0; e < Elements; ++e) {
      Ranked<Value> candidate{widen(chunk.element[e]), static_cast<int32_t>(position + e)};
      if (!candidate.before(list[Capacity - 1])) continue;
#pragma unroll
      for (int i = 0; i < Capacity; ++i) {
        if (!candidate.before(list[i])) continue;
        const Ranked<Value> displaced = list[i];
        list[i] = candidate;
        candidate = displaced;
      }
    }
  }

  RankWriter<T> writer(op, map);
  for (int64_t rank = 0; rank < op.k; ++rank) {
    const Ranked<Value> first = warp_first(list[0]);
    if (list[0].index == first.index) {
#pragma unroll
      for (int i = 0; i + 1 < Capacity; ++i) list[i] = list[i + 1];
      list[Capacity - 1] = Ranked<Value>::none();
    }
    writer.write(rank, first);
  }
  writer.write_mean();
}

// Any k: rank by rank the first of those that come after the last one found.
template <class T>
__global__ void __launch_bounds__(kMapsPerBlock* kWarp) pool_rank_by_rank(GlobalKMaxPool op) {
  using Value = Accumulation<T>;
  const int64_t map = static_cast<int64_t>(blockIdx.x) * kMapsPerBlock + threadIdx.x / kWarp;
  if (map >= op.layout.maps()) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t positions = op.layout.positions();
  const auto memory = Map<const T>::at(const_cast<void*>(op.features), op.layout, map);
  RankWriter<T> writer(op, map);
  Ranked<Value> last{static_cast<Value>(NAN), -1};  // before everything
  for (int64_t rank = 0; rank < op.k; ++rank) {
    Ranked<Value> best = Ranked<Value>::none();
    for (int64_t position = lane; position < positions; position += kWarp) {
      const Ranked<Value> candidate{widen(memory[position]), static_cast<int32_t>(position)};
      if (last.before(candidate) && candidate.before(best)) best = candidate;
    }
    last = warp_first(best);
    writer.write(rank, last);
  }
  writer.write_mean();
}

// Clears the map's gradient, then writes its k entries.
template <class T, int Elements>
__global__ void __launch_bounds__(kMapsPerBlock* kWarp) scatter_gradient(GlobalKMaxPoolBackward op) {
  using Value = Accumulation<T>;
  const int64_t map = static_cast<int64_t>(blockIdx.x) * kMapsPerBlock + threadIdx.x / kWarp;
  if (map >= op.layout.maps()) return;
  const int lane = threadIdx.x % kWarp;
  const auto memory = Map<T>::at(op.grad_features, op.layout, map);
  Chunk<T, Elements> zeros;
#pragma unroll
  for (int e = 0; e < Elements; ++e) zeros.element[e] = narrow<T>(0);
  for (int64_t position = lane * Elements; position < op.layout.positions(); position += kWarp * Elements)
    *reinterpret_cast<Chunk<T, Elements>*>(&memory[position]) = zeros;
  __syncwarp();  // no entry may be overwritten by another lane's zero
  const Value share = widen(static_cast<const T*>(op.grad)[map]) / static_cast<Value>(op.k);
  for (int64_t rank = lane; rank < op.k; rank += kWarp) {
    const int64_t at = map * op.k + rank;
    const int64_t index =
        op.narrow_indices ? static_cast<const int16_t*>(op.indices)[at] : static_cast<const int32_t*>(op.indices)[at];
    memory[index] = narrow<T>(op.weight ? share * static_cast<const Value*>(op.weight)[rank] : share);
  }
}

constexpr int kWeightThreads = 256;
constexpr int64_t kMapsPerChunk = 4096;

// Σ grad · S_r / k of one chunk of maps: the block's row of sums [chunks,k].
template <class T>
__global__ void __launch_bounds__(kWeightThreads) sum_weight_gradient(GlobalKMaxPoolWeightGrad op, int64_t maps) {
  using Value = Accumulation<T>;
  const int64_t begin = blockIdx.x * kMapsPerChunk, end = begin + kMapsPerChunk < maps ? begin + kMapsPerChunk : maps;
  for (int64_t rank = 0; rank < op.k; ++rank) {
    Value total = 0;
    for (int64_t map = begin + threadIdx.x; map < end; map += kWeightThreads)
      total += widen(static_cast<const T*>(op.grad)[map]) / static_cast<Value>(op.k) *
               static_cast<const Value*>(op.values)[map * op.k + rank];
    total = block_reduce<kWeightThreads>(total, Sum());
    if (threadIdx.x == 0) static_cast<Value*>(op.sums)[blockIdx.x * op.k + rank] = total;
  }
}

// The second stage: a block a rank.
template <class Value>
__global__ void __launch_bounds__(kWeightThreads)
    sum_chunks(const Value* sums, Value* total, int64_t chunks, int64_t k) {
  Value of_thread = 0;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kWeightThreads) of_thread += sums[chunk * k + blockIdx.x];
  of_thread = block_reduce<kWeightThreads>(of_thread, Sum());
  if (threadIdx.x == 0) total[blockIdx.x] = of_thread;
}

}  // namespace fgvc_ext::cuda
