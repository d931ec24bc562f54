// What the host side of every CUDA operator uses of the runtime. Under emulation (csrc/emulation) `launch`,
// `DeviceGuard` and `current_stream` come from there, the operators are registered for CPU tensors, and no line of a
// kernel changes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../common/tensor.h"

#ifdef FGVC_EXT_EMULATE_CUDA
#define FGVC_CUDA_KEY CPU
#else
#define FGVC_CUDA_KEY CUDA

namespace fgvc_ext {

using Stream = cudaStream_t;
using torch::stable::accelerator::DeviceGuard;

inline Stream current_stream(int32_t device) {
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<Stream>(stream);
}

// The only launch in the project: checked at once, so that an error names its kernel's call.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
            Arguments&&... arguments) {
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(std::forward<Arguments>(arguments)...);
  // clang-format on
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace fgvc_ext
#endif

namespace fgvc_ext {

// Device guard and stream of an operator's first tensor, held while its kernels are launched.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}

  template <class Kernel, class... Arguments>
  void operator()(Kernel kernel, int64_t blocks, int threads, size_t shared_bytes, Arguments&&... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= 0x7FFFFFFF, "a launch of ", blocks, " blocks is more than CUDA allows");
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, stream_,
           std::forward<Arguments>(arguments)...);
  }

 private:
  DeviceGuard guard_;
  Stream stream_;
};

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fgvc_ext

#define FGVC_SWITCH_CUDA_DTYPE(dtype, statement) FGVC_SWITCH_DTYPE_AS(dtype, __nv_bfloat16, __half, statement)
