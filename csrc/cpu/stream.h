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

}  // namespace fgvc_ext::FGVC_ISA
