// Location heat map, dual attention fusion section 3.2: the share of levels whose sum over the channels exceeds its
// mean over the positions.
//
// The features are read once, in the order of memory. A group's sums stay in the first-level cache while its channels
// pass by; masks and image are small beside them. Every position adds up its channels in the same order, so that a
// constant map stays one.
#pragma once

#include "../common/location_heatmap.h"
#include "maps.h"
#include "rows.h"
#include "stream.h"

namespace fgvc_ext::FGVC_ISA {

// --- the sums over the channels: of a row of positions, or of a group of channels ---

// sums[p] += Σ rows[c][p] over `Rows` rows.
template <int Rows, class T, class Value>
FGVC_INLINE void add_rows(const T* rows, int64_t pitch, int64_t positions, Value* sums) {
  for_each_vector<Value>(positions, [&](auto how, int64_t i) {
    Vector<Value> even = {}, odd = {};  // two chains, so that neither waits for itself
    for (int row = 0; row < Rows; ++row) (row % 2 ? odd : even) += how.at(rows + row * pitch, i, 0);
    how.put(sums, i, how.at(sums, i, 0) + (even + odd));
  });
}

template <class T, class Value>
static __attribute__((noinline)) void sum_rows(const T* rows, int64_t pitch, int64_t count, int64_t positions,
                                               Value* sums) {
  constexpr int kRows = 8;
  int64_t row = 0;
  for (; row + kRows <= count; row += kRows) add_rows<kRows>(rows + row * pitch, pitch, positions, sums);
  for (; row < count; ++row) add_rows<1>(rows + row * pitch, pitch, positions, sums);
}

// Channels side by side: those of a position are a row. Adds them up at a row of positions.
template <class T, class Value>
static __attribute__((noinline)) void sum_interleaved(const T* base, const Layout4& layout, Value* sums) {
  for (int64_t x = 0; x < layout.width; ++x, base += layout.stride[3])
    sums[x] = sum_of_terms<Value>(layout.channels, [&](auto how, int64_t i) { return how.at(base, i, 0); });
}

template <class T, class Value>
static __attribute__((noinline)) void sum_strided(const T* base, const Layout4& layout, int64_t count, Value* sums) {
  for (int64_t c = 0; c < count; ++c, base += layout.stride[1])
    for (int64_t y = 0; y < layout.height; ++y)
      for (int64_t x = 0; x < layout.width; ++x)
        sums[y * layout.width + x] += to_float(base[y * layout.stride[2] + x * layout.stride[3]]);
}

template <class T>
FGVC_INLINE void sum_positions(const LocationLevel& op, int64_t begin, int64_t end) {
  const Layout4& layout = op.layout;
  for (int64_t row = begin; row < end; ++row) {
    const T* base = static_cast<const T*>(op.features) + layout.offset(row / layout.height, 0);
    sum_interleaved(base + row % layout.height * layout.stride[2], layout,
                    static_cast<Accumulation<T>*>(op.sums) + row * layout.width);
  }
}

template <class T>
FGVC_INLINE void sum_groups(const LocationLevel& op, int64_t begin, int64_t end) {
  using Value = Accumulation<T>;
  const int64_t positions = op.layout.positions();
  for (int64_t number = begin; number < end; ++number) {
    const int64_t sample = number / op.groups, channel = number % op.groups * op.channels_per_group;
    const int64_t count = smaller(op.channels_per_group, op.layout.channels - channel);
    const T* base = static_cast<const T*>(op.features) + op.layout.offset(sample, channel);
    Value* sums = static_cast<Value*>(op.sums) + number * positions;
    for (int64_t i = 0; i < positions; ++i) sums[i] = 0;
    if (op.layout.map_is_contiguous()) {
      sum_rows(base, op.layout.stride[1], count, positions, sums);
    } else {
      sum_strided(base, op.layout, count, sums);
    }
  }
}

// --- the masks: a row for each level of each sample ---

template <class Value>
FGVC_INLINE void mask_levels(const LocationHeatmap& op, int64_t begin, int64_t end) {
  for (int64_t number = begin; number < end; ++number) {
    const int64_t sample = number / op.levels;
    const LocationMask& level = op.level[number % op.levels];
    const int64_t positions = level.positions();
    Value* sums = static_cast<Value*>(level.sums) + sample * level.groups * positions;
    for (int64_t group = 1; group < level.groups; ++group)
      for (int64_t i = 0; i < positions; ++i) sums[i] += sums[group * positions + i];

    const Value mean = row_sum(sums, positions) / static_cast<Value>(positions);
    bool any = false;
    for (int64_t i = 0; i < positions; ++i) any |= sums[i] > mean;
    const uint8_t outside = mean != mean ? kNoMask : any ? 0 : 1;
    uint8_t* mask = op.masks + sample * op.mask_positions + level.first;
    for (int64_t i = 0; i < positions; ++i) mask[i] = sums[i] > mean ? uint8_t{1} : outside;
  }
}

// --- the image ---

template <class T>
FGVC_INLINE void write_rows(const LocationHeatmap& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  auto* columns = scratch.take<int32_t>(op.levels * op.width);
  auto* totals = scratch.take<int32_t>(op.width);
  auto* line = scratch.take<T>(op.width);
  const int64_t bytes = op.width * static_cast<int64_t>(sizeof(T));
  const bool past_caches = streams(op.heatmap, op.samples * op.height * bytes, bytes);
  for (int64_t number = 0; number < op.levels && begin < end; ++number)
    for (int64_t x = 0; x < op.width; ++x)
      columns[number * op.width + x] = static_cast<int32_t>(nearest(x, op.width, op.level[number].width));

  const uint8_t* last[kMostLevels] = {};  // the rows of the masks that the last row of the image was made of
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / op.height, y = row % op.height;
    const uint8_t* from[kMostLevels] = {};
    bool same = true;
    for (int64_t number = 0; number < op.levels; ++number) {
      const LocationMask& level = op.level[number];
      from[number] =
          op.masks + sample * op.mask_positions + level.first + nearest(y, op.height, level.height) * level.width;
      same &= from[number] == last[number];
      last[number] = from[number];
    }
    T* to = static_cast<T*>(op.heatmap) + row * op.width;
    if (!same) {
      for (int64_t x = 0; x < op.width; ++x) totals[x] = from[0][columns[x]];
      for (int64_t number = 1; number < op.levels; ++number)
        for (int64_t x = 0; x < op.width; ++x) totals[x] += from[number][columns[number * op.width + x]];
      for (int64_t x = 0; x < op.width; ++x) line[x] = from_float<T>(location_share<Value>(totals[x], op.levels));
    }
    if (past_caches) {
      stream_row(to, line, bytes);
    } else {
      std::memcpy(to, line, bytes);
    }
  }
  if (past_caches) end_streaming();
}

void location_sums_of_positions(const LocationLevel& op, int64_t begin, int64_t end, Scratch&) {
  FGVC_SWITCH_DTYPE(op.dtype, sum_positions<T>(op, begin, end));
}
void location_sums_of_groups(const LocationLevel& op, int64_t begin, int64_t end, Scratch&) {
  FGVC_SWITCH_DTYPE(op.dtype, sum_groups<T>(op, begin, end));
}
void location_masks(const LocationHeatmap& op, int64_t begin, int64_t end, Scratch&) {
  op.dtype == Dtype::float64 ? mask_levels<double>(op, begin, end) : mask_levels<float>(op, begin, end);
}
void location_heatmap(const LocationHeatmap& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, write_rows<T>(op, begin, end, scratch));
}

}  // namespace fgvc_ext::FGVC_ISA
