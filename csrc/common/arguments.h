// What every kernel takes, the same on CPU and CUDA: raw memory, sizes and strides. Dtypes are those of the tensors;
// "accumulation type" is double beside float64, else float.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "layout.h"

namespace fgvc_ext {

// Work on maps is handed out in tiles of this many channels of one sample, whatever the instruction set.
constexpr int64_t kTile = 16;
FGVC_HOST_DEVICE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FGVC_HOST_DEVICE inline int64_t tiles(const Layout4& layout) {
  return layout.samples * ((layout.channels + kTile - 1) / kTile);
}
// A map's row in scratch memory, padded to whole vectors of the widest instruction set.
FGVC_HOST_DEVICE inline int64_t row_pitch(int64_t positions) { return (positions + 15) / 16 * 16; }

// Whether a kernel that works on rows of the accumulation type finds them in the tensor itself.
FGVC_HOST_DEVICE inline bool rows_in_place(Dtype dtype, const Layout4& layout) {
  return (dtype == Dtype::float32 || dtype == Dtype::float64) && layout.map_is_contiguous();
}
// Rows of scratch memory that a tile needs.
FGVC_HOST_DEVICE inline int64_t scratch_rows(Dtype dtype, const Layout4& layout) {
  return rows_in_place(dtype, layout) ? 0 : layout.channels < kTile ? layout.channels : kTile;
}

constexpr int64_t kInt16Positions = 32768;  // of a map that int16 indices can name

struct GlobalKMaxPool {
  Dtype dtype;
  Layout4 layout;
  int64_t k;
  const void* features;
  const void* weight;  // [k], accumulation type, or null
  void* output;        // [N,C], dtype
  void* indices;       // [N,C,k], int16 or int32
  bool narrow_indices;
  void* values;  // [N,C,k], accumulation type, or null

  // Channels side by side: k-max pooling takes them a lane each, several tiles together as far as the caches allow.
  bool interleaved() const {
    return layout.channels_are_contiguous() && !layout.map_is_contiguous() && k <= kTile && dtype != Dtype::float64;
  }
  int64_t tiles_at_once() const {
    const int64_t fit = (int64_t{1} << 17) / (layout.positions() * kTile * 4);
    return fit < 1 ? 1 : fit > 8 ? 8 : fit;
  }
  // A task's: the tiles' rows; values and indices found.
  int64_t scratch_bytes() const {
    if (interleaved()) return (tiles_at_once() * kTile + 1) * row_pitch(layout.positions()) * 4 + kTile * k * 12;
    return scratch_rows(dtype, layout) * row_pitch(layout.positions()) * 8 + kTile * k * 12;
  }
};

struct GlobalKMaxPoolBackward {
  Dtype dtype;
  Layout4 layout;  // of grad_features
  int64_t k;
  const void* grad;     // [N,C], dtype
  const void* indices;  // [N,C,k]
  bool narrow_indices;
  const void* weight;  // [k], accumulation type, or null
  void* grad_features;
};

// Σ grad · S_r / k over a range of maps, for every rank r.
struct GlobalKMaxPoolWeightGrad {
  Dtype dtype;
  int64_t k;
  const void* grad;    // [maps], dtype
  const void* values;  // [maps,k], accumulation type
  void* sums;          // [k], double on the CPU, accumulation type on CUDA
};

struct Diversify {
  Dtype dtype;
  Layout4 layout;
  const void* maps;
  const int64_t* seed;  // [] or [N]
  bool seed_per_sample;
  uint64_t peak_threshold, patch_threshold;  // a 32-bit word below this hides
  int64_t patch_size;
  double alpha;
  void* scores;   // [N,C], dtype
  uint8_t* bits;  // [N,C,bytes_per_map]: bit y·W + x is set where suppressed

  FGVC_HOST_DEVICE int64_t bytes_per_map() const { return (layout.positions() + 7) / 8; }
  FGVC_HOST_DEVICE int64_t patch_columns() const { return (layout.width + patch_size - 1) / patch_size; }
  FGVC_HOST_DEVICE int64_t patch_rows() const { return (layout.height + patch_size - 1) / patch_size; }
  FGVC_HOST_DEVICE int64_t words_per_row() const { return (layout.width + 31) / 32; }
  // A task's: the tile's rows; suppressed positions of a patch row and of the whole map, one 32-bit word a channel.
  FGVC_HOST_DEVICE int64_t scratch_bytes() const {
    return scratch_rows(dtype, layout) * row_pitch(layout.positions()) * 8 +
           kTile * (words_per_row() + layout.positions() / 32 + 2) * 4;
  }
};

// Spreads bits over maps: gradients of diversify, or (grad null) the mask itself as 0 and 1.
struct SpreadBits {
  Dtype dtype;
  Layout4 layout;    // of output
  const void* grad;  // [N,C], dtype, or null
  const uint8_t* bits;
  double alpha;
  void* output;  // dtype, or bool where grad is null
};

// As numbered in the operator's schema.
enum Reduction : int64_t { kNone, kMean, kSum };

struct GradientBoosting {
  Dtype dtype;
  int64_t classes, row_stride, column_stride;  // of scores
  const void* scores;                          // [N,C]
  const int64_t* target;                       // [N]
  int64_t k, ignore_index;
  // [N], accumulation type; log_sum is log Σ exp(score − highest), so that large scores lose nothing
  void *highest, *log_sum, *threshold, *losses;

  // A task's: a row of scores; its keys or a heap of k.
  FGVC_HOST_DEVICE int64_t scratch_bytes() const { return (2 * row_pitch(classes) + k) * 8; }
};

struct GradientBoostingBackward {
  GradientBoosting forward;  // losses unused
  const void* grad;          // [] or [N], accumulation type
  bool grad_per_sample;
  const void* weight;  // [N], accumulation type: of the row in the loss, 0 where it is ignored
  void* grad_scores;   // [N,C], dtype
  int64_t row_stride, column_stride;

  FGVC_HOST_DEVICE int64_t scratch_bytes() const { return row_pitch(forward.classes) * 16; }
};

}  // namespace fgvc_ext
