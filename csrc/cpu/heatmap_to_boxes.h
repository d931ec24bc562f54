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

template <class T>
struct HeatMap {
  const T* data;
  int64_t row_stride, column_stride;
  __attribute__((always_inline)) Accumulation<T> at(int64_t y, int64_t x) const {
    return to_float(data[y * row_stride + x * column_stride]);
  }
};

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
FGVC_INLINE void boxes_of_maps(const HeatmapToBoxes& op, int64_t begin, int64_t end) {
  using Value = Accumulation<T>;
  const Value image_width = static_cast<Value>(op.image_width), image_height = static_cast<Value>(op.image_height);
  const Value min_size = static_cast<Value>(op.min_size);
  for (int64_t number = begin; number < end; ++number) {
    const HeatMap<T> map{static_cast<const T*>(op.heatmaps) + number * op.stride[0], op.stride[1], op.stride[2]};
    const auto range = extremes_of(map, op.height, op.width);
    const Value bound = static_cast<Value>(op.threshold) * (range.highest - range.lowest);
    int64_t left = op.width, right = -1, top = op.height, bottom = -1;
    for (int64_t y = 0; y < op.height; ++y)
      for (int64_t x = 0; x < op.width; ++x) {
        if (!(map.at(y, x) - range.lowest > bound)) continue;
        left = x < left ? x : left;
        right = x > right ? x : right;
        top = y < top ? y : top;
        bottom = y;
      }
    const Value columns = static_cast<Value>(op.width), rows = static_cast<Value>(op.height);
    const Value x1 = static_cast<Value>(left) * image_width / columns;
    const Value x2 = static_cast<Value>(right + 1) * image_width / columns;
    const Value y1 = static_cast<Value>(top) * image_height / rows;
    const Value y2 = static_cast<Value>(bottom + 1) * image_height / rows;
    const bool whole =
        !range.finite || range.highest == range.lowest || right < 0 || x2 - x1 < min_size || y2 - y1 < min_size;
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
