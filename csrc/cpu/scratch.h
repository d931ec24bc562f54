// Scratch memory of a task. A kernel takes its pieces once, at its beginning; called on no work with nothing to take
// from, it only counts them, so that what is allocated and what is used cannot differ.
#pragma once

#include <cstdint>

namespace fgvc_ext {

class Scratch {
 public:
  explicit Scratch(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  // `count` values, on a cache line of their own; null while counting.
  template <class T>
  __attribute__((always_inline)) T* take(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return memory_ ? reinterpret_cast<T*>(memory_ + at) : nullptr;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace fgvc_ext
