// The instruction sets for which the CPU kernels are compiled, and the choice among those that this processor has.
#pragma once

#define FGVC_EXPORT __attribute__((visibility("default")))

namespace fgvc_ext {

// In the order of Kernel::version, narrowest first. FGVC_HAS_X86 is set where the AVX versions are compiled.
#ifdef FGVC_HAS_X86
constexpr int kInstructionSets = 3;
constexpr const char* kInstructionSetNames[] = {"baseline", "avx2", "avx512"};
#else
constexpr int kInstructionSets = 1;
constexpr const char* kInstructionSetNames[] = {"baseline"};
#endif

// The one in use.
int instruction_set();

}  // namespace fgvc_ext

// What fgvc_ext._C asks: the name in use, the names supported (widest first, null after the last), and whether a name
// is supported and now in use.
extern "C" {
FGVC_EXPORT const char* fgvc_ext_instruction_set();
FGVC_EXPORT const char* fgvc_ext_supported_instruction_set(int number);
FGVC_EXPORT bool fgvc_ext_use_instruction_set(const char* name);
}
