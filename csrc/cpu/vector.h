// Portable vectors of 32-bit lanes (GCC vector types), as wide as the instruction set that this file is compiled for.
// Everything is always_inline inside the instruction set's namespace: no symbol may leave the object file and be mixed
// with another instruction set's by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/dtype.h"
#include "../common/philox.h"

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fgvc_ext::FGVC_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint64_t WideWords __attribute__((vector_size(4 * kLanes)));

constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

FGVC_INLINE Floats broadcast(float x) { return x - Floats{}; }  // minus, because −0 + 0 loses the sign
FGVC_INLINE Ints lane_numbers() {
  Ints lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

FGVC_INLINE Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
FGVC_INLINE Ints load(const int32_t* from) {
  Ints x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
FGVC_INLINE Floats load(const BFloat16* from) {
  uint16_t narrow[kLanes];
  std::memcpy(narrow, from, sizeof(narrow));
  Words wide;
  for (int i = 0; i < kLanes; ++i) wide[i] = static_cast<uint32_t>(narrow[i]) << 16;
  return reinterpret_cast<Floats>(wide);
}
FGVC_INLINE Floats load(const Half* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Floats x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(from[i]);
  return x;
#endif
}
// The first `count` < kLanes values, `fill` in the other lanes.
template <class T>
FGVC_INLINE Floats load_partial(const T* from, int64_t count, float fill) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_loadu_ps(broadcast(fill), (1u << count) - 1, from);
#endif
  Floats x = broadcast(fill);
  for (int i = 0; i < count; ++i) x[i] = to_float(from[i]);
  return x;
}

// The vector at from + offset of an array of `size` values, `fill` beyond its end.
FGVC_INLINE Floats load_within(const float* from, int64_t offset, int64_t size, float fill) {
  return offset + kLanes <= size ? load(from + offset)
         : offset < size         ? load_partial(from + offset, size - offset, fill)
                                 : broadcast(fill);
}

template <class Vector>
FGVC_INLINE void store(void* to, Vector x) {
  std::memcpy(to, &x, sizeof(x));
}
template <class Vector>
FGVC_INLINE void store_partial(void* to, Vector x, int64_t count) {
  std::memcpy(to, &x, count * 4);
}

// b where a is NaN: maximum(x, so_far) passes NaN over.
FGVC_INLINE Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

FGVC_INLINE Floats minimum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// a · b + c, rounded once where the instruction set can. Not for bits that must be those of other instruction sets.
FGVC_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// One bit per lane: lane 0 is bit 0.
FGVC_INLINE uint32_t lane_bits(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask));
#elif defined(__SSE2__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (mask[i] & 1u) << i;
  return bits;
