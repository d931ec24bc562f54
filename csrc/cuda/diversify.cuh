// Diversification block, subtle differences eq. 1–8, forward. Each map's random draws and a table from positions to
// draws lie in the block's shared memory. One warp per map (`suppress_and_pool`), one lane per channel where channels
// lie side by side (`suppress_channels`), or, where shared memory is too small for that, one block per map
// (`suppress_large`).
#pragma once

#include "../common/diversify.h"
#include "../common/philox.h"
#include "index.cuh"
#include "reduction.cuh"

namespace fgvc_ext::cuda {

constexpr int kDiversifyThreads = kWarpsPerBlock * kWarp;
constexpr int kByte = 8;  // positions of one byte of the mask

// How the positions of a map fall into patches. Draw 0 is for the peaks, draw 1 + p for patch p.
struct Patches {
  uint32_t columns, draws, calls;  // Philox gives four draws a call
  Divisor<uint32_t> width, size;

  explicit Patches(const Diversify& op) : Patches(op.layout, smaller_size(op)) {}

  __device__ __forceinline__ uint32_t draw_of(uint32_t position) const {
    uint32_t column;
    const uint32_t row = width.divide(position, column);
    return 1 + size.quotient(row) * columns + size.quotient(column);
  }

 private:
  // A patch may be larger than the map; then it has the map's size.
  static int64_t smaller_size(const Diversify& op) {
    const int64_t side = op.layout.height > op.layout.width ? op.layout.height : op.layout.width;
    return op.patch_size < side ? op.patch_size : side;
  }
  Patches(const Layout4& layout, int64_t side)
      : columns(static_cast<uint32_t>((layout.width + side - 1) / side)),
        draws(static_cast<uint32_t>(1 + (layout.height + side - 1) / side * columns)),
        calls((draws + 3) / 4),
        width(layout.width),
        size(side) {}
};

// The draws of one map: eq. 2 and 4.
class Draws {
 public:
  template <class Index>
  __device__ Draws(const Diversify& op, const Maps<Index>& maps, Index map)
      : peak_threshold_(op.peak_threshold), patch_threshold_(op.patch_threshold) {
    Index channel;
    const Index sample = maps.channels.divide(map, channel);
    seed_ = static_cast<uint64_t>(Global<const int64_t>(op.seed).load(op.seed_per_sample ? sample : 0));
    sample_ = op.seed_per_sample ? 0 : static_cast<uint32_t>(sample);
    channel_ = static_cast<uint32_t>(channel);
  }
  // Draws 4·call to 4·call + 3, one byte each, 1 where it hides; the first is the lowest.
  __device__ __forceinline__ uint32_t four(uint32_t call) const {
    const auto words = philox<>({{call, channel_, sample_, kDiversifyStream}}, seed_);
    uint32_t bytes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint64_t threshold = i == 0 && call == 0 ? peak_threshold_ : patch_threshold_;
      bytes |= static_cast<uint32_t>(words.word[i] < threshold) << 8 * i;
    }
    return bytes;
  }

 private:
  uint64_t peak_threshold_, patch_threshold_, seed_;
  uint32_t sample_, channel_;
};

// What one position adds to eq. 7 and 8.
template <class Value>
__device__ __forceinline__ Value suppressed(Value x, bool hide, Value alpha) {
  return hide ? alpha * x : x;
}

// The parts of the block's dynamic shared memory, in bytes; `maps` of the block.
struct DiversifyShared {
  uint32_t table, draws, bits;  // where each ends

  __host__ __device__ DiversifyShared(const Patches& patches, uint32_t positions, uint32_t maps)
      : table((positions * 2 + 15) / 16 * 16),
        draws(table + maps * patches.calls * 4),
        bits(draws + maps * ((positions + kByte - 1) / kByte)) {}
};

