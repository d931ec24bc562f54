// Feature maps [N,C,H,W] of any strides as rows of float32 (float64 for float64) in index order y·W + x.
#pragma once

#include "../common/tiles.h"
#include "scratch.h"
#include "vector.h"

namespace fgvc_ext {

struct Tile {
  int64_t sample, channel, channels;
};

}  // namespace fgvc_ext

namespace fgvc_ext::FGVC_ISA {

FGVC_INLINE Tile tile_at(const Layout4& layout, int64_t number) {
  const int64_t per_sample = (layout.channels + kTile - 1) / kTile;
  const int64_t channel = number % per_sample * kTile, left = layout.channels - channel;
  return {number / per_sample, channel, left < kTile ? left : kTile};
}

// Values of rows that are gathered together at most, where more than one row is: 1 MB.
constexpr int64_t kGatheredValues = int64_t{1} << 18;

// How many channels of a tile `tile_rows` is asked for at once: all, where it need not gather them.
FGVC_INLINE int64_t channels_at_once(Dtype dtype, const Layout4& layout) {
  if (rows_in_place(dtype, layout)) return kTile;
  const int64_t fit = kGatheredValues / row_pitch(layout.positions());
  return fit < 1 ? 1 : smaller(fit, smaller(kTile, layout.channels));
}

// Memory for the rows of `channels_at_once` channels; none where they are in place.
template <class Value>
FGVC_INLINE Value* take_rows(Scratch& scratch, Dtype dtype, const Layout4& layout) {
  const int64_t rows = rows_in_place(dtype, layout) ? 0 : channels_at_once(dtype, layout);
  return scratch.take<Value>(rows * row_pitch(layout.positions()));
}

// Interleaved channels (channels_last and the like): kLanes positions × kLanes channels at a time through registers.
template <class T>
static __attribute__((noinline)) void gather_interleaved(const T* base, const Layout4& layout, int64_t channels,
                                                         float* rows) {
  const int64_t positions = layout.positions(), pitch = row_pitch(positions);
  int64_t y = 0, x = 0;
  for (int64_t position = 0; position < positions; position += kLanes) {
    const T* from[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      from[i] = base + y * layout.stride[2] + x * layout.stride[3];
      __builtin_prefetch(from[i] + kTile);  // the next tile stands beside this one, far from what the hardware foresees
      if (position + i + 1 < positions && ++x == layout.width) x = 0, ++y;
    }
    for (int64_t channel = 0; channel < channels; channel += kLanes) {
      Floats block[kLanes];
      if (channel + kLanes <= channels) {
        for (int i = 0; i < kLanes; ++i) block[i] = load(from[i] + channel);
      } else {
        for (int i = 0; i < kLanes; ++i) block[i] = load_partial(from[i] + channel, channels - channel, 0.f);
      }
      transpose(block);
      const int64_t valid = channels - channel < kLanes ? channels - channel : kLanes;
      for (int64_t i = 0; i < valid; ++i) store(rows + (channel + i) * pitch + position, block[i]);
    }
  }
}

template <class T, class Value>
static __attribute__((noinline)) void gather_strided(const T* base, const Layout4& layout, int64_t channels,
                                                     Value* rows) {
  const int64_t pitch = row_pitch(layout.positions());
  for (int64_t channel = 0; channel < channels; ++channel)
    for (int64_t y = 0; y < layout.height; ++y)
      for (int64_t x = 0; x < layout.width; ++x)
        rows[channel * pitch + y * layout.width + x] =
            to_float(base[channel * layout.stride[1] + y * layout.stride[2] + x * layout.stride[3]]);
}

// Rows of the tile's maps, `pitch` apart: in place where the memory already is that, else gathered in `scratch`.
template <class T, class Value>
FGVC_INLINE const Value* tile_rows(const T* data, const Layout4& layout, const Tile& tile, Value* scratch,
                                   int64_t& pitch) {
  const T* base = data + layout.offset(tile.sample, tile.channel);
  if constexpr (sizeof(T) == sizeof(Value)) {
    if (layout.map_is_contiguous()) {
      pitch = layout.stride[1];
      return base;
    }
  }
  pitch = row_pitch(layout.positions());
  if constexpr (sizeof(Value) == 4) {
    if (layout.channels_are_contiguous() && layout.positions() > 1) {
      gather_interleaved(base, layout, tile.channels, scratch);
      return scratch;
    }
    if (layout.map_is_contiguous()) {
      const int64_t positions = layout.positions(), whole = positions / kLanes * kLanes;
      for (int64_t channel = 0; channel < tile.channels; ++channel, base += layout.stride[1], scratch += pitch) {
        for (int64_t i = 0; i < whole; i += kLanes) store(scratch + i, load(base + i));
        for (int64_t i = whole; i < positions; ++i) scratch[i] = to_float(base[i]);
      }
      return scratch - tile.channels * pitch;
    }
  }
  gather_strided(base, layout, tile.channels, scratch);
  return scratch;
}

// --- the way back: rows of float32 (float64) into maps of any layout ---

template <class T>
FGVC_INLINE void store_as(T* to, Floats x, int64_t count) {
  float values[kLanes];
  store(values, x);
  for (int64_t i = 0; i < count; ++i) to[i] = from_float<T>(values[i]);
}

template <class T>
static __attribute__((noinline)) void scatter_interleaved(const float* rows, int64_t pitch, const Layout4& layout,
                                                          int64_t channels, T* base) {
  const int64_t positions = layout.positions();
  int64_t y = 0, x = 0;
  for (int64_t position = 0; position < positions; position += kLanes) {
    T* to[kLanes];
    const int64_t valid = smaller(kLanes, positions - position);
    for (int64_t i = 0; i < valid; ++i) {
      to[i] = base + y * layout.stride[2] + x * layout.stride[3];
      if (++x == layout.width) x = 0, ++y;
    }
    for (int64_t channel = 0; channel < channels; channel += kLanes) {
      const int64_t count = smaller(kLanes, channels - channel);
      Floats block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        block[i] = i < count ? load_within(rows + (channel + i) * pitch, position, positions, 0.f) : Floats{};
      transpose(block);
      if (count == kLanes) {
        for (int64_t i = 0; i < valid; ++i) store_as(to[i] + channel, block[i], kLanes);
      } else {
        for (int64_t i = 0; i < valid; ++i) store_as(to[i] + channel, block[i], count);
      }
    }
  }
}

// Writes the rows of the tile's maps, `pitch` apart.
template <class T, class Value>
FGVC_INLINE void write_tile_rows(const Value* rows, int64_t pitch, const Layout4& layout, const Tile& tile, T* data) {
  T* base = data + layout.offset(tile.sample, tile.channel);
  const int64_t positions = layout.positions();
  if (layout.map_is_contiguous()) {
    for (int64_t channel = 0; channel < tile.channels; ++channel) {
      const Value* row = rows + channel * pitch;
      T* to = base + channel * layout.stride[1];
      for (int64_t i = 0; i < positions; ++i) to[i] = from_float<T>(row[i]);
    }
    return;
  }
  if constexpr (sizeof(Value) == 4) {
    if (layout.channels_are_contiguous()) {
      scatter_interleaved(rows, pitch, layout, tile.channels, base);
      return;
    }
  }
  for (int64_t channel = 0; channel < tile.channels; ++channel)
    for (int64_t y = 0; y < layout.height; ++y)
      for (int64_t x = 0; x < layout.width; ++x)
        base[channel * layout.stride[1] + y * layout.stride[2] + x * layout.stride[3]] =
            from_float<T>(rows[channel * pitch + y * layout.width + x]);
}

}  // namespace fgvc_ext::FGVC_ISA
