// What every kernel takes, the same on CPU and CUDA: raw memory, sizes and strides. Dtypes are those of the tensors;
// "accumulation type" is double beside float64, else float.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "layout.h"

namespace fgvc_ext {

// Work on maps is handed out in tiles of this many channels of one sample, whatever the instruction set.
constexpr int64_t kTile = 16;
FGVC_HOST_DEVICE inline int64_t tiles(const Layout4& layout) {
  return layout.samples * ((layout.channels + kTile - 1) / kTile);
}
// A map's row in scratch memory, padded to whole vectors of the widest instruction set.
FGVC_HOST_DEVICE inline int64_t row_pitch(int64_t positions) { return (positions + 15) / 16 * 16; }

// k-max pooling saves int16 indices for maps of up to this many positions.
inline bool narrow_indices(const Layout4& layout) { return layout.positions() <= 32768; }

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

  // A task's: the tile's rows; values and indices found.
  FGVC_HOST_DEVICE int64_t scratch_bytes() const { return kTile * (row_pitch(layout.positions()) * 8 + k * 12); }
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
  void* sums;          // [k], accumulation type
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
    return kTile * (row_pitch(layout.positions()) * 8 + (words_per_row() + layout.positions() / 32 + 2) * 4);
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

struct GradientBoosting {
  Dtype dtype;
  int64_t classes, row_stride, column_stride;  // of scores
  const void* scores;                          // [N,C]
  const int64_t* target;                       // [N]
  int64_t k, ignore_index;
  void *losses, *log_sum, *threshold;  // [N], accumulation type

  // A task's: a row of scores; its keys or a heap of k.
  FGVC_HOST_DEVICE int64_t scratch_bytes() const { return (2 * row_pitch(classes) + k) * 8; }
};

struct GradientBoostingBackward {
  GradientBoosting forward;  // losses unused
  const void* grad;          // [] or [N], accumulation type
  bool grad_per_sample;
  const void* scale;  // [], accumulation type
  void* grad_scores;  // [N,C], dtype, contiguous rows unless strided below
  int64_t row_stride, column_stride;

  FGVC_HOST_DEVICE int64_t scratch_bytes() const { return row_pitch(forward.classes) * 16; }
};

}  // namespace fgvc_ext
