#include "instruction_set.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace fgvc_ext {
namespace {

#ifdef FGVC_HAS_X86
// All that the versions are compiled with (CMakeLists.txt): the compiler may use any of it anywhere in them.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("lzcnt");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

int widest() { return has_avx512() ? 2 : has_avx2() ? 1 : 0; }
#else
int widest() { return 0; }
#endif

// The number of a supported instruction set, or −1.
int find(const char* name) {
  for (int number = 0; number <= widest(); ++number)
    if (std::strcmp(kInstructionSetNames[number], name) == 0) return number;
  return -1;
}

std::atomic<int>& in_use() {
  // FGVC_EXT_ISA may name a narrower one; a name that this processor lacks is refused when the package is imported.
  static std::atomic<int> number = [] {
    const char* asked = std::getenv("FGVC_EXT_ISA");
    const int found = asked ? find(asked) : -1;
    return found < 0 ? widest() : found;
  }();
  return number;
}

}  // namespace

int instruction_set() { return in_use().load(std::memory_order_relaxed); }

}  // namespace fgvc_ext

extern "C" {

const char* fgvc_ext_instruction_set() { return fgvc_ext::kInstructionSetNames[fgvc_ext::instruction_set()]; }

const char* fgvc_ext_supported_instruction_set(int number) {
  const int index = fgvc_ext::widest() - number;
  return index < 0 ? nullptr : fgvc_ext::kInstructionSetNames[index];
}

bool fgvc_ext_use_instruction_set(const char* name) {
  const int number = fgvc_ext::find(name);
  if (number >= 0) fgvc_ext::in_use() = number;
  return number >= 0;
}
}