// The draw of every position: a table that all maps of the block share.
__device__ inline void fill_table(const Patches& patches, uint32_t positions, const Shared<uint16_t>& table) {
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < positions; i += kDiversifyThreads)
    table[i] = static_cast<uint16_t>(patches.draw_of(i));
}

// ------------------------------------------------------------------------------------------------------ a warp per map

// `Elements` neighbouring positions of each lane, and once more every 32 · Elements positions. Behind the map's end
// stand its last elements once more.
template <class T, int Elements>
struct Tile {
  using Value = Accumulation<T>;
  Value x[kByte];

  template <class Index>
  __device__ __forceinline__ void load(const Maps<Index>& maps, const Global<const T>& map, uint32_t begin) {
    Chunk<T, Elements> chunks[kByte / Elements];  // all are on their way before the first is used
#pragma unroll
    for (int i = 0; i < kByte; i += Elements) {
      const uint32_t position = begin + i * kWarp + lane_index() * Elements, last = maps.positions - Elements;
      chunks[i / Elements] = maps.template load<Elements>(map, position < last ? position : last);
    }
#pragma unroll
    for (int i = 0; i < kByte; ++i) x[i] = widen(chunks[i / Elements].element[i % Elements]);
  }
};

// Puts the mask bits of a lane's `Elements` positions together with those of its neighbours; the first lane of each
// byte gets the byte.
template <int Elements>
__device__ __forceinline__ unsigned gather_byte(unsigned bits) {
#pragma unroll
  for (int have = Elements; have < kByte; have *= 2) bits |= __shfl_down_sync(kAllLanes, bits, have / Elements) << have;
  return bits;
}

// One map: its score; its part of the mask, in shared memory.
template <class T, int Elements, class Index>
__device__ __forceinline__ Accumulation<T> suppress_map(const Maps<Index>& maps, const Global<const T>& map,
                                                        const Shared<uint16_t>& table, const Shared<uint8_t>& draws,
                                                        const Shared<uint8_t>& bits, Accumulation<T> alpha) {
  using Value = Accumulation<T>;
  constexpr uint32_t kTile = kWarp * kByte;
  Tile<T, Elements> tile;
  KeyOf<T> largest = 0;
#pragma unroll 1
  for (uint32_t begin = 0; begin < maps.positions; begin += kTile) {
    tile.load(maps, map, begin);
#pragma unroll
    for (int i = 0; i < kByte; ++i) largest = Larger()(largest, ordered_key(tile.x[i]));
  }
  // Eq. 1. It is NaN where the map has one: nothing equals it, so it has no peaks.
  const Value peak = value_of_key(warp_reduce(largest, Larger()));

  Value total = 0;
#pragma unroll 1
  for (uint32_t begin = 0; begin < maps.positions; begin += kTile) {
    if (maps.positions > kTile) tile.load(maps, map, begin);  // else it is still in registers
#pragma unroll
    for (int i = 0; i < kByte; i += Elements) {
      const uint32_t position = begin + i * kWarp + lane_index() * Elements;
      unsigned hidden = 0;
      if (position < maps.positions) {
        const auto draw = table.template load_chunk<Elements>(position);
#pragma unroll
        for (int e = 0; e < Elements; ++e) {
          const Value x = tile.x[i + e];
          const bool hide = draws[x == peak ? 0 : draw.element[e]];  // eq. 5 and 6
          total += suppressed(x, hide, alpha);
          hidden |= static_cast<unsigned>(hide) << e;
        }
      }
      hidden = gather_byte<Elements>(hidden);
      if (position < maps.positions && position % kByte == 0) bits[position / kByte] = static_cast<uint8_t>(hidden);
    }
  }
  return warp_reduce(total, Sum()) / static_cast<Value>(maps.positions);
}

