// The layout of a 4-D tensor [N,C,H,W], in elements; one for CPU and CUDA.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FGVC_HOST_DEVICE __host__ __device__
#else
#define FGVC_HOST_DEVICE
#endif

namespace fgvc_ext {

struct Layout4 {
  int64_t samples, channels, height, width;
  int64_t stride[4];

  FGVC_HOST_DEVICE int64_t maps() const { return samples * channels; }
  FGVC_HOST_DEVICE int64_t positions() const { return height * width; }
  FGVC_HOST_DEVICE bool map_is_contiguous() const {
    return (stride[3] == 1 || width == 1) && (stride[2] == width || height == 1);
  }
  // Position i of a map lies i · position_step() after the first.
  FGVC_HOST_DEVICE bool positions_are_evenly_spaced() const {
    return map_is_contiguous() || height == 1 || width == 1 || stride[2] == width * stride[3];
  }
  FGVC_HOST_DEVICE int64_t position_step() const {
    return map_is_contiguous() ? 1 : width == 1 ? stride[2] : stride[3];
  }
  FGVC_HOST_DEVICE bool channels_are_contiguous() const { return stride[1] == 1; }
  FGVC_HOST_DEVICE int64_t offset(int64_t sample, int64_t channel) const {
    return sample * stride[0] + channel * stride[1];
  }
};

}  // namespace fgvc_ext
