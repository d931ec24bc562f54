// What the host side of every CUDA operator uses of the runtime. Under emulation (csrc/emulation) `launch`,
// `DeviceGuard` and `current_stream` come from there, the operators are registered for CPU tensors, and no line of a
// kernel changes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "../common/tensor.h"
#include "../common/tiles.h"
#include "index.cuh"

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

// What a block may hold in shared memory without asking for more; some of it is in arrays.
constexpr int64_t kSharedBytes = 44 * 1024;

// How many blocks a launch has.
struct Blocks {
  Blocks(int64_t blocks, int64_t parts = 1) : x(blocks), y(parts) {}  // NOLINT: a number will do
  int64_t x, y;
};

// Device guard and stream of an operator's first tensor, held while its kernels are launched.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}

  template <class Kernel, class... Arguments>
  void launch(Kernel kernel, Blocks blocks, int threads, size_t shared_bytes, Arguments&&... arguments) const {
    if (blocks.x == 0) return;
    STD_TORCH_CHECK(blocks.x <= 0x7FFFFFFF, "a launch of ", blocks.x, " blocks is more than CUDA allows");
    const dim3 grid(static_cast<unsigned>(blocks.x), static_cast<unsigned>(std::clamp<int64_t>(blocks.y, 1, 65535)));
    ::fgvc_ext::launch(kernel, grid, dim3(threads), shared_bytes, stream_, std::forward<Arguments>(arguments)...);
  }

 private:
  DeviceGuard guard_;
  Stream stream_;
};

template <int Value>
using Constant = std::integral_constant<int, Value>;

// Calls `function` with the number of elements of an access as a constant: 16 or 8 bytes of T, or one element.
template <class T, class Function>
void with_elements(int elements, Function function) {
  constexpr int kMost = 16 / sizeof(T);
  if (elements == kMost) return function(Constant<kMost>());
  if constexpr (kMost > 2)
    if (elements == kMost / 2) return function(Constant<kMost / 2>());
  function(Constant<1>());
}

// Calls `function` with the smallest capacity that holds k ≤ 16 as a constant.
template <class Function>
void with_capacity(int64_t k, Function function) {
  if (k > 8) return function(Constant<16>());
  if (k > 4) return function(Constant<8>());
  k > 1 ? function(Constant<4>()) : function(Constant<1>());
}

// Calls `function` with a number of the type that indexes tensors of this layout.
template <class Function>
void with_index(const Layout4& layout, Function function) {
  cuda::fits_32_bits(layout) ? function(uint32_t{}) : function(uint64_t{});
}

}  // namespace fgvc_ext

#define FGVC_SWITCH_CUDA_DTYPE(dtype, statement) FGVC_SWITCH_DTYPE_AS(dtype, __nv_bfloat16, __half, statement)
