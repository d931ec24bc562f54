// Semantic grouping loss, dual attention fusion (deep bilinear transformation): what its kernels take, and what both
// host sides check and allocate.
//
// The directions Z of all samples' channels lie in one matrix of the accumulation type, which forward and backward each
// make anew: [C,N·H·W], or [N·H·W,C] with the channels side by side.
#pragma once

#include "tiles.h"

namespace fgvc_ext {

constexpr double kGroupingOffset = 1e-3, kGroupingLengthEpsilon = 1e-10;

struct GroupingDirections {
  Dtype dtype;
  Layout4 layout, directions_layout;  // of features and of directions
  const void* features;
  void* directions;  // Z, accumulation type
  void* lengths;     // [N,C], accumulation type: sqrt(Σ V² + 1e-10)
};

// k · Σ (co − gt)², of co = products / divisor.
struct GroupingResidual {
  Dtype dtype;
  int64_t channels, per_group;
  double divisor, factor;
  void* residual;  // [C,C], accumulation type: products at first where a library makes them, then co − gt
  void* losses;    // accumulation type: a share of the loss from each piece of work
};

// The same on the CPU, which makes the products itself: of Z [depth,C] with itself, in squares of this many channels.
constexpr int64_t kGroupingSquare = 64;
struct GroupingCorrelations {
  GroupingResidual residual;
  int64_t depth;  // N·H·W
  const void* directions;
};

struct GroupingGradient {
  Dtype dtype;
  Layout4 directions_layout, grad_layout;  // of directions and products, and of grad_features
  double factor;                           // 4k/N: times the gradient from above
  const void* grad;                        // [], accumulation type
  const void *directions, *lengths;
  const void* residual;
  const void* products;  // R Z in directions_layout, where a library makes them
  void* grad_features;
};

FGVC_HOST_DEVICE constexpr double grouping_factor(int64_t channels) {
  return 1e-3 / (static_cast<double>(channels) / 512) / (static_cast<double>(channels) / 512);
}

}  // namespace fgvc_ext

#ifndef FGVC_KERNELS_ONLY
#include "checks.h"

namespace fgvc_ext {

struct GroupingCall {
  Tensor loss, residual, directions, lengths;
  GroupingDirections normalise;
  GroupingResidual compare;
};
struct GroupingBackwardCall {
  Tensor grad_features, grad, residual, directions, lengths;
  GroupingDirections normalise;
  GroupingGradient gradient;
};

// Z of the samples' maps in a matrix [C,N·H·W], or [N·H·W,C] where `channels_last`.
inline Layout4 directions_layout(const Layout4& maps, bool channels_last) {
  const int64_t c = maps.channels, h = maps.height, w = maps.width;
  if (channels_last) return {maps.samples, c, h, w, {h * w * c, 1, w * c, c}};
  return {maps.samples, c, h, w, {h * w, maps.samples * h * w, w, 1}};
}

inline GroupingDirections prepare_directions(const Checks& check, const Tensor& features, bool channels_last,
                                             Tensor& directions, Tensor& lengths) {
  const Layout4 layout = check.image("features", features);
  check.that(layout.channels > 0 && layout.positions() > 0, "features must have C, H and W of at least 1");
  const int64_t depth = layout.samples * layout.positions();
  const ScalarType dtype = accumulation(features);
  directions = channels_last ? empty(features, {depth, layout.channels}, dtype)
                             : empty(features, {layout.channels, depth}, dtype);
  lengths = empty(features, {layout.samples, layout.channels}, dtype);
  return {.dtype = dtype_of(features),
          .layout = layout,
          .directions_layout = directions_layout(layout, channels_last),
          .features = features.const_data_ptr(),
          .directions = directions.mutable_data_ptr(),
          .lengths = lengths.mutable_data_ptr()};
}

// The shares of the loss are the host side's to allocate.
inline GroupingCall prepare_grouping(const Tensor& features, int64_t groups, bool channels_last) {
  const Checks check("semantic_grouping_loss");
  Tensor directions, lengths;
  const GroupingDirections normalise = prepare_directions(check, features, channels_last, directions, lengths);
  const int64_t samples = normalise.layout.samples, channels = normalise.layout.channels;
  check.that(groups > 0 && channels % groups == 0, "groups must divide the ", channels, " channels of features, got ",
             groups);
  const ScalarType dtype = accumulation(features);
  Tensor residual = empty(features, {channels, channels}, dtype);
  const GroupingResidual compare{.dtype = dtype_of(residual),
                                 .channels = channels,
                                 .per_group = channels / groups,
                                 .divisor = static_cast<double>(samples > 0 ? samples : 1),
                                 .factor = samples > 0 ? grouping_factor(channels) : 0.,
                                 .residual = residual.mutable_data_ptr(),
                                 .losses = nullptr};
  return {empty(features, {}, dtype), residual, directions, lengths, normalise, compare};
}

inline GroupingBackwardCall prepare_grouping_backward(const Tensor& grad, const Tensor& features,
                                                      const Tensor& residual, bool channels_last) {
  const Checks check("semantic_grouping_loss_backward");
  Tensor directions, lengths;
  const GroupingDirections normalise = prepare_directions(check, features, channels_last, directions, lengths);
  const int64_t samples = normalise.layout.samples, channels = normalise.layout.channels;
  const ScalarType dtype = accumulation(features);
  check.input("grad", grad, features, dtype, {});
  check.saved("residual", residual, features, dtype, {channels, channels});
  Tensor grad_features = dense_like(features);
  const GroupingGradient gradient{.dtype = dtype_of(features),
                                  .directions_layout = normalise.directions_layout,
                                  .grad_layout = layout_of(grad_features),
                                  .factor = 4 * grouping_factor(channels) / (samples > 0 ? samples : 1),
                                  .grad = grad.const_data_ptr(),
                                  .directions = normalise.directions,
                                  .lengths = normalise.lengths,
                                  .residual = residual.const_data_ptr(),
                                  .products = nullptr,
                                  .grad_features = grad_features.mutable_data_ptr()};
  return {grad_features, grad, residual, directions, lengths, normalise, gradient};
}

}  // namespace fgvc_ext
#endif
