// How the host side of a CPU operator splits its work: tiles go to threads, every task has scratch memory of its own.
#pragma once

#include <algorithm>
#include <memory>

#include "kernels.h"

namespace fgvc_ext {

// Threads pay off from about this many values on.
constexpr int64_t kValuesPerTask = 16384;

inline int64_t tiles_per_task(const Layout4& layout) {
  return std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(1, kTile * layout.positions()));
}

class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(new (std::align_val_t{64}) char[bytes]) {}
  ~Scratch() { operator delete[](memory_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return memory_; }

 private:
  char* memory_;
};

}  // namespace fgvc_ext