#endif
}
#if defined(__AVX512F__)  // straight into a mask register: through lane_bits GCC would make a vector first
FGVC_INLINE uint32_t greater_bits(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
FGVC_INLINE uint32_t equal_bits(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
FGVC_INLINE uint32_t less_bits(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
FGVC_INLINE uint32_t unordered_bits(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
FGVC_INLINE uint32_t not_less_bits(Ints a, Ints b) {
  return _mm512_cmp_epi32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b), _MM_CMPINT_NLT);
}
#else
FGVC_INLINE uint32_t greater_bits(Floats a, Floats b) { return lane_bits(a > b); }
FGVC_INLINE uint32_t equal_bits(Floats a, Floats b) { return lane_bits(a == b); }
FGVC_INLINE uint32_t less_bits(Floats a, Floats b) { return lane_bits(a < b); }
FGVC_INLINE uint32_t unordered_bits(Floats a) { return lane_bits(a != a); }
FGVC_INLINE uint32_t not_less_bits(Ints a, Ints b) { return lane_bits(a >= b); }
#endif

// a where the lane's bit is set, else b.
FGVC_INLINE Floats select(uint32_t bits, Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_mask_blend_ps(bits, b, a);
#else
  const Ints one_bit = (Ints{} + 1) << lane_numbers();
  return (one_bit & static_cast<int32_t>(bits)) != 0 ? a : b;
#endif
}

// Appends the lanes whose bit is set to `to`, in lane order; may write a whole vector there.
template <class Vector>
FGVC_INLINE void compress_store(void* to, uint32_t bits, Vector x) {
#if defined(__AVX512F__)
  store(to, _mm512_maskz_compress_epi32(bits, reinterpret_cast<__m512i>(x)));
#else
  auto* out = static_cast<unsigned char*>(to);
  for (; bits; bits &= bits - 1, out += 4) {
    const auto lane = x[__builtin_ctz(bits)];
    std::memcpy(out, &lane, 4);
  }
#endif
}

// Bit `lane` of row i becomes bit i of word `lane`.
FGVC_INLINE void transpose_bits(const uint16_t rows[64], uint64_t words[kLanes]) {
#if defined(__AVX512BW__)
  const __m512i first = _mm512_loadu_si512(rows), second = _mm512_loadu_si512(rows + 32);
  for (int lane = 0; lane < kLanes; ++lane) {
    const __m512i bit = _mm512_set1_epi16(static_cast<int16_t>(1 << lane));
    words[lane] = _mm512_test_epi16_mask(first, bit) | static_cast<uint64_t>(_mm512_test_epi16_mask(second, bit)) << 32;
  }
#else
  for (int lane = 0; lane < kLanes; ++lane) words[lane] = 0;
  for (int i = 0; i < 64; ++i)
    for (uint32_t bits = rows[i] & kAllLanes; bits; bits &= bits - 1) words[__builtin_ctz(bits)] |= uint64_t{1} << i;
#endif
}

// Sums the lanes by halves: the same order on every run.
FGVC_INLINE float sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float lane[kLanes];
  store(lane, x);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
#endif
}

FGVC_INLINE Floats round_to_int(Floats x) {    // |x| < 2^22
  const Floats shift = broadcast(12582912.f);  // 1.5 · 2^23: the sum has no room for a fraction
  return (x + shift) - shift;
}

// exp(x) to 2 units in the last place; NaN stays NaN, large x gives +inf, small x flushes to 0.
// x = n·ln 2 + r with |r| ≤ ln 2 / 2, and the Taylor polynomial of degree 7 in r.
FGVC_INLINE Floats exp(Floats x) {
  const Floats n = round_to_int(x * 1.44269504088896341f);
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first one exact times n
  Floats p = broadcast(1.f / 5040);
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.f;
  // 2^n in two factors, so that results near the largest float survive.
  const Ints exponent = __builtin_convertvector(n, Ints), half = exponent >> 1;
  const Ints first = (half + 127) << 23, second = (exponent - half + 127) << 23;
  Floats y = p * reinterpret_cast<Floats>(first) * reinterpret_cast<Floats>(second);
  y = x > 88.7228394f ? broadcast(__builtin_inff()) : y;
  y = x < -87.3365478f ? Floats{} : y;
  return x == x ? y : x;
}

// tanh(x) to 3 units in the last place; NaN stays NaN, and so does the sign of a zero.
// With y = 2|x| it is m / (m + 2), where m = e^y − 1 = 2^n · (e^r − 1) + (2^n − 1) for y = n·ln 2 + r as in exp: near
// zero, n = 0 and no digit is lost. From y = 20 on the result is 1.
FGVC_INLINE Floats tanh(Floats x) {
  const Ints sign = reinterpret_cast<Ints>(x) & INT32_MIN;
  const Floats y = minimum(2 * reinterpret_cast<Floats>(reinterpret_cast<Ints>(x) ^ sign), broadcast(20.f));
  const Floats n = round_to_int(y * 1.44269504088896341f);
  const Floats r = multiply_add(n, broadcast(2.12194440e-4f), multiply_add(n, broadcast(-0.693359375f), y));
  Floats p = broadcast(1.f / 5040);
  p = multiply_add(p, r, broadcast(1.f / 720));
  p = multiply_add(p, r, broadcast(1.f / 120));
  p = multiply_add(p, r, broadcast(1.f / 24));
  p = multiply_add(p, r, broadcast(1.f / 6));
  p = multiply_add(p, r, broadcast(0.5f));
  p = multiply_add(p * r, r, r);
  const Floats power = reinterpret_cast<Floats>((__builtin_convertvector(n, Ints) + 127) << 23);  // 2^n
  const Floats m = multiply_add(p, power, power - 1.f), t = m / (m + 2.f);
  return x == x ? reinterpret_cast<Floats>(reinterpret_cast<Ints>(t) | sign) : x;
}

// Turns kLanes rows of kLanes floats into columns: interleaving row i with row i + kLanes/2, log2(kLanes) times.
FGVC_INLINE void transpose(Floats rows[kLanes]) {
  Ints low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Floats next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// One Philox counter, or one normal number, per lane.
struct VectorLanes {
  using Word = Words;
  FGVC_INLINE void multiply_wide(Words a, uint32_t b, Words& high, Words& low) {
    const WideWords even = multiply_even(reinterpret_cast<WideWords>(a), b);
    const WideWords odd = multiply_even(reinterpret_cast<WideWords>(a) >> 32, b);
    const WideWords highs = (even >> 32) | (odd & 0xFFFFFFFF00000000u), lows = (even & 0xFFFFFFFFu) | (odd << 32);
    high = reinterpret_cast<Words>(highs);
    low = reinterpret_cast<Words>(lows);
  }

  using Float = Floats;
  using Int = Ints;
  FGVC_INLINE Float all(float x) { return broadcast(x); }
  // In halves, which floats hold exactly: only their sum is rounded. Not every instruction set converts words.
  FGVC_INLINE Float to_float(Words x) {
    return to_float(reinterpret_cast<Ints>(x >> 16)) * 65536.f + to_float(reinterpret_cast<Ints>(x & 0xFFFFu));
  }
  FGVC_INLINE Float to_float(Ints x) { return __builtin_convertvector(x, Floats); }
  FGVC_INLINE Int to_int(Floats x) { return __builtin_convertvector(x, Ints); }
  FGVC_INLINE Int bits(Floats x) { return reinterpret_cast<Ints>(x); }
  FGVC_INLINE Float from_bits(Ints bits) { return reinterpret_cast<Floats>(bits); }
  FGVC_INLINE Float square_root(Floats x) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
    return _mm_sqrt_ps(x);
#else
    for (int i = 0; i < kLanes; ++i) x[i] = sqrtf(x[i]);
    return x;
#endif
  }

 private:
  // The product of the even 32-bit lanes. GCC would take a full 64-bit multiplication.
  FGVC_INLINE WideWords multiply_even(WideWords a, uint32_t b) {
#if defined(__AVX512F__)
    return reinterpret_cast<WideWords>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<WideWords>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
    return reinterpret_cast<WideWords>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
    return (a & 0xFFFFFFFFu) * static_cast<uint64_t>(b);
#endif
  }
};

}  // namespace fgvc_ext::FGVC_ISA
