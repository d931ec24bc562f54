// What losses share: the sum that makes the loss, and the backward of those whose gradient forward computed
// (csrc/common/loss_gradient.h).
#pragma once

#include "../common/loss_gradient.h"
#include "memory.cuh"
#include "reduction.cuh"

namespace fgvc_ext::cuda {

constexpr int kLossThreads = 256;

// One block: result = factor · Σ values / max(1, divisor), 0 where there are no values. The divisor may be on the
// device.
template <class Value>
__global__ void __launch_bounds__(kLossThreads)
    sum_losses(Global<const Value> values, int64_t count, Value divisor, Global<const Value> device_divisor,
               Value factor, Global<Value> result) {
  double total = 0;  // of what may be many samples
  for (int64_t i = threadIdx.x; i < count; i += kLossThreads) total += values.load(i);
  total = block_reduce<kLossThreads>(total, Sum());
  if (threadIdx.x != 0) return;
  if (device_divisor) divisor = device_divisor.load(0);
  result.store(0, count == 0 ? Value(0) : static_cast<Value>(factor * total / (divisor < 1 ? Value(1) : divisor)));
}

template <class T>
__global__ void __launch_bounds__(kLossThreads) scale_gradients(LossGradient op) {
  using Value = Accumulation<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLossThreads + threadIdx.x;
  if (i >= op.values) return;
  const Global<const Value> gradients(op.gradients);
  Value total = 0;
#pragma unroll
  for (int loss = 0; loss < kMostLosses; ++loss) {
    const Global<const Value> grad(op.grads[loss]);
    if (grad && loss < op.losses) total += grad.load(0) * gradients.load(loss * op.values + i);
  }
  Global<T>(op.output).store(i, narrow<T>(total));
}

}  // namespace fgvc_ext::cuda
