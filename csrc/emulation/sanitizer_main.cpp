// Every operator's CUDA kernels, forward and backward, in a dozen small launches on the CPU, without torch or Python:
// to be compiled with -fsanitize=address,undefined or -fsanitize=thread, together with sanitizers/*.cpp. Prints a
// digest of what the launches wrote; it is the same under every schedule.
#include <algorithm>
#include <cstring>
#include <exception>

#include "sanitizers/launches.h"

int main() {
  using namespace fgvc_ext::sanitizers;
  std::vector<Program> all = programs();
  std::sort(all.begin(), all.end(),
            [](const Program& a, const Program& b) { return std::strcmp(a.operator_name, b.operator_name) < 0; });
  for (const auto& [name, launches] : all) {
    Digest digest;
    try {
      launches(digest);
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", name, error.what());
      return 1;
    }
    std::printf("%-32s %016llx\n", name, static_cast<unsigned long long>(digest.value()));
  }
  return 0;
}
