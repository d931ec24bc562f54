// How work on maps is cut, the same for every instruction set and thread count.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "layout.h"

namespace fgvc_ext {

// Work on maps is handed out in tiles of this many channels of one sample.
constexpr int64_t kTile = 16;

FGVC_HOST_DEVICE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FGVC_HOST_DEVICE constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

FGVC_HOST_DEVICE inline int64_t tiles(const Layout4& layout) {
  return layout.samples * ceil_divide(layout.channels, kTile);
}

// A map's row in scratch memory, padded to whole vectors of the widest instruction set.
FGVC_HOST_DEVICE inline int64_t row_pitch(int64_t positions) { return ceil_divide(positions, 16) * 16; }

// Whether a kernel that works on rows of the accumulation type finds them in the tensor itself.
FGVC_HOST_DEVICE inline bool rows_in_place(Dtype dtype, const Layout4& layout) {
  return (dtype == Dtype::float32 || dtype == Dtype::float64) && layout.map_is_contiguous();
}

}  // namespace fgvc_ext
