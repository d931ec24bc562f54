// How the host side of a CPU operator runs a kernel: the version for this processor, on ranges of work that go to
// threads.
#pragma once

#include <algorithm>
#include <new>

#include "../common/tensor.h"
#include "../common/tiles.h"
#include "instruction_set.h"
#include "scratch.h"

namespace fgvc_ext {

// A kernel works on raw memory and on the range [begin, end) of its tiles, maps or rows.
template <class Arguments>
struct Kernel {
  using Version = void (*)(const Arguments&, int64_t begin, int64_t end, Scratch&);
  Version version[kInstructionSets];
};

// FGVC_KERNEL(diversify, Diversify) declares kernels::diversify, whose versions csrc/cpu/kernel.cpp compiles.
#define FGVC_DECLARE_KERNEL(isa, name, Arguments)          \
  namespace isa {                                          \
  void name(const Arguments&, int64_t, int64_t, Scratch&); \
  }
#ifdef FGVC_HAS_X86
#define FGVC_KERNEL(name, Arguments)                                                                                \
  FGVC_DECLARE_KERNEL(baseline, name, Arguments)                                                                    \
  FGVC_DECLARE_KERNEL(avx2, name, Arguments)                                                                        \
  FGVC_DECLARE_KERNEL(avx512, name, Arguments)                                                                      \
  namespace kernels {                                                                                               \
  constexpr Kernel<Arguments> name{{::fgvc_ext::baseline::name, ::fgvc_ext::avx2::name, ::fgvc_ext::avx512::name}}; \
  }
#else
#define FGVC_KERNEL(name, Arguments)                              \
  FGVC_DECLARE_KERNEL(baseline, name, Arguments)                  \
  namespace kernels {                                             \
  constexpr Kernel<Arguments> name{{::fgvc_ext::baseline::name}}; \
  }
#endif

// Runs the kernel on [0, count); a thread gets at least `at_once` of it. The arguments must be those of some work: with
// a count of 0 nothing is called.
template <class Arguments>
void run(const Kernel<Arguments>& kernel, const Arguments& op, int64_t count, int64_t at_once) {
  if (count == 0) return;
  const auto version = kernel.version[instruction_set()];
  Scratch sizes;
  version(op, 0, 0, sizes);
  torch::stable::parallel_for(0, count, at_once, [&](int64_t begin, int64_t end) {
    constexpr std::align_val_t cache_line{64};
    void* const memory = sizes.bytes() ? operator new(sizes.bytes(), cache_line) : nullptr;
    Scratch scratch(memory);
    version(op, begin, end, scratch);
    if (memory) operator delete(memory, cache_line);
  });
}

// Threads pay off from about this many values on.
constexpr int64_t kValuesPerTask = 16384;

template <class Arguments>
void run_on_tiles(const Kernel<Arguments>& kernel, const Arguments& op) {
  const int64_t values = kTile * op.layout.positions();
  run(kernel, op, tiles(op.layout), std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(1, values)));
}

template <class Arguments>
void run_on_rows(const Kernel<Arguments>& kernel, const Arguments& op, int64_t rows, int64_t values_per_row) {
  run(kernel, op, rows, std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(1, values_per_row)));
}

}  // namespace fgvc_ext