template <class T, int Elements, class Index>
__global__ void __launch_bounds__(kDiversifyThreads)
    suppress_and_pool(Diversify op, Patches patches, Maps<Index> maps) {
  const uint32_t bytes = (maps.positions + kByte - 1) / kByte;
  const DiversifyShared parts(patches, maps.positions, kWarpsPerBlock);
  const auto table = Shared<uint16_t>::at(0);
  const auto draws = Shared<uint8_t>::at(parts.table), bits = Shared<uint8_t>::at(parts.draws);
  const Index first = Index{blockIdx.x} * kWarpsPerBlock;
  const unsigned count =
      maps.count - first < kWarpsPerBlock ? static_cast<unsigned>(maps.count - first) : kWarpsPerBlock;

  fill_table(patches, maps.positions, table);
  const auto four_draws = Shared<uint32_t>::at(parts.table);
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < count * patches.calls; i += kDiversifyThreads)
    four_draws[i] = Draws(op, maps, first + i / patches.calls).four(i % patches.calls);
  __syncthreads();

  const unsigned warp = warp_index();
  if (warp < count) {
    const auto memory = Global<const T>(op.maps).from(maps.begin(first + warp));
    const auto score = suppress_map<T, Elements>(maps, memory, table, draws.from(warp * patches.calls * 4),
                                                 bits.from(warp * bytes), static_cast<Accumulation<T>>(op.alpha));
    if (lane_index() == 0) Global<T>(op.scores).store(first + warp, narrow<T>(score));
  }
  __syncthreads();
  store_bytes<kDiversifyThreads>(Global<uint8_t>(op.bits).from(first * bytes), bits, count * bytes);
}

// -------------------------------------------------------------------------------------------------- a lane per channel

// A block has 32 channels; its warps take turns at bytes of eight positions, which one lane of each channel writes.
template <class T, class Index>
__global__ void __launch_bounds__(kDiversifyThreads)
    suppress_channels(Diversify op, Patches patches, ChannelGroups<Index> groups) {
  using Value = Accumulation<T>;
  using Key = KeyOf<T>;
  __shared__ Key of_warp[kWarpsPerBlock][kWarp];
  __shared__ Value total_of_warp[kWarpsPerBlock][kWarp];
  const ChannelGroup<Index> group(groups, blockIdx.x);
  const Maps<Index>& maps = groups.maps;
  const uint32_t positions = maps.positions, bytes = (positions + kByte - 1) / kByte;
  const DiversifyShared parts(patches, positions, kWarp);
  const auto table = Shared<uint16_t>::at(0);
  const auto draws = Shared<uint8_t>::at(parts.table);  // [draw][channel]
  const auto bits = Shared<uint8_t>::at(parts.draws);   // [channel][byte]
  const unsigned warp = warp_index(), lane = lane_index();
  const auto memory = Global<const T>(op.maps).from(group.begin + group.of_lane());

  fill_table(patches, positions, table);
  Key largest = 0;
  const Draws of_map(op, maps, group.first_map + group.of_lane());
#pragma unroll 1
  for (uint32_t call = warp; call < patches.calls; call += kWarpsPerBlock) {
    const uint32_t four = of_map.four(call);
#pragma unroll
    for (int i = 0; i < 4; ++i) draws[(4 * call + i) * kWarp + lane] = static_cast<uint8_t>(four >> 8 * i);
  }
  uint32_t first = warp;
#pragma unroll 1
  for (; first + 3 * kWarpsPerBlock < positions; first += 4 * kWarpsPerBlock) {
    const auto there = memory.from(first * maps.column_stride);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      largest = Larger()(largest, ordered_key(widen(there.load(i * kWarpsPerBlock * maps.column_stride))));
  }
#pragma unroll 1
  for (; first < positions; first += kWarpsPerBlock)
    largest = Larger()(largest, ordered_key(widen(memory.load(first * maps.column_stride))));
  of_warp[warp][lane] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarpsPerBlock; ++i) largest = Larger()(largest, of_warp[i][lane]);
  const Value peak = value_of_key(largest), alpha = static_cast<Value>(op.alpha);  // eq. 1

  Value total = 0;
  const auto suppress = [&](uint32_t byte, int count) {
    const uint32_t first = byte * kByte;
    const auto there = memory.from(first * maps.column_stride);
    unsigned hidden = 0;
#pragma unroll
    for (int i = 0; i < kByte; ++i) {
      if (i >= count) break;
      const Value x = widen(there.load(i * maps.column_stride));
      const bool hide = draws[(x == peak ? 0 : table[first + i]) * kWarp + lane];  // eq. 5 and 6
      total += suppressed(x, hide, alpha);
      hidden |= static_cast<unsigned>(hide) << i;
    }
    bits[lane * bytes + byte] = static_cast<uint8_t>(hidden);
  };
  const uint32_t whole = positions / kByte;
