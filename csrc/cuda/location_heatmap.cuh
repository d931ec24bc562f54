// Location heat map, dual attention fusion section 3.2: sums over the channels of each level, masks of all levels, and
// the image of their shares. The features are read once; the rest is small beside them.
#pragma once

#include "../common/location_heatmap.h"
#include "index.cuh"
#include "reduction.cuh"

namespace fgvc_ext::cuda {

constexpr int kLocationThreads = kWarpsPerBlock * kWarp;

// How a block shares the channels of a group: its threads take `chunks` neighbouring chunks of `rows` channels at once,
// so that with small maps a warp's access runs on into the next channel.
struct LocationBlock {
  uint32_t chunks, rows;
  Divisor<uint32_t> by_chunks;

  LocationBlock(int64_t positions, int elements)
      : chunks(static_cast<uint32_t>(smaller(ceil_divide(positions, elements), kLocationThreads))),
        rows(kLocationThreads / chunks),
        by_chunks(chunks) {}
  int64_t parts(int64_t positions, int elements) const { return ceil_divide(ceil_divide(positions, elements), chunks); }
};

// A block adds up the channels of one group of one sample, at some of its positions: any layout.
template <class T, int Elements, class Index>
__global__ void __launch_bounds__(kLocationThreads)
    sum_group(LocationLevel op, Maps<Index> maps, LocationBlock block, Divisor<uint32_t> parts) {
  using Value = Accumulation<T>;
  __shared__ Value of_thread[kLocationThreads][Elements];
  uint32_t part, chunk;
  const uint32_t number = parts.divide(blockIdx.x, part);
  const auto groups = static_cast<uint32_t>(op.groups);
  const Index sample = number / groups, first = (number - sample * groups) * static_cast<Index>(op.channels_per_group);
  const Index all = maps.channels.value(), last = first + static_cast<Index>(op.channels_per_group);
  const Index end = sample * all + (last < all ? last : all);
  const uint32_t row = block.by_chunks.divide(threadIdx.x, chunk);
  const uint32_t position = (part * block.chunks + chunk) * Elements;

  Value total[Elements] = {};
  if (row < block.rows && position < maps.positions)
    for (Index map = sample * all + first + row; map < end; map += block.rows) {
      const auto x = maps.template load<Elements>(Global<const T>(op.features).from(maps.begin(map)), position);
#pragma unroll
      for (int e = 0; e < Elements; ++e) total[e] += widen(x.element[e]);
    }
#pragma unroll
  for (int e = 0; e < Elements; ++e) of_thread[threadIdx.x][e] = total[e];
  __syncthreads();
  if (row != 0 || position >= maps.positions) return;
  const auto sums = Global<Value>(op.sums).from(static_cast<int64_t>(number) * maps.positions + position);
  Chunk<Value, Elements> sum;
#pragma unroll
  for (int e = 0; e < Elements; ++e) {
    for (uint32_t other = 1; other < block.rows; ++other) total[e] += of_thread[other * block.chunks + chunk][e];
    sum.element[e] = total[e];
  }
  sums.template store_chunk<Elements>(0, sum);
}

// Channels side by side: a warp for each position, whose lanes share its channels.
template <class T, int Elements, class Index>
__global__ void __launch_bounds__(kLocationThreads) sum_interleaved(LocationLevel op, Maps<Index> maps) {
  using Value = Accumulation<T>;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp_index();
  if (number >= op.layout.samples * maps.positions) return;
  const int64_t sample = number / maps.positions;
  const auto position = static_cast<uint32_t>(number - sample * maps.positions);
  const auto channels = static_cast<uint32_t>(maps.channels.value());
  const auto row =
      Global<const T>(op.features).from(static_cast<Index>(sample) * maps.sample_stride + maps.offset(position));
  Value total = 0;
  for (uint32_t c = lane_index() * Elements; c < channels; c += kWarp * Elements) {
    if constexpr (Elements > 1) {
      const auto x = row.template load_chunk<Elements>(c);
#pragma unroll
      for (int e = 0; e < Elements; ++e) total += widen(x.element[e]);
    } else {
      total += widen(row.load(c));
    }
  }
  total = warp_reduce(total, Sum());
  if (lane_index() == 0) Global<Value>(op.sums).store(number, total);
}

// One block for each level of each sample.
template <class Value>
__global__ void __launch_bounds__(kLocationThreads) location_masks(LocationHeatmap op) {
  const int64_t sample = blockIdx.x / op.levels;
  const LocationMask level = op.level[blockIdx.x - sample * op.levels];
  const auto positions = static_cast<uint32_t>(level.positions());
  const auto sums = Global<Value>(level.sums).from(sample * level.groups * positions);
  Value all = 0;
  for (uint32_t i = threadIdx.x; i < positions; i += kLocationThreads) {
    Value total = sums.load(i);
    for (int64_t group = 1; group < level.groups; ++group) total += sums.load(group * positions + i);
    sums.store(i, total);
    all += total;
  }
  const Value mean = block_reduce<kLocationThreads>(all, Sum()) / static_cast<Value>(positions);
  int any = 0;
  for (uint32_t i = threadIdx.x; i < positions; i += kLocationThreads) any |= sums.load(i) > mean;
  any = block_reduce<kLocationThreads>(any, Larger());
  const uint8_t outside = mean != mean ? kNoMask : any ? 0 : 1;
  const auto mask = Global<uint8_t>(op.masks).from(sample * op.mask_positions + level.first);
  for (uint32_t i = threadIdx.x; i < positions; i += kLocationThreads)
    mask.store(i, sums.load(i) > mean ? uint8_t{1} : outside);
}

// What the image's pixels are divided by: their rows and columns, to find the masks' ones.
template <class Index>
struct LocationImage {
  Divisor<uint32_t> blocks, chunks;  // blocks of a sample, chunks of a row
  Divisor<Index> rows, columns;      // twice the image's sides
  uint32_t one_column = 0;           // bit l: in level l, a chunk's pixels all lie in one column

