// Group bilinear pooling (deep bilinear transformation): at every position T = tanh(scale · Σ_g a_g a_gᵀ) of the
// channels a_g of each group, resized to the output's channels.
//
// Where positions lie side by side, lanes take neighbouring positions, and a warp computes small windows of T in
// registers; what windows read in common comes from the cache. Where channels lie side by side:
// group_bilinear_interleaved.cuh. Backward computes T anew; with D the gradient of its values and
// S = scale · (D + Dᵀ)(1 − T²), the gradient of row g is a_g S.
#pragma once

#include "group_bilinear_resize.cuh"
#include "index.cuh"

namespace fgvc_ext::cuda {

constexpr int kWindowWarps = 4, kWindowThreads = kWindowWarps * kWarp;
constexpr int kWindowRows = 4;
constexpr int kGradientColumns = 4;  // of a warp's window
constexpr int kGroupsPerWarp = 4;    // whose gradient a warp adds up
template <int Elements>
constexpr int kWindowColumns = Elements > 2 ? 4 : 8;

// What a block of `gradient_of_positions` has of S at once.
constexpr int kSlopeColumns = kWindowWarps * kGradientColumns, kSlopes = kWindowRows * kSlopeColumns;
constexpr int kGroupsPerBlock = kWindowWarps * kGroupsPerWarp;

// Values at neighbouring positions.
template <class Value, int Elements>
struct Values {
  Value at[Elements];
};

// Values of a warp's window in shared memory; each lane reads what it has written itself.
template <class Value, int Elements>
class LaneMemory {
 public:
  static constexpr unsigned kWidth = kWarp * Elements;

  // The lane's part of an array of entries that begins at `first`.
  __device__ explicit LaneMemory(const Shared<Value>& first) : mine_(first.from(threadIdx.x % kWarp * Elements)) {}
  __device__ __forceinline__ void put(unsigned entry, const Values<Value, Elements>& values) const {
#pragma unroll
    for (int e = 0; e < Elements; ++e) mine_[entry * kWidth + e] = values.at[e];
  }
  __device__ __forceinline__ Values<Value, Elements> get(unsigned entry) const {
    Values<Value, Elements> values;
#pragma unroll
    for (int e = 0; e < Elements; ++e) values.at[e] = mine_[entry * kWidth + e];
    return values;
  }

 private:
  Shared<Value> mine_;
};

// The channels of one sample at a lane's positions.
template <class T, int Elements, class Index>
struct BilinearReader {
  using Value = Accumulation<T>;
  using Lane = Values<Value, Elements>;

  Global<const T> sample;
  Global<const Value> code;
  Maps<Index> maps;
  uint32_t position, per_group, groups;
  Value scale;

  __device__ BilinearReader(const GroupBilinearInput& input, const Maps<Index>& maps, Index number, uint32_t position)
      : sample(Global<const T>(input.features).from(number * maps.sample_stride)),
        code(input.position),
        maps(maps),
        position(position),
        per_group(static_cast<uint32_t>(input.per_group)),
        groups(static_cast<uint32_t>(input.groups)),
        scale(static_cast<Value>(input.scale)) {}

  // a of one channel.
  __device__ __forceinline__ Lane channel(uint32_t number) const {
    const auto chunk = maps.template load<Elements>(sample.from(number * maps.channel_stride), position);
    const Value shift = code ? code.load(number) : Value(0);
    Lane values;
#pragma unroll
    for (int e = 0; e < Elements; ++e) values.at[e] = code ? widen(chunk.element[e]) + shift : widen(chunk.element[e]);
    return values;
  }

  // T of a window from (row, column) on; beyond T's sides, repeated. Its rows are put `pitch` entries apart.
  template <int Columns>
  __device__ __forceinline__ void window(uint32_t row, uint32_t column, const LaneMemory<Value, Elements>& result,
                                         unsigned pitch) const {
    Lane sums[kWindowRows][Columns] = {};
    for (uint32_t group = 0; group < groups; ++group) {
      Lane rows[kWindowRows], columns[Columns];
#pragma unroll
      for (int r = 0; r < kWindowRows; ++r) rows[r] = channel(group * per_group + min(row + r, per_group - 1));
#pragma unroll
      for (int c = 0; c < Columns; ++c) columns[c] = channel(group * per_group + min(column + c, per_group - 1));
#pragma unroll
      for (int r = 0; r < kWindowRows; ++r)
#pragma unroll
        for (int c = 0; c < Columns; ++c)
#pragma unroll
          for (int e = 0; e < Elements; ++e) sums[r][c].at[e] += rows[r].at[e] * columns[c].at[e];
    }
#pragma unroll
    for (int r = 0; r < kWindowRows; ++r)
#pragma unroll
      for (int c = 0; c < Columns; ++c) result.put(r * pitch + c, sums[r][c]);
#pragma unroll 1
    for (unsigned entry = 0; entry < kWindowRows * Columns; ++entry) {
      const unsigned at = entry / Columns * pitch + entry % Columns;
      result.put(at, saturated(result.get(at)));
    }
  }

