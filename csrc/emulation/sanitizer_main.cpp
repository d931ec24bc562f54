// Every operator's CUDA kernels, forward and backward, in a dozen small launches on the CPU, without torch or Python:
// to be compiled with -fsanitize=address,undefined or -fsanitize=thread, together with sanitizers/*.cpp. Prints a
// digest of what the launches wrote; it is the same under every schedule. A new operator adds a file there, its
// declaration in launches.h and a line here.
#include <exception>

#include "sanitizers/launches.h"

int main() {
  using namespace fgvc_ext::sanitizers;
  const std::pair<const char*, void (*)(Digest&)> operators[] = {
      {"diversify", diversify},
      {"global_k_max_pool", global_k_max_pool},
      {"gradient_boosting_cross_entropy", gradient_boosting_cross_entropy},
  };
  for (const auto& [name, launches] : operators) {
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
