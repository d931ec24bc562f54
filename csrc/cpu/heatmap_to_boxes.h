// Boxes around the hot part of heat maps, ELoPE section 5: the smallest rectangle around what exceeds a share of the
// map's range, in pixels of the image.
#pragma once

#include "../common/heatmap_to_boxes.h"
#include "scratch.h"
#include "vector.h"

namespace fgvc_ext::FGVC_ISA {

template <class Value>
struct Extremes {
  Value lowest, highest;
  bool finite;
};

// The columns and rows of what is kept; right < left where nothing is.
struct Rectangle {
  int64_t left, top, right, bottom;
};

template <class T>
struct HeatMap {
  const T* data;
  int64_t row_stride, column_stride;
  __attribute__((always_inline)) Accumulation<T> at(int64_t y, int64_t x) const {
    return to_float(data[y * row_stride + x * column_stride]);
  }
};

// --- any strides, any type ---

template <class T>
FGVC_INLINE Extremes<Accumulation<T>> extremes_of(const HeatMap<T>& map, int64_t height, int64_t width) {
  using Value = Accumulation<T>;
  Extremes<Value> found{map.at(0, 0), map.at(0, 0), true};
  Value zero = 0;  // NaN as soon as a value is not finite
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x) {
      const Value value = map.at(y, x);
      found.lowest = value < found.lowest ? value : found.lowest;
      found.highest = value > found.highest ? value : found.highest;
      zero += value - value;
    }
  found.finite = zero == 0;
  return found;
}

template <class T>
FGVC_INLINE Rectangle kept_by(const HeatMap<T>& map, int64_t height, int64_t width, Accumulation<T> lowest,
                              Accumulation<T> bound) {
  Rectangle kept{width, height, -1, -1};
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x) {
      if (!(map.at(y, x) - lowest > bound)) continue;
      kept.left = x < kept.left ? x : kept.left;
      kept.right = x > kept.right ? x : kept.right;
      kept.top = y < kept.top ? y : kept.top;
      kept.bottom = y;
    }
  return kept;
}

// --- rows of values side by side, in vectors ---

template <class T>
static __attribute__((noinline)) Extremes<float> extremes_of_rows(const HeatMap<T>& map, int64_t height,
                                                                  int64_t width) {
  const float first = map.at(0, 0);
  Floats lowest = broadcast(first), highest = lowest, zero = {};
  const auto take = [&](Floats x) {
    lowest = x < lowest ? x : lowest;
    highest = x > highest ? x : highest;
    zero += x - x;  // NaN as soon as a value is not finite
  };
  for (int64_t y = 0; y < height; ++y) {
    const T* row = map.data + y * map.row_stride;
    int64_t x = 0;
    for (; x + kLanes <= width; x += kLanes) take(load(row + x));
    if (x < width) take(load_partial(row + x, width - x, first));
  }
  Extremes<float> found{lowest[0], highest[0], sum(zero) == 0};
  for (int lane = 1; lane < kLanes; ++lane) {
    found.lowest = lowest[lane] < found.lowest ? lowest[lane] : found.lowest;
    found.highest = highest[lane] > found.highest ? highest[lane] : found.highest;
  }
  return found;
}

template <class T>
static __attribute__((noinline)) Rectangle kept_by_rows(const HeatMap<T>& map, int64_t height, int64_t width,
                                                        float lowest, float bound) {
  Rectangle kept{width, height, -1, -1};
  for (int64_t y = 0; y < height; ++y) {
    const T* row = map.data + y * map.row_stride;
    int64_t first = -1, last = -1;
    const auto take = [&](int64_t x, Floats values) {
      const uint32_t bits = greater_bits(values - lowest, broadcast(bound));
      if (!bits) return;
      if (first < 0) first = x + __builtin_ctz(bits);
      last = x + 31 - __builtin_clz(bits);
    };
    int64_t x = 0;
    for (; x + kLanes <= width; x += kLanes) take(x, load(row + x));
    // Behind the end of the row there are NaNs, which are not kept.
    if (x < width) take(x, load_partial(row + x, width - x, __builtin_nanf("")));
    if (first < 0) continue;
    kept.left = first < kept.left ? first : kept.left;
    kept.right = last > kept.right ? last : kept.right;
    kept.top = y < kept.top ? y : kept.top;
    kept.bottom = y;
  }
  return kept;
}

// --- boxes ---

template <class T>
FGVC_INLINE void boxes_of_maps(const HeatmapToBoxes& op, int64_t begin, int64_t end) {
  using Value = Accumulation<T>;
  const Value image_width = static_cast<Value>(op.image_width), image_height = static_cast<Value>(op.image_height);
  const Value min_size = static_cast<Value>(op.min_size);
  for (int64_t number = begin; number < end; ++number) {
    const HeatMap<T> map{static_cast<const T*>(op.heatmaps) + number * op.stride[0], op.stride[1], op.stride[2]};
    bool in_rows = false;
    if constexpr (sizeof(T) <= 4) in_rows = op.stride[2] == 1 && op.width > 1;
    Extremes<Value> range;
    Rectangle kept;
    if constexpr (sizeof(T) <= 4) {
      if (in_rows) {
        range = extremes_of_rows(map, op.height, op.width);
        const float bound = static_cast<float>(op.threshold) * (range.highest - range.lowest);
        kept = kept_by_rows(map, op.height, op.width, range.lowest, bound);
      }
    }
    if (!in_rows) {
      range = extremes_of(map, op.height, op.width);
      const Value bound = static_cast<Value>(op.threshold) * (range.highest - range.lowest);
      kept = kept_by(map, op.height, op.width, range.lowest, bound);
    }
    const Value columns = static_cast<Value>(op.width), rows = static_cast<Value>(op.height);
    const Value x1 = static_cast<Value>(kept.left) * image_width / columns;
    const Value x2 = static_cast<Value>(kept.right + 1) * image_width / columns;
    const Value y1 = static_cast<Value>(kept.top) * image_height / rows;
    const Value y2 = static_cast<Value>(kept.bottom + 1) * image_height / rows;
    const bool whole =
        !range.finite || range.highest == range.lowest || kept.right < 0 || x2 - x1 < min_size || y2 - y1 < min_size;
    Value* box = static_cast<Value*>(op.boxes) + number * 4;
    box[0] = whole ? 0 : x1;
    box[1] = whole ? 0 : y1;
    box[2] = whole ? image_width : x2;
    box[3] = whole ? image_height : y2;
  }
}

void heatmap_to_boxes(const HeatmapToBoxes& op, int64_t begin, int64_t end, Scratch&) {
  FGVC_SWITCH_DTYPE(op.dtype, boxes_of_maps<T>(op, begin, end));
}

}  // namespace fgvc_ext::FGVC_ISA
