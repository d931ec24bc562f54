// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): one header for CPU and CUDA.
// `Lanes` names the word type and its wide product, so that a CPU kernel can run one counter a vector lane; normal.h
// uses its floats.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FGVC_PHILOX_INLINE __host__ __device__ __forceinline__
#else
#define FGVC_PHILOX_INLINE inline __attribute__((always_inline))
#endif

namespace fgvc_ext {

// Operator ids: the last counter word, so that no two operators share random words.
constexpr uint32_t kDiversifyStream = 1;
constexpr uint32_t kComposePartsStream = 2;

struct OneLane {
  using Word = uint32_t;
  static FGVC_PHILOX_INLINE void multiply_wide(Word a, uint32_t b, Word& high, Word& low) {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }

  using Float = float;
  using Int = int32_t;
  static FGVC_PHILOX_INLINE Float all(float x) { return x; }
  static FGVC_PHILOX_INLINE Float to_float(Word x) { return static_cast<float>(x); }
  static FGVC_PHILOX_INLINE Float to_float(Int x) { return static_cast<float>(x); }
  static FGVC_PHILOX_INLINE Int to_int(Float x) { return static_cast<int32_t>(x); }
  static FGVC_PHILOX_INLINE Int bits(Float x) {
    Int bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
  }
  static FGVC_PHILOX_INLINE Float from_bits(Int bits) {
    Float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
  static FGVC_PHILOX_INLINE Float square_root(Float x) { return sqrtf(x); }
};

template <class Lanes>
struct PhiloxWords {
  typename Lanes::Word word[4];
};

template <class Lanes = OneLane>
static FGVC_PHILOX_INLINE PhiloxWords<Lanes> philox(PhiloxWords<Lanes> counter, uint64_t seed) {
  using Word = typename Lanes::Word;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    Lanes::multiply_wide(counter.word[0], 0xD2511F53u, high0, low0);
    Lanes::multiply_wide(counter.word[2], 0xCD9E8D57u, high1, low1);
    counter = {{high1 ^ counter.word[1] ^ key0, low1, high0 ^ counter.word[3] ^ key1, low0}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace fgvc_ext