#pragma unroll 1
  for (uint32_t byte = warp; byte < whole; byte += kWarpsPerBlock) suppress(byte, kByte);
  if (whole < bytes && warp == whole % kWarpsPerBlock) suppress(whole, positions % kByte);
  total_of_warp[warp][lane] = total;
  __syncthreads();
  if (warp == 0 && group.lane_has_channel) {
    for (int i = 1; i < kWarpsPerBlock; ++i) total += total_of_warp[i][lane];
    Global<T>(op.scores).store(group.first_map + lane, narrow<T>(total / static_cast<Value>(positions)));
  }
  store_bytes<kDiversifyThreads>(Global<uint8_t>(op.bits).from(group.first_map * bytes), bits, group.channels * bytes);
}

// ------------------------------------------------------------------------------------------------------ a block per
// map

// A map of any size. `draws_fit`: its draws have room in shared memory; else every look draws anew.
template <class T, class Index>
__global__ void __launch_bounds__(kDiversifyThreads)
    suppress_large(Diversify op, Patches patches, Maps<Index> maps, bool draws_fit) {
  using Value = Accumulation<T>;
  const Index map = blockIdx.x;
  const uint32_t bytes = (maps.positions + kByte - 1) / kByte;
  const auto memory = Global<const T>(op.maps).from(maps.begin(map));
  const auto bits = Global<uint8_t>(op.bits).from(map * bytes);
  const auto shared = Shared<uint32_t>::at(0);
  const Draws draws(op, maps, map);
  for (uint32_t call = threadIdx.x; draws_fit && call < patches.calls; call += kDiversifyThreads)
    shared[call] = draws.four(call);
  KeyOf<T> largest = 0;
  for (uint32_t position = threadIdx.x; position < maps.positions; position += kDiversifyThreads)
    largest = Larger()(largest, ordered_key(widen(memory.load(maps.offset(position)))));
  const Value peak = value_of_key(block_reduce<kDiversifyThreads>(largest, Larger()));  // eq. 1

  Value total = 0;
  for (uint32_t begin = warp_index() * kWarp; begin < maps.positions; begin += kDiversifyThreads) {
    const uint32_t position = begin + lane_index();
    bool hide = false;
    if (position < maps.positions) {
      const Value x = widen(memory.load(maps.offset(position)));
      const uint32_t draw = x == peak ? 0 : patches.draw_of(position);
      const uint32_t four = draws_fit ? shared[draw / 4] : draws.four(draw / 4);
      hide = four >> draw % 4 * 8 & 1;  // eq. 5 and 6
      total += suppressed(x, hide, static_cast<Value>(op.alpha));
    }
    const unsigned votes = __ballot_sync(kAllLanes, hide), byte = begin / kByte + lane_index();
    if (lane_index() < kWarp / kByte && byte < bytes)
      bits.store(byte, static_cast<uint8_t>(votes >> kByte * lane_index()));
  }
  total = block_reduce<kDiversifyThreads>(total, Sum());
  if (threadIdx.x == 0) Global<T>(op.scores).store(map, narrow<T>(total / static_cast<Value>(maps.positions)));
}

}  // namespace fgvc_ext::cuda
