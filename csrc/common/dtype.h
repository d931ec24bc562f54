// The dtypes of the contract. The 16-bit floats are storage, without torch's headers: CPU kernels load and store them
// and compute in float.
#pragma once

#include <cstdint>
#include <cstring>

#define FGVC_INLINE static inline __attribute__((always_inline))

namespace fgvc_ext {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class Dtype { float32, float64, bfloat16, float16 };

// float64 accumulates in itself, everything else in float32.
template <class T>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
template <class T>
using Accumulation = typename AccumulationOf<T>::type;

template <class To, class From>
FGVC_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

FGVC_INLINE float to_float(float x) { return x; }
FGVC_INLINE double to_float(double x) { return x; }
FGVC_INLINE float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
FGVC_INLINE float to_float(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 0x1F, mantissa = x.bits & 0x3FFu;
  if (exponent == 0x1F) return bit_cast<float>(sign | 0x7F800000u | mantissa << 13);
  if (exponent == 0) return bit_cast<float>(sign | bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
  return bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

template <class T>
FGVC_INLINE T from_float(float x) {
  return static_cast<T>(x);
}
template <class T>
FGVC_INLINE T from_float(double x) {
  return static_cast<T>(x);
}
// Round to nearest, ties to even; a NaN stays one.
template <>
inline __attribute__((always_inline)) BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline __attribute__((always_inline)) Half from_float<Half>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00)};
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    const uint32_t rounded = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (rounded - 0x3F000000u))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xFFF + (magnitude >> 13 & 1)) >> 13))};
}

}  // namespace fgvc_ext

// Runs `statement` with T as the storage type of `dtype`; BF16 and FP16 are what this side calls the 16-bit floats.
#define FGVC_SWITCH_DTYPE_AS(dtype, BF16, FP16, statement) \
  do {                                                     \
    switch (dtype) {                                       \
      case ::fgvc_ext::Dtype::float32: {                   \
        using T = float;                                   \
        statement;                                         \
      } break;                                             \
      case ::fgvc_ext::Dtype::float64: {                   \
        using T = double;                                  \
        statement;                                         \
      } break;                                             \
      case ::fgvc_ext::Dtype::bfloat16: {                  \
        using T = BF16;                                    \
        statement;                                         \
      } break;                                             \
      case ::fgvc_ext::Dtype::float16: {                   \
        using T = FP16;                                    \
        statement;                                         \
      } break;                                             \
    }                                                      \
  } while (0)
#define FGVC_SWITCH_DTYPE(dtype, statement) \
  FGVC_SWITCH_DTYPE_AS(dtype, ::fgvc_ext::BFloat16, ::fgvc_ext::Half, statement)
