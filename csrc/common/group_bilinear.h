// Group bilinear pooling, dual attention fusion (deep bilinear transformation): what its kernels take, and what both
// host sides check and allocate.
#pragma once

#include "tiles.h"

namespace fgvc_ext {

// A group's channels at most: what is computed of their products at once, p² times 16 positions, is 64 MB then.
constexpr int64_t kMostGroupChannels = 1024;

// The p² responses resized to `channels`: linearly, the first and the last one kept. Output j lies at
// j · (p² − 1) / (channels − 1), which is counted in integers: no position is rounded.
struct Resize {
  int64_t from, channels;

  // The response at or below output j, and how far above it the output lies: `rest` of `steps()`.
  FGVC_HOST_DEVICE int64_t lower(int64_t j, int64_t& rest) const {
    const int64_t at = j * (from - 1), below = at / steps();
    rest = at - below * steps();
    return below;
  }
  FGVC_HOST_DEVICE int64_t steps() const { return channels > 1 ? channels - 1 : 1; }
};

// What forward and backward read alike.
struct GroupBilinearInput {
  Dtype dtype;
  Layout4 layout;
  int64_t groups, per_group;  // G and p
  double scale;
  const void* features;
  const void* position;  // [C], accumulation type, or null

  FGVC_HOST_DEVICE int64_t responses() const { return per_group * per_group; }
};

struct GroupBilinear {
  GroupBilinearInput input;
  Layout4 output_layout;
  Resize resize;
  void* output;  // [N,channels,H,W], dtype
};

struct GroupBilinearBackward {
  GroupBilinearInput input;
  Layout4 grad_layout, grad_features_layout;
  Resize resize;
  const void* grad;  // [N,channels,H,W], dtype, any strides
  void* grad_features;
};

// How the CPU kernels cut the positions: into blocks of a whole map where positions are evenly spaced in all tensors,
// else of its lines.
struct PositionBlocks {
  int64_t samples, lines, length, at_once, per_line;

  FGVC_HOST_DEVICE PositionBlocks(const GroupBilinearInput& input, const Layout4& other, const Layout4& result) {
    const Layout4& layout = input.layout;
    const bool whole = layout.positions_are_evenly_spaced() && other.positions_are_evenly_spaced() &&
                       result.positions_are_evenly_spaced();
    samples = layout.samples;
    lines = whole ? 1 : layout.height;
    length = whole ? layout.positions() : layout.width;
    // What is computed of a block should stay in the second-level cache.
    const int64_t values =
        layout.channels + input.responses() + (other.channels > result.channels ? other : result).channels;
    const int64_t fit = kBlockValues / values / 16 * 16;
    at_once = fit < 16 ? 16 : fit > 128 ? 128 : fit;
    per_line = ceil_divide(length, at_once);
  }
  FGVC_HOST_DEVICE int64_t count() const { return samples * lines * per_line; }

  static constexpr int64_t kBlockValues = int64_t{1} << 18;
};

inline FGVC_HOST_DEVICE PositionBlocks blocks_of(const GroupBilinear& op) {
  return PositionBlocks(op.input, op.output_layout, op.output_layout);
}
inline FGVC_HOST_DEVICE PositionBlocks blocks_of(const GroupBilinearBackward& op) {
  return PositionBlocks(op.input, op.grad_layout, op.grad_features_layout);
}

}  // namespace fgvc_ext

#ifndef FGVC_KERNELS_ONLY
#include "checks.h"

namespace fgvc_ext {

// A call's results, what it reads, and the kernel's arguments, which point into both.
struct GroupBilinearCall {
  Tensor output;
  std::optional<Tensor> position;
  GroupBilinear op;
};
struct GroupBilinearBackwardCall {
  Tensor grad_features;
  std::optional<Tensor> position;
  GroupBilinearBackward op;
};

// [N,channels,H,W] in the layout of `like`: dense, with channels side by side where those of `like` are.
inline Tensor empty_maps(const Tensor& like, int64_t channels) {
  if (channels == like.size(1)) return dense_like(like);
  const int64_t samples = like.size(0), height = like.size(2), width = like.size(3);
  if (like.stride(1) != 1 || like.size(1) == 1) return empty(like, {samples, channels, height, width});
  return empty_strided(like, {samples, channels, height, width},
                       {height * width * channels, 1, width * channels, channels});
}

// `position` comes back contiguous and in the accumulation type.
inline GroupBilinearInput prepare_bilinear_input(const Checks& check, const Tensor& features, int64_t groups,
                                                 std::optional<Tensor>& position, double scale) {
  const Layout4 layout = check.image("features", features);
  const int64_t channels = layout.channels;
  check.that(channels > 0 && layout.positions() > 0, "features must have C, H and W of at least 1");
  check.that(groups > 0 && channels % groups == 0, "groups must divide the ", channels, " channels of features, got ",
             groups);
  check.that(channels / groups <= kMostGroupChannels, "groups must leave at most ", kMostGroupChannels,
             " channels in a group, got ", groups, " for ", channels);
  if (position) check.beside("position", *position, features, {channels});
  position = as_accumulation(position, features);
  return {.dtype = dtype_of(features),
          .layout = layout,
          .groups = groups,
          .per_group = channels / groups,
          .scale = scale,
          .features = features.const_data_ptr(),
          .position = data_or_null(position)};
}

inline GroupBilinearCall prepare_bilinear(const Tensor& features, int64_t groups, std::optional<Tensor> position,
                                          int64_t out_channels, double scale) {
  const Checks check("group_bilinear");
  const GroupBilinearInput input = prepare_bilinear_input(check, features, groups, position, scale);
  check.that(out_channels > 0 && out_channels <= INT32_MAX, "out_channels must be in [1, 2^31 - 1], got ",
             out_channels);
  Tensor output = empty_maps(features, out_channels);
  const GroupBilinear op{.input = input,
                         .output_layout = layout_of(output),
                         .resize = {input.responses(), out_channels},
                         .output = output.mutable_data_ptr()};
  return {output, position, op};
}

inline GroupBilinearBackwardCall prepare_bilinear_backward(const Tensor& grad, const Tensor& features, int64_t groups,
                                                           std::optional<Tensor> position, double scale) {
  const Checks check("group_bilinear_backward");
  const GroupBilinearInput input = prepare_bilinear_input(check, features, groups, position, scale);
  const Layout4& layout = input.layout;
  const Layout4 grad_layout = check.image("grad", grad);
  check.that(grad_layout.channels > 0 && grad_layout.channels <= INT32_MAX, "grad must have 1 to 2^31 - 1 channels");
  check.input("grad", grad, features, features.scalar_type(),
              {layout.samples, grad_layout.channels, layout.height, layout.width});
  Tensor grad_features = dense_like(features);
  const GroupBilinearBackward op{.input = input,
                                 .grad_layout = grad_layout,
                                 .grad_features_layout = layout_of(grad_features),
                                 .resize = {input.responses(), grad_layout.channels},
                                 .grad = grad.const_data_ptr(),
                                 .grad_features = grad_features.mutable_data_ptr()};
  return {grad_features, position, op};
}

}  // namespace fgvc_ext
#endif
