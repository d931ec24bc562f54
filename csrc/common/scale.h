// Powers of two that keep the squares of very large and very small numbers finite and apart from zero; one for CPU and
// CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#include "layout.h"

namespace fgvc_ext {

// The power of two that brings a `magnitude` of at least zero near one, as far as it is a normal number; that of an
// infinity leaves it one. Of internal linkage: no instruction set may be given another's by the linker.
static inline FGVC_HOST_DEVICE float scale_to_one(float magnitude) {
  int32_t bits;
  std::memcpy(&bits, &magnitude, sizeof(bits));
  const int32_t exponent = 254 - (bits >> 23), least = exponent < 1 ? 1 : exponent, scale_bits = least << 23;
  float scale;
  std::memcpy(&scale, &scale_bits, sizeof(scale));
  return scale;
}
static inline FGVC_HOST_DEVICE double scale_to_one(double magnitude) {
  int64_t bits;
  std::memcpy(&bits, &magnitude, sizeof(bits));
  const int64_t exponent = 2046 - (bits >> 52), least = exponent < 1 ? 1 : exponent, scale_bits = least << 52;
  double scale;
  std::memcpy(&scale, &scale_bits, sizeof(scale));
  return scale;
}

}  // namespace fgvc_ext
