// Chooses the kernel table by what the processor has. FGVC_HAS_X86 is set where the AVX tables were compiled.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fgvc_ext {

namespace baseline {
extern const Kernels table;
}
#ifdef FGVC_HAS_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

#ifdef FGVC_HAS_X86
// All that the tables are compiled with (CMakeLists.txt): the compiler may use any of it anywhere in them.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("lzcnt");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// The n-th supported table, widest first; null when there are no more.
const Kernels* supported(int n) {
#ifdef FGVC_HAS_X86
  if (has_avx512() && n-- == 0) return &avx512::table;
  if (has_avx2() && n-- == 0) return &avx2::table;
#endif
  return n == 0 ? &baseline::table : nullptr;
}

const Kernels* find(const char* name) {
  const Kernels* table;
  for (int n = 0; (table = supported(n)) != nullptr; ++n)
    if (std::strcmp(table->instruction_set, name) == 0) return table;
  return nullptr;
}

std::atomic<const Kernels*>& in_use() {
  // FGVC_EXT_ISA may name a narrower one; a name that this processor lacks is shown by fgvc_ext.info() as not in use.
  static std::atomic<const Kernels*> table = [] {
    const char* asked = std::getenv("FGVC_EXT_ISA");
    const Kernels* found = asked ? find(asked) : nullptr;
    return found ? found : supported(0);
  }();
  return table;
}

}  // namespace

const Kernels& kernels() { return *in_use().load(std::memory_order_relaxed); }

}  // namespace fgvc_ext

extern "C" {

FGVC_EXPORT const char* fgvc_ext_instruction_set() { return fgvc_ext::kernels().instruction_set; }

FGVC_EXPORT const char* fgvc_ext_supported_instruction_set(int number) {
  const fgvc_ext::Kernels* table = fgvc_ext::supported(number);
  return table ? table->instruction_set : nullptr;
}

FGVC_EXPORT bool fgvc_ext_use_instruction_set(const char* name) {
  const fgvc_ext::Kernels* table = fgvc_ext::find(name);
  if (table) fgvc_ext::in_use() = table;
  return table != nullptr;
}
}
