// Boxes around the hot part of heat maps, ELoPE section 5: one warp per map.
#pragma once

#include "../common/heatmap_to_boxes.h"
#include "index.cuh"
#include "reduction.cuh"

namespace fgvc_ext::cuda {

constexpr int kBoxThreads = kWarpsPerBlock * kWarp;

template <class T>
__global__ void __launch_bounds__(kBoxThreads) box_of_map(HeatmapToBoxes op, Divisor<uint32_t> columns) {
  using Value = Accumulation<T>;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp_index();
  if (number >= op.maps) return;
  const auto map = Global<const T>(op.heatmaps).from(number * op.stride[0]);
  const auto positions = static_cast<uint32_t>(op.height * op.width);
  // The warp's accesses begin with sectors, where the map lies in one piece: lanes before its begin look at the first
  // value once more. Neither that nor the order changes a result.
  const bool one_piece = op.stride[2] == 1 && op.stride[1] == op.width;
  const auto skipped = one_piece ? map.past_sector() / static_cast<uint32_t>(sizeof(T)) : 0u;
  const auto for_each_position = [&](auto use) {
    for (uint32_t i = lane_index(); i < positions + skipped; i += kWarp) {
      uint32_t column;
      const uint32_t row = columns.divide(i < skipped ? 0 : i - skipped, column);
      use(row, column, row * op.stride[1] + column * op.stride[2]);
    }
  };

  Value lowest = widen(map.load(0u)), highest = lowest, zero = 0;  // NaN as soon as a value is not finite
  for_each_position([&](uint32_t, uint32_t, int64_t at) {
    const Value value = widen(map.load(at));
    lowest = Smaller()(value, lowest);
    highest = Larger()(value, highest);
    zero += value - value;
  });
  lowest = warp_reduce(lowest, Smaller());
  highest = warp_reduce(highest, Larger());
  const bool finite = warp_reduce(zero, Sum()) == 0;

  const Value bound = static_cast<Value>(op.threshold) * (highest - lowest);
  int left = INT32_MAX, top = INT32_MAX, right = -1, bottom = -1;
  for_each_position([&](uint32_t row, uint32_t column, int64_t at) {
    if (!(widen(map.load(at)) - lowest > bound)) return;
    left = Smaller()(static_cast<int>(column), left);
    right = Larger()(static_cast<int>(column), right);
    top = Smaller()(static_cast<int>(row), top);
    bottom = Larger()(static_cast<int>(row), bottom);
  });
  left = warp_reduce(left, Smaller());
  right = warp_reduce(right, Larger());
  top = warp_reduce(top, Smaller());
  bottom = warp_reduce(bottom, Larger());
  if (lane_index() != 0) return;

  const Value image_width = static_cast<Value>(op.image_width), image_height = static_cast<Value>(op.image_height);
  const Value width = static_cast<Value>(op.width), height = static_cast<Value>(op.height);
  const Value min_size = static_cast<Value>(op.min_size);
  const Value x1 = static_cast<Value>(left) * image_width / width;
  const Value x2 = static_cast<Value>(right + 1) * image_width / width;
  const Value y1 = static_cast<Value>(top) * image_height / height;
  const Value y2 = static_cast<Value>(bottom + 1) * image_height / height;
  const bool whole = !finite || highest == lowest || right < 0 || x2 - x1 < min_size || y2 - y1 < min_size;
  const auto box = Global<Value>(op.boxes).from(number * 4);
  box.store(0, whole ? 0 : x1);
  box.store(1, whole ? 0 : y1);
  box.store(2, whole ? image_width : x2);
  box.store(3, whole ? image_height : y2);
}

}  // namespace fgvc_ext::cuda
