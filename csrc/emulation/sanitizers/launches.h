// What the launches of every operator share: numbers to work on, in memory of exactly their size, and a digest of
// results.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <vector>

#include "../../common/layout.h"
#include "../../cuda/elements.cuh"
#include "../../cuda/index.cuh"

namespace fgvc_ext::sanitizers {

// FNV-1a over the bits of everything that an operator's launches wrote.
class Digest {
 public:
  template <class T>
  void add(const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i) state_ = (state_ ^ bytes[i]) * 0x100000001B3u;
  }
  uint64_t value() const { return state_; }

 private:
  uint64_t state_ = 0xCBF29CE484222325u;
};

// Multiples of 1/8 in [-8, 8), with ties.
template <class T>
std::vector<T> numbers(int64_t count, uint32_t seed) {
  std::vector<T> values;
  values.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    values.push_back(static_cast<T>(static_cast<float>(seed >> 25) / 8.f - 8.f));
  }
  return values;
}

inline Layout4 contiguous(int64_t n, int64_t c, int64_t h, int64_t w) { return {n, c, h, w, {c * h * w, h * w, w, 1}}; }
inline Layout4 channels_last(int64_t n, int64_t c, int64_t h, int64_t w) {
  return {n, c, h, w, {c * h * w, 1, w * c, c}};
}

inline unsigned blocks_for(int64_t work, int64_t per_block) {
  return static_cast<unsigned>((work + per_block - 1) / per_block);
}

// A program that launches an operator's kernels, in a file of the operator's name. sanitizer_main.cpp runs all that
// were compiled with it.
struct Program {
  const char* operator_name;
  void (*launches)(Digest&);
};

inline std::vector<Program>& programs() {
  static std::vector<Program> all;
  return all;
}

// A static object of this type adds its program.
struct Registration {
  Registration(const char* operator_name, void (*launches)(Digest&)) {
    programs().push_back({operator_name, launches});
  }
};

}  // namespace fgvc_ext::sanitizers
