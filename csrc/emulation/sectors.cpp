// What Python asks the emulated library about sectors, and a kernel that is known to waste them.
#include <cuda_runtime.h>

#include "../cuda/memory.cuh"

namespace fgvc_ext::emulation {
namespace {

// Copies `count` floats that lie `stride` apart.
__global__ void copy_strided(cuda::Global<const float> from, cuda::Global<float> to, unsigned count, unsigned stride) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) to.store(i * stride, from.load(i * stride));
}

}  // namespace

extern "C" {

// Counts from here on, beginning anew, or no more.
__attribute__((visibility("default"))) void fgvc_ext_emulation_count_sectors(int on) {
  Accesses::instance().counts = on != 0;
  if (on) Accesses::instance().launches.clear();
}

// A line per launch: sectors that loads touch, the least that could hold their bytes, the same of stores, the worst
// place.
__attribute__((visibility("default"))) const char* fgvc_ext_emulation_sectors() {
  static std::string text;
  text.clear();
  for (const LaunchSectors& launch : Accesses::instance().launches) {
    for (const uint64_t number : {launch.loads.touched, launch.loads.least, launch.stores.touched, launch.stores.least})
      text += std::to_string(number) + " ";
    text += launch.worst + "\n";
  }
  return text.c_str();
}

__attribute__((visibility("default"))) void fgvc_ext_emulation_copy_strided(const float* from, float* to,
                                                                            unsigned count, unsigned stride) {
  launch(copy_strided, dim3((count + 127) / 128), dim3(128), 0, nullptr, cuda::Global<const float>(from),
         cuda::Global<float>(to), count, stride);
}

}  // extern "C"
}  // namespace fgvc_ext::emulation
