// The CPU kernels of all operators, compiled once per instruction set: the table of one instruction set, and the choice
// among them. A kernel works on raw memory and on the range [begin, end) of its tiles, maps or rows.
#pragma once

#include <cstdint>

#include "../common/arguments.h"

namespace fgvc_ext {

struct Kernels {
  const char* instruction_set;
  void (*diversify)(const Diversify&, int64_t begin, int64_t end, void* scratch);
  void (*spread_bits)(const SpreadBits&, int64_t begin, int64_t end);
  void (*gradient_boosting_cross_entropy)(const GradientBoosting&, int64_t begin, int64_t end, void* scratch);
  void (*gradient_boosting_cross_entropy_backward)(const GradientBoostingBackward&, int64_t begin, int64_t end,
                                                   void* scratch);
  void (*global_k_max_pool)(const GlobalKMaxPool&, int64_t begin, int64_t end, void* scratch);
  void (*global_k_max_pool_backward)(const GlobalKMaxPoolBackward&, int64_t begin, int64_t end);
  void (*global_k_max_pool_weight_grad)(const GlobalKMaxPoolWeightGrad&, int64_t begin, int64_t end);
};

// The table in use: the widest that the processor has, or what FGVC_EXT_ISA or fgvc_ext_use_instruction_set named.
const Kernels& kernels();

}  // namespace fgvc_ext

// For the Python module: plain C, found in the CPU library.
#define FGVC_EXPORT __attribute__((visibility("default")))
extern "C" {
FGVC_EXPORT const char* fgvc_ext_instruction_set();
// Names the next supported instruction set after `number` − 1, widest first; null when there are no more.
FGVC_EXPORT const char* fgvc_ext_supported_instruction_set(int number);
// False where this processor or this build does not have it.
FGVC_EXPORT bool fgvc_ext_use_instruction_set(const char* name);
}
