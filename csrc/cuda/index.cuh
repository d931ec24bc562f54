// Where a map's elements lie. `Index` numbers maps and elements: uint32_t, or uint64_t for tensors beyond 2³¹ elements.
// A map's own positions always fit 31 bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/layout.h"
#include "elements.cuh"
#include "memory.cuh"

namespace fgvc_ext::cuda {

__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
__device__ __forceinline__ uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }

// Division by a number that a launch does not change: a multiplication and a shift (Granlund and Montgomery, "Division
// by invariant integers using multiplication", 1994). Dividend and divisor must be below half of the type's range.
template <class Index>
class Divisor {
 public:
  // By 0, which only empty tensors ask for, it divides as by 1.
  explicit Divisor(int64_t divisor) : divisor_(static_cast<Index>(divisor > 0 ? divisor : 1)) {
    constexpr int kBits = sizeof(Index) * 8;
    while (shift_ < kBits - 1 && Index{1} << shift_ < divisor_) ++shift_;
    const auto power = static_cast<unsigned __int128>(1) << kBits;
    multiplier_ = static_cast<Index>(power * ((Index{1} << shift_) - divisor_) / divisor_ + 1);
  }
  __device__ __forceinline__ Index quotient(Index dividend) const {
    return (multiply_high(dividend, multiplier_) + dividend) >> shift_;
  }
  __device__ __forceinline__ Index divide(Index dividend, Index& remainder) const {
    const Index result = quotient(dividend);
    remainder = dividend - result * divisor_;
    return result;
  }
  __device__ Index value() const { return divisor_; }

 private:
  Index divisor_, multiplier_ = 0;
  int shift_ = 0;
};

// Whether 32 bits number the elements of a tensor, both in the order of its sizes and in memory.
inline bool fits_32_bits(const Layout4& layout) {
  const int64_t size[4] = {layout.samples, layout.channels, layout.height, layout.width};
  int64_t last = 0;
  for (int i = 0; i < 4; ++i) last += (size[i] > 0 ? size[i] - 1 : 0) * layout.stride[i];
  return last <= INT32_MAX && layout.maps() <= INT32_MAX / (layout.positions() > 0 ? layout.positions() : 1);
}

// A layout, prepared for the device.
template <class Index>
struct Maps {
  Index count;
  uint32_t positions;
  Divisor<Index> channels;
  Divisor<uint32_t> width;
  Index sample_stride, channel_stride, row_stride, column_stride;
  bool evenly_spaced;  // position i lies i column strides after the first

  explicit Maps(const Layout4& layout)
      : count(static_cast<Index>(layout.maps())),
        positions(static_cast<uint32_t>(layout.positions())),
        channels(layout.channels),
        width(layout.width),
        sample_stride(static_cast<Index>(layout.stride[0])),
        channel_stride(static_cast<Index>(layout.stride[1])),
        row_stride(static_cast<Index>(layout.stride[2])),
        column_stride(static_cast<Index>(layout.position_step())),
        evenly_spaced(layout.positions_are_evenly_spaced()) {}

  __device__ __forceinline__ Index begin(Index map) const {
    Index channel;
    const Index sample = channels.divide(map, channel);
    return sample * sample_stride + channel * channel_stride;
  }
  __device__ __forceinline__ Index offset(uint32_t position) const {
    if (evenly_spaced) return position * column_stride;
    uint32_t column;
    const uint32_t row = width.divide(position, column);
    return row * row_stride + column * column_stride;
  }
  // The next `Elements` of a map from `position` on; more than one only where its positions lie side by side.
  template <int Elements, class T>
  __device__ __forceinline__ auto load(const Global<T>& map, uint32_t position) const {
    if constexpr (Elements > 1) {
      return map.template load_chunk<Elements>(position);
    } else {
      return Chunk<std::remove_const_t<T>, 1>{{map.load(offset(position))}};
    }
  }
  template <int Elements, class T>
  __device__ __forceinline__ void store(const Global<T>& map, uint32_t position,
                                        const Chunk<T, Elements>& chunk) const {
    if constexpr (Elements > 1) {
      map.template store_chunk<Elements>(position, chunk);
    } else {
      map.store(offset(position), chunk.element[0]);
    }
  }
};

// Channels side by side in memory: kernels take one channel per lane, so that a warp's access is contiguous.
inline bool channels_are_interleaved(const Layout4& layout) {
  return layout.stride[1] == 1 && layout.channels > 1 && layout.positions_are_evenly_spaced();
}

// The work of such kernels: a block has up to 32 channels of one sample, one per lane, and its warps share the
// positions.
template <class Index>
struct ChannelGroups {
  Maps<Index> maps;
  Divisor<uint32_t> per_sample;

  explicit ChannelGroups(const Layout4& layout) : maps(layout), per_sample((layout.channels + 31) / 32) {}
  static int64_t blocks(const Layout4& layout) { return layout.samples * ((layout.channels + 31) / 32); }
};

// One block's channels.
template <class Index>
struct ChannelGroup {
  Index first_map, begin;  // of the first channel: its number, and where it begins in memory
  unsigned channels;       // 1 to 32
  bool lane_has_channel;

  __device__ ChannelGroup(const ChannelGroups<Index>& groups, uint32_t block) {
    uint32_t group;
    const Index sample = groups.per_sample.divide(block, group), all = groups.maps.channels.value();
    const Index channel = Index{group} * 32;
    first_map = sample * all + channel;
    begin = sample * groups.maps.sample_stride + channel;
    channels = all - channel < 32 ? static_cast<unsigned>(all - channel) : 32;
    lane_has_channel = threadIdx.x % 32 < channels;
  }
  // The channel's number in the group; a lane without one does the first channel's work once more and writes nothing.
  __device__ unsigned of_lane() const { return lane_has_channel ? threadIdx.x % 32 : 0; }
};

}  // namespace fgvc_ext::cuda
