// Stores past the caches, for results that no cache holds.
#pragma once

#include "vector.h"

namespace fgvc_ext::FGVC_ISA {

// `to` is a multiple of the vector's size. `end_streaming` comes after the last one, before another thread reads.
FGVC_INLINE void stream(void* to, Floats x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(to), x);
#elif defined(__AVX2__)
  _mm256_stream_ps(static_cast<float*>(to), x);
#elif defined(__SSE2__)
  _mm_stream_ps(static_cast<float*>(to), x);
#else
  store(to, x);
#endif
}
FGVC_INLINE void end_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Whether rows of `row_bytes`, of a result of `bytes` in all, are written so: no cache holds them, and they are whole
// vectors.
FGVC_INLINE bool streams(const void* result, int64_t bytes, int64_t row_bytes) {
  constexpr int64_t kLeastBytes = int64_t{1} << 23;
  constexpr uint64_t kStep = sizeof(Floats);
  return bytes >= kLeastBytes && row_bytes % kStep == 0 && reinterpret_cast<uintptr_t>(result) % kStep == 0;
}
FGVC_INLINE void stream_row(void* to, const void* from, int64_t row_bytes) {
  for (int64_t at = 0; at < row_bytes; at += sizeof(Floats)) {
    Floats values;
    std::memcpy(&values, static_cast<const char*>(from) + at, sizeof(values));
    stream(static_cast<char*>(to) + at, values);
  }
}

}  // namespace fgvc_ext::FGVC_ISA
