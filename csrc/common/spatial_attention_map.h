// Spatial attention map, knowledge transfer eq. 1: what its kernels take, and what both host sides check and allocate.
#pragma once

#include "tiles.h"

namespace fgvc_ext {

struct SpatialAttentionMap {
  Dtype dtype;
  Layout4 layout;
  int64_t groups, channels_per_group;  // of channels, each of which adds up a map of its own
  const void* features;
  void* sums;  // [N,groups,H,W], accumulation type: Σ_c g_c F_c over a group's channels
  void* map;   // [N,H,W], dtype
};

struct SpatialAttentionMapBackward {
  Dtype dtype;
  Layout4 layout, grad_layout;  // of features and of grad_features
  int64_t groups, channels_per_group;
  const void* features;
  const void* grad;  // [N,H,W], dtype
  void* grad_features;
};

}  // namespace fgvc_ext

#ifndef FGVC_KERNELS_ONLY
#include "checks.h"

namespace fgvc_ext {

// A call's results, what it reads, and the kernel's arguments, which point into both.
struct SpatialAttentionMapCall {
  Tensor map, sums;
  SpatialAttentionMap op;
};

// Groups of fixed size, so that the order of the sums does not depend on who adds them up.
inline SpatialAttentionMapCall prepare_attention(const Tensor& features, int64_t channels_per_group) {
  const Checks check("spatial_attention_map");
  const Layout4 layout = check.image("features", features);
  const int64_t groups = ceil_divide(layout.channels, channels_per_group);
  check.that(layout.channels > 0 && layout.positions() > 0, "features must have C, H and W of at least 1");
  Tensor map = empty(features, {layout.samples, layout.height, layout.width});
  Tensor sums = empty(features, {layout.samples, groups, layout.height, layout.width}, accumulation(features));
  const SpatialAttentionMap op{.dtype = dtype_of(features),
                               .layout = layout,
                               .groups = groups,
                               .channels_per_group = channels_per_group,
                               .features = features.const_data_ptr(),
                               .sums = sums.mutable_data_ptr(),
                               .map = map.mutable_data_ptr()};
  return {map, sums, op};
}

struct SpatialAttentionMapBackwardCall {
  Tensor grad_features, grad;
  SpatialAttentionMapBackward op;
};

inline SpatialAttentionMapBackwardCall prepare_attention_backward(const Tensor& grad, const Tensor& features,
                                                                  int64_t channels_per_group) {
  const Checks check("spatial_attention_map_backward");
  const Layout4 layout = check.image("features", features);
  check.that(layout.channels > 0 && layout.positions() > 0, "features must have C, H and W of at least 1");
  check.input("grad", grad, features, features.scalar_type(), {layout.samples, layout.height, layout.width});
  const Tensor dense_grad = as_dense(grad);
  Tensor grad_features = dense_like(features);
  const SpatialAttentionMapBackward op{.dtype = dtype_of(features),
                                       .layout = layout,
                                       .grad_layout = layout_of(grad_features),
                                       .groups = ceil_divide(layout.channels, channels_per_group),
                                       .channels_per_group = channels_per_group,
                                       .features = features.const_data_ptr(),
                                       .grad = dense_grad.const_data_ptr(),
                                       .grad_features = grad_features.mutable_data_ptr()};
  return {grad_features, dense_grad, op};
}

}  // namespace fgvc_ext
#endif