  LocationImage(const LocationHeatmap& op, int elements)
      : blocks(blocks_of_sample(op, elements)),
        chunks(op.width / elements),
        rows(2 * op.height),
        columns(2 * op.width) {
    for (int64_t number = 0; number < op.levels; ++number)
      one_column |= static_cast<uint32_t>(op.width % (op.level[number].width * elements) == 0) << number;
  }
  static int64_t blocks_of_sample(const LocationHeatmap& op, int elements) {
    return ceil_divide(op.height * (op.width / elements), kLocationThreads);
  }
};

// A thread for each chunk of a row. `nearest` of the common header, with the divisors at hand.
template <class T, int Elements, class Index>
__global__ void __launch_bounds__(kLocationThreads) write_heatmap(LocationHeatmap op, LocationImage<Index> image) {
  using Value = Accumulation<T>;
  uint32_t block, column;
  const int64_t sample = image.blocks.divide(blockIdx.x, block);
  const uint32_t chunk = block * kLocationThreads + threadIdx.x, y = image.chunks.divide(chunk, column);
  if (y >= op.height) return;
  int total[Elements] = {};
  for (int64_t number = 0; number < op.levels; ++number) {
    const LocationMask& level = op.level[number];
    const auto row = static_cast<int64_t>(image.rows.quotient((2 * Index{y} + 1) * static_cast<Index>(level.height)));
    const auto mask =
        Global<const uint8_t>(op.masks).from(sample * op.mask_positions + level.first + row * level.width);
    const auto at = [&](int e) {
      return image.columns.quotient((2 * (Index{column} * Elements + e) + 1) * static_cast<Index>(level.width));
    };
    if (image.one_column >> number & 1) {
      const int value = mask.load(at(0));
#pragma unroll
      for (int e = 0; e < Elements; ++e) total[e] += value;
    } else {
#pragma unroll
      for (int e = 0; e < Elements; ++e) total[e] += mask.load(at(e));
    }
  }
  Chunk<T, Elements> shares;
#pragma unroll
  for (int e = 0; e < Elements; ++e) shares.element[e] = narrow<T>(location_share<Value>(total[e], op.levels));
  const auto to = Global<T>(op.heatmap).from((sample * op.height + y) * op.width);
  to.template store_chunk<Elements>(Index{column} * Elements, shares);
}

}  // namespace fgvc_ext::cuda
