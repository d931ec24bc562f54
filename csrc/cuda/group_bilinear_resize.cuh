// Where the outputs of group bilinear pooling lie among the responses of T.
#pragma once

#include "../common/group_bilinear.h"
#include "index.cuh"

namespace fgvc_ext::cuda {

// `Resize`, prepared for the device.
class DeviceResize {
 public:
  explicit DeviceResize(const Resize& resize)
      : from(static_cast<uint32_t>(resize.from)),
        channels(static_cast<uint32_t>(resize.channels)),
        last_(resize.from - 1),
        steps_(resize.steps()) {}

  __device__ bool keeps() const { return from == channels; }
  // The first output at or above response `x`; `channels` where there is none.
  __device__ uint32_t first_output(uint32_t x) const {
    if (keeps()) return x;
    if (from == 1 || channels == 1) return x > 0 ? channels : 0;
    const uint64_t first = last_.quotient(uint64_t{x} * (channels - 1) + from - 2);
    return first < channels ? static_cast<uint32_t>(first) : channels;
  }
  // The response at or below output j, and how far above it the output lies.
  template <class Value>
  __device__ uint32_t lower(uint32_t j, Value& above) const {
    uint64_t rest;
    const uint64_t x = steps_.divide(uint64_t{j} * (from - 1), rest);
    above = static_cast<Value>(rest) / static_cast<Value>(steps_.value());
    return static_cast<uint32_t>(x);
  }

  uint32_t from, channels;

 private:
  Divisor<uint64_t> last_, steps_;
};

}  // namespace fgvc_ext::cuda