  // T at one place.
  __device__ Lane response(uint32_t x) const {
    const uint32_t row = x / per_group, column = x - row * per_group;
    Lane sum = {};
    for (uint32_t group = 0; group < groups; ++group) {
      const Lane a = channel(group * per_group + row), b = channel(group * per_group + column);
#pragma unroll
      for (int e = 0; e < Elements; ++e) sum.at[e] += a.at[e] * b.at[e];
    }
    return saturated(sum);
  }

 private:
  __device__ __forceinline__ Lane saturated(Lane sum) const {
#pragma unroll
    for (int e = 0; e < Elements; ++e) sum.at[e] = tanh(sum.at[e] * scale);
    return sum;
  }
};

// A lane's positions: block x of those that cut the maps of all samples into pieces of a warp's width.
template <int Elements, class Index>
struct LanePositions {
  Index sample;
  uint32_t position;
  bool taken;

  __device__ LanePositions(const Divisor<uint32_t>& per_map, uint32_t positions) {
    uint32_t piece;
    sample = per_map.divide(blockIdx.x, piece);
    position = (piece * kWarp + threadIdx.x % kWarp) * Elements;
    taken = position < positions;
  }
};

template <class T, int Elements>
__device__ __forceinline__ Chunk<T, Elements> narrow(const Values<Accumulation<T>, Elements>& values) {
  Chunk<T, Elements> chunk;
#pragma unroll
  for (int e = 0; e < Elements; ++e) chunk.element[e] = narrow<T>(values.at[e]);
  return chunk;
}

template <class T, int Elements, class Index>
__global__ void __launch_bounds__(kWindowThreads)
    pool_positions(GroupBilinear op, Maps<Index> maps, Maps<Index> outputs, DeviceResize resize,
                   Divisor<uint32_t> pieces) {
  using Value = Accumulation<T>;
  constexpr int kColumns = kWindowColumns<Elements>, kEntries = kWindowRows * kColumns;
  const LanePositions<Elements, Index> lane(pieces, maps.positions);
  if (!lane.taken) return;
  const BilinearReader<T, Elements, Index> read(op.input, maps, lane.sample, lane.position);
  const uint32_t p = read.per_group, across = (p + kColumns - 1) / kColumns, warp = threadIdx.x / kWarp;
  const uint32_t windows = (p + kWindowRows - 1) / kWindowRows * across;
  const LaneMemory<Value, Elements> t(Shared<Value>::at(warp * kEntries * kWarp * Elements * sizeof(Value)));
  const auto output = Global<T>(op.output).from(lane.sample * outputs.sample_stride);
  for (uint32_t number = blockIdx.y * kWindowWarps + warp; number < windows; number += gridDim.y * kWindowWarps) {
    const uint32_t row = number / across * kWindowRows, column = (number - number / across * across) * kColumns;
    read.template window<kColumns>(row, column, t, kColumns);
#pragma unroll 1
    for (uint32_t entry = 0; entry < kEntries; ++entry) {
      const uint32_t i = row + entry / kColumns, k = column + entry % kColumns, x = i * p + k;
      if (i >= p || k >= p) continue;
      const bool inside = entry % kColumns + 1 < kColumns && k + 1 < p;
#pragma unroll 1
      for (uint32_t j = resize.first_output(x), end = resize.first_output(x + 1); j < end; ++j) {
        Values<Value, Elements> value = t.get(entry);
        Value above = 0;
        if (!resize.keeps()) resize.lower(j, above);
        if (above != 0) {
          const auto next = inside ? t.get(entry + 1) : read.response(x + 1);
#pragma unroll
          for (int e = 0; e < Elements; ++e) value.at[e] = value.at[e] * (1 - above) + next.at[e] * above;
        }
        outputs.template store<Elements>(output.from(j * outputs.channel_stride), lane.position,
                                         narrow<T, Elements>(value));
      }
    }
  }
}

// Adds D at place x of T: what the outputs on both sides of it give.
template <class T, int Elements, class Index>
__device__ __forceinline__ void add_response_gradient(const Global<const T>& grad, const Maps<Index>& maps,
                                                      uint32_t position, const DeviceResize& resize, uint32_t x,
                                                      Values<Accumulation<T>, Elements>& total) {
  using Value = Accumulation<T>;
  const uint32_t first = resize.keeps() || x == 0 ? resize.first_output(x) : resize.first_output(x - 1);
  for (uint32_t j = first; j < resize.first_output(x + 1); ++j) {
    Value share = 1;
    if (!resize.keeps()) {
      const uint32_t lower = resize.lower(j, share);
      if (lower == x) share = 1 - share;
      if (share == 0) continue;  // an output at the response before this one
    }
    const auto chunk = maps.template load<Elements>(grad.from(j * maps.channel_stride), position);
#pragma unroll
    for (int e = 0; e < Elements; ++e) total.at[e] += widen(chunk.element[e]) * share;
  }
}

// The gradient of four rows of some groups, which a block adds up. S of these rows is computed some columns at a time.
// All threads of the block must call.
template <class T, int Elements, class Index>
__device__ void gradient_of_rows(const GroupBilinearBackward& op, const Maps<Index>& maps, const Maps<Index>& grads,
                                 const Maps<Index>& outputs, const DeviceResize& resize,
                                 const LanePositions<Elements, Index>& lane, uint32_t row, uint32_t group) {
  using Value = Accumulation<T>;
  const unsigned warp = threadIdx.x / kWarp;
  const auto memory = Shared<Value>::at(0);
  const LaneMemory<Value, Elements> slopes(memory);  // [kWindowRows][kSlopeColumns]
  const LaneMemory<Value, Elements> of_warp(memory.from(warp * kGradientColumns * kWarp * Elements));
  const BilinearReader<T, Elements, Index> read(op.input, maps, lane.sample, lane.position);
  const auto grad = Global<const T>(op.grad).from(lane.sample * grads.sample_stride);
  const uint32_t p = read.per_group, first_group = group + warp * kGroupsPerWarp;
  Values<Value, Elements> sums[kGroupsPerWarp][kWindowRows] = {};
  for (uint32_t done = 0; done < p; done += kSlopeColumns) {
    __syncthreads();  // the last columns' S has been read
    const uint32_t column = done + warp * kGradientColumns;
    if (lane.taken && column < p) {
      read.template window<kGradientColumns>(row, column, of_warp, kSlopeColumns);
#pragma unroll 1
      for (unsigned entry = 0; entry < kWindowRows * kGradientColumns; ++entry) {
        const uint32_t r = entry / kGradientColumns, c = entry % kGradientColumns, i = row + r, k = column + c;
        if (i >= p || k >= p) continue;
        Values<Value, Elements> total = {};
#pragma unroll 1
        for (int side = 0; side < 2; ++side)
          add_response_gradient<T, Elements>(grad, grads, lane.position, resize, side == 0 ? i * p + k : k * p + i,
                                             total);
        Values<Value, Elements> slope = of_warp.get(r * kSlopeColumns + c);
#pragma unroll
        for (int e = 0; e < Elements; ++e) slope.at[e] = total.at[e] * (1 - slope.at[e] * slope.at[e]) * read.scale;
        of_warp.put(r * kSlopeColumns + c, slope);
      }
    }
    __syncthreads();
    if (!lane.taken) continue;
    const uint32_t columns = p - done < kSlopeColumns ? p - done : kSlopeColumns;
    for (uint32_t k = 0; k < columns; ++k) {
      Values<Value, Elements> s[kWindowRows];
#pragma unroll
      for (int r = 0; r < kWindowRows; ++r)
        s[r] = row + r < p ? slopes.get(r * kSlopeColumns + k) : Values<Value, Elements>{};
#pragma unroll
      for (int g = 0; g < kGroupsPerWarp; ++g) {
        if (first_group + g >= read.groups) continue;
        const auto a = read.channel((first_group + g) * p + done + k);
#pragma unroll
        for (int r = 0; r < kWindowRows; ++r)
#pragma unroll
          for (int e = 0; e < Elements; ++e) sums[g][r].at[e] += a.at[e] * s[r].at[e];
      }
    }
  }
  if (!lane.taken) return;
  const auto output = Global<T>(op.grad_features).from(lane.sample * outputs.sample_stride);
#pragma unroll
  for (int g = 0; g < kGroupsPerWarp; ++g)
#pragma unroll
    for (int r = 0; r < kWindowRows; ++r) {
      if (first_group + g >= read.groups || row + r >= p) continue;
      const Index channel = (first_group + g) * p + row + r;
      outputs.template store<Elements>(output.from(channel * outputs.channel_stride), lane.position,
                                       narrow<T, Elements>(sums[g][r]));
    }
}

template <class T, int Elements, class Index>
__global__ void __launch_bounds__(kWindowThreads)
    gradient_of_positions(GroupBilinearBackward op, Maps<Index> maps, Maps<Index> grads, Maps<Index> outputs,
                          DeviceResize resize, Divisor<uint32_t> pieces) {
  const LanePositions<Elements, Index> lane(pieces, maps.positions);
  const auto p = static_cast<uint32_t>(op.input.per_group), groups = static_cast<uint32_t>(op.input.groups);
  const uint32_t across = (p + kWindowRows - 1) / kWindowRows;
  const uint32_t blocks = (groups + kGroupsPerBlock - 1) / kGroupsPerBlock * across;
  for (uint32_t number = blockIdx.y; number < blocks; number += gridDim.y) {
    const uint32_t group = number / across, row = number - group * across;
    gradient_of_rows<T, Elements, Index>(op, maps, grads, outputs, resize, lane, row * kWindowRows,
                                         group * kGroupsPerBlock);
  }
}

}  // namespace fgvc_ext::cuda
