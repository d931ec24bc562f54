// Normal numbers from random words, by Box and Muller's method: one header for CPU and CUDA. In float32 logarithm, sine
// and cosine are written out here, so that vectors have them and every instruction set gives the same bits; each
// is right to about 1e-7.
#pragma once

#include <cmath>

#include "philox.h"
#ifdef FGVC_EXT_EMULATE_CUDA
#include <cuda_runtime.h>  // the emulation's, with CUDA's functions
#endif

namespace fgvc_ext {

// In (0, 1): the word and a half, in units of 2^-32. The largest float below one stands for what would round to one.
template <class Lanes>
static FGVC_PHILOX_INLINE typename Lanes::Float uniform_of(typename Lanes::Word word) {
  const auto u = (Lanes::to_float(word) + 0.5f) * 0x1p-32f, most = Lanes::all(1 - 0x1p-24f);
  return u < most ? u : most;
}

// ln x for 0 < x < 1: x = m · 2^n with m about one, s = (m − 1) / (m + 1) and ln m = 2 (s + s³/3 + … + s⁹/9).
template <class Lanes>
static FGVC_PHILOX_INLINE typename Lanes::Float log_of(typename Lanes::Float x) {
  using Float = typename Lanes::Float;
  constexpr int32_t kHalfRoot = 0x3F3504F3;  // the bits of √½, the smallest m
  const auto bits = Lanes::bits(x);
  const auto n = (bits - kHalfRoot) >> 23;
  const Float excess = Lanes::from_bits(bits - (n << 23)) - 1.f;
  const Float s = excess / (excess + 2.f), square = s * s, exponent = Lanes::to_float(n);
  Float p = square * (1.f / 9) + 1.f / 7;
  p = p * square + 1.f / 5;
  p = p * square + 1.f / 3;
  const Float small = exponent * -2.12194440e-4f + 2.f * s * square * p;
  return exponent * 0.693359375f + (2.f * s + small);  // ln 2 in two parts, the first one exact times n
}

template <class Lanes>
struct SineAndCosine {
  typename Lanes::Float sine, cosine;
};

// Of u turns, 0 < u < 1: Taylor polynomials in what is left beside the next quarter, at most an eighth.
template <class Lanes>
static FGVC_PHILOX_INLINE SineAndCosine<Lanes> of_turns(typename Lanes::Float u) {
  using Float = typename Lanes::Float;
  const Float shift = Lanes::all(12582912.f);  // 1.5 · 2^23: the sum has no room for a fraction
  const Float quarters = (u * 4.f + shift) - shift;
  const Float angle = (u - quarters * 0.25f) * 6.28318530717958648f, square = angle * angle;
  Float p = square * (1.f / 362880) - 1.f / 5040;
  p = p * square + 1.f / 120;
  p = p * square - 1.f / 6;
  const Float sine = p * square * angle + angle;
  p = square * (-1.f / 3628800) + 1.f / 40320;
  p = p * square - 1.f / 720;
  p = p * square + 1.f / 24;
  p = p * square - 0.5f;
  const Float cosine = p * square + 1.f;
  const auto quarter = Lanes::to_int(quarters);
  const auto odd = (quarter & 1) != 0;
  const Float first = odd ? cosine : sine, second = odd ? sine : cosine;
  return {(quarter & 2) != 0 ? -first : first, ((quarter + 1) & 2) != 0 ? -second : second};
}

// Three normal numbers of four words: cosine and sine of the first pair, the cosine of the second one.
template <class Lanes>
struct Normals {
  typename Lanes::Float value[3];
};
template <class Lanes = OneLane>
static FGVC_PHILOX_INLINE Normals<Lanes> normals_of(const PhiloxWords<Lanes>& words) {
  const auto radius = [](auto word) { return Lanes::square_root(log_of<Lanes>(uniform_of<Lanes>(word)) * -2.f); };
  const auto first = radius(words.word[0]), second = radius(words.word[2]);
  const auto angle = of_turns<Lanes>(uniform_of<Lanes>(words.word[1]));
  const auto other = of_turns<Lanes>(uniform_of<Lanes>(words.word[3]));
  return {{first * angle.cosine, first * angle.sine, second * other.cosine}};
}

// The same in double, from the same uniform numbers.
struct WideNormals {
  double value[3];
};
static FGVC_PHILOX_INLINE WideNormals wide_normals_of(const PhiloxWords<OneLane>& words) {
  double u[4];
  for (int i = 0; i < 4; ++i) u[i] = uniform_of<OneLane>(words.word[i]);
  const double first = sqrt(-2 * log(u[0])), second = sqrt(-2 * log(u[2]));
#if defined(__CUDA_ARCH__) || defined(FGVC_EXT_EMULATE_CUDA)
  // These need no memory of a thread's own, as cos and sin of large angles do.
  return {{first * cospi(2 * u[1]), first * sinpi(2 * u[1]), second * cospi(2 * u[3])}};
#else
  constexpr double kTurn = 6.28318530717958647692;
  return {{first * cos(kTurn * u[1]), first * sin(kTurn * u[1]), second * cos(kTurn * u[3])}};
#endif
}

}  // namespace fgvc_ext
