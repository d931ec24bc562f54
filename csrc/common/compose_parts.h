// Part images, dual attention fusion section 3.3: what its kernels take, and what both host sides check and allocate.
#pragma once

#include <cmath>

#include "tiles.h"

namespace fgvc_ext {

constexpr int64_t kPool = 4;  // the blur works on means of 4 × 4 pixels
constexpr int64_t kPartChannels = 3;
constexpr double kLargestSigma = 4096;

struct ComposeParts {
  Dtype dtype;
  Layout4 layout;  // of images
  const void* images;
  int64_t parts;        // M, of each image
  const void* boxes;    // [N,M,4] x1, y1, x2, y2, accumulation type
  const int64_t* seed;  // [] or [N]
  bool seed_per_sample;
  double blur_sigma, noise_std;
  bool replace;  // noise takes the pixel's place
  int64_t part_height, part_width;
  int64_t small_height, small_width, small_pitch;
  void* rows;    // [N,3,small_height,small_pitch], accumulation type: the means, blurred along their rows
  void* small;   // the same, blurred along both sides
  void* output;  // [N,M,3,part_height,part_width], dtype

  FGVC_HOST_DEVICE int64_t row_factor() const { return layout.height / part_height; }
  FGVC_HOST_DEVICE int64_t column_factor() const { return layout.width / part_width; }
  FGVC_HOST_DEVICE bool blurs() const { return small_sigma() > 0; }
  FGVC_HOST_DEVICE double small_sigma() const { return blur_sigma / kPool; }
  FGVC_HOST_DEVICE int64_t radius() const { return static_cast<int64_t>(ceil(3 * small_sigma())); }
  FGVC_HOST_DEVICE int64_t small_rows() const { return layout.samples * kPartChannels * small_height; }
  FGVC_HOST_DEVICE int64_t small_offset(int64_t sample, int64_t channel) const {
    return (sample * kPartChannels + channel) * small_height * small_pitch;
  }
};

// The value of `size` that stands at place i, reflected at the first and the last one, as often as it takes.
static inline FGVC_HOST_DEVICE int64_t reflected(int64_t i, int64_t size) {
  if (size == 1) return 0;
  const int64_t period = 2 * (size - 1), place = (i % period + period) % period;
  return place < size ? place : period - place;
}

// The pixels [begin, end) of a side whose middle i + 0.5 lies in [low, high).
struct PixelRange {
  int64_t begin, end;
  FGVC_HOST_DEVICE bool holds(int64_t i) const { return begin <= i && i < end; }
};
static inline FGVC_HOST_DEVICE int64_t first_pixel(double side, int64_t size) {
  const double first = ceil(side - 0.5);
  return first <= 0 ? 0 : first >= static_cast<double>(size) ? size : static_cast<int64_t>(first);
}
static inline FGVC_HOST_DEVICE PixelRange pixels_between(double low, double high, int64_t size) {
  if (!(low < high)) return {0, 0};  // also where one is NaN
  return {first_pixel(low, size), first_pixel(high, size)};
}

// Where position i of `count` reads a row of `size` ≤ `count` values bilinearly: between two of them, which are the
// same one at the ends, at a share of the second.
struct Between {
  int64_t below, above;
  int64_t share;  // in units of 1 / (2 · count)
};
static inline FGVC_HOST_DEVICE Between between(int64_t next, int64_t share, int64_t size) {
  return {next > 0 ? next - 1 : 0, next < size ? next : size - 1, share};
}
static inline FGVC_HOST_DEVICE Between place_between(int64_t i, int64_t count, int64_t size) {
  const int64_t place = (2 * i + 1) * size + count;
  return between(place / (2 * count), place % (2 * count), size);
}

}  // namespace fgvc_ext

#ifndef FGVC_KERNELS_ONLY
#include "checks.h"

namespace fgvc_ext {

// A call's results, what it reads, and the kernels' arguments, which point into both.
struct ComposePartsCall {
  Tensor output, rows, small, boxes, seed;
  ComposeParts op;
};

inline ComposePartsCall prepare_parts(const Tensor& images, const Tensor& boxes, const Tensor& seed, double blur_sigma,
                                      double noise_std, bool replace, int64_t part_height, int64_t part_width) {
  const Checks check("compose_parts");
  const Layout4 layout = check.image("images", images);
  check.that(layout.channels == kPartChannels && layout.positions() > 0,
             "images must have 3 channels, and H and W of at least 1");
  check.floating("boxes", boxes, 3);
  const int64_t parts = boxes.size(1);
  check.beside("boxes", boxes, images, {layout.samples, parts, 4});
  check.seed(seed, images);
  check.that(blur_sigma >= 0 && blur_sigma <= kLargestSigma, "blur_sigma must be in [0, ", kLargestSigma, "], got ",
             blur_sigma);
  check.that(noise_std >= 0 && std::isfinite(noise_std), "noise_std must be at least 0 and finite, got ", noise_std);
  check.that(part_height >= 1 && part_width >= 1 && layout.height % part_height == 0 && layout.width % part_width == 0,
             "part_size must divide the sides of images, got ", part_height, ", ", part_width);
  const Tensor wide_boxes = *as_accumulation(boxes, images), dense_seed = as_dense(seed);
  const int64_t small_height = ceil_divide(layout.height, kPool), small_width = ceil_divide(layout.width, kPool);
  const bool works = blur_sigma > 0 && parts > 0;
  const std::vector<int64_t> small_size{works ? layout.samples : 0, kPartChannels, small_height,
                                        row_pitch(small_width)};
  Tensor output = empty(images, {layout.samples, parts, kPartChannels, part_height, part_width});
  Tensor rows = empty(images, small_size, accumulation(images)),
         small = empty(images, small_size, accumulation(images));
  const ComposeParts op{.dtype = dtype_of(images),
                        .layout = layout,
                        .images = images.const_data_ptr(),
                        .parts = parts,
                        .boxes = wide_boxes.const_data_ptr(),
                        .seed = dense_seed.const_data_ptr<int64_t>(),
                        .seed_per_sample = seed.dim() == 1,
                        .blur_sigma = blur_sigma,
                        .noise_std = noise_std,
                        .replace = replace,
                        .part_height = part_height,
                        .part_width = part_width,
                        .small_height = small_height,
                        .small_width = small_width,
                        .small_pitch = row_pitch(small_width),
                        .rows = rows.mutable_data_ptr(),
                        .small = small.mutable_data_ptr(),
                        .output = output.mutable_data_ptr()};
  return {output, rows, small, wide_boxes, dense_seed, op};
}

}  // namespace fgvc_ext
#endif
