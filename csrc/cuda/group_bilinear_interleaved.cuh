// Group bilinear pooling of interleaved channels (group_bilinear.cuh says what is computed): a block takes one
// position, whose channels it holds in shared memory, and a thread one output.
#pragma once

#include "group_bilinear_resize.cuh"
#include "index.cuh"

namespace fgvc_ext::cuda {

constexpr int kBilinearThreads = 256;

// Where the block's position lies, and its channels a in shared memory.
template <class T, class Index>
struct InterleavedPosition {
  using Value = Accumulation<T>;

  Index sample;
  uint32_t position;
  Shared<Value> channels;  // [C]
  uint32_t per_group, groups;
  Value scale;

  __device__ InterleavedPosition(const GroupBilinearInput& input, const Maps<Index>& maps,
                                 const Divisor<uint32_t>& per_map)
      : channels(Shared<Value>::at(0)),
        per_group(static_cast<uint32_t>(input.per_group)),
        groups(static_cast<uint32_t>(input.groups)),
        scale(static_cast<Value>(input.scale)) {
    sample = per_map.divide(blockIdx.x, position);
    const auto memory = Global<const T>(input.features).from(sample * maps.sample_stride + maps.offset(position));
    const auto code = Global<const Value>(input.position);
    for (uint32_t c = threadIdx.x; c < groups * per_group; c += kBilinearThreads) {
      const Value x = widen(memory.load(c * maps.channel_stride));
      channels[c] = code ? x + code.load(c) : x;
    }
    __syncthreads();
  }
  __device__ Value response(uint32_t x) const {
    const uint32_t row = x / per_group, column = x - row * per_group;
    Value sum = 0;
    for (uint32_t group = 0; group < groups; ++group)
      sum += channels[group * per_group + row] * channels[group * per_group + column];
    return tanh(sum * scale);
  }
};

template <class T, class Index>
__global__ void __launch_bounds__(kBilinearThreads)
    pool_interleaved(GroupBilinear op, Maps<Index> maps, Maps<Index> outputs, DeviceResize resize,
                     Divisor<uint32_t> positions) {
  using Value = Accumulation<T>;
  const InterleavedPosition<T, Index> at(op.input, maps, positions);
  const auto output = Global<T>(op.output).from(at.sample * outputs.sample_stride + outputs.offset(at.position));
  for (uint32_t j = threadIdx.x; j < resize.channels; j += kBilinearThreads) {
    Value above = 0;
    const uint32_t x = resize.keeps() ? j : resize.lower(j, above);
    Value value = at.response(x);
    if (above != 0) value = value * (1 - above) + at.response(x + 1) * above;
    output.store(j * outputs.channel_stride, narrow<T>(value));
  }
}

template <class T, class Index>
__global__ void __launch_bounds__(kBilinearThreads)
    gradient_of_interleaved(GroupBilinearBackward op, Maps<Index> maps, Maps<Index> grads, Maps<Index> outputs,
                            DeviceResize resize, Divisor<uint32_t> positions) {
  using Value = Accumulation<T>;
  const InterleavedPosition<T, Index> at(op.input, maps, positions);
  const uint32_t p = at.per_group, channels = p * at.groups, responses = p * p;
  const auto gradient = at.channels.from(channels), slopes = gradient.from(resize.channels);  // [channels], [p·p]
  const auto grad = Global<const T>(op.grad).from(at.sample * grads.sample_stride + grads.offset(at.position));
  for (uint32_t j = threadIdx.x; j < resize.channels; j += kBilinearThreads)
    gradient[j] = widen(grad.load(j * grads.channel_stride));
  __syncthreads();

  const auto of_response = [&](uint32_t x) {
    if (resize.keeps()) return gradient[x];
    Value total = 0;
    for (uint32_t j = resize.first_output(x > 0 ? x - 1 : x); j < resize.first_output(x + 1); ++j) {
      Value above;
      const uint32_t lower = resize.lower(j, above);
      const Value share = lower == x ? 1 - above : above;
      if (share != 0) total += gradient[j] * share;
    }
    return total;
  };
  for (uint32_t x = threadIdx.x; x < responses; x += kBilinearThreads) {
    const uint32_t i = x / p, k = x - i * p;
    const Value t = at.response(x);
    slopes[x] = (of_response(x) + of_response(k * p + i)) * (1 - t * t) * at.scale;
  }
  __syncthreads();

  const auto output = Global<T>(op.grad_features).from(at.sample * outputs.sample_stride + outputs.offset(at.position));
  for (uint32_t c = threadIdx.x; c < channels; c += kBilinearThreads) {
    const uint32_t group = c / p, i = c - group * p;
    Value total = 0;
    for (uint32_t k = 0; k < p; ++k) total += at.channels[group * p + k] * slopes[k * p + i];
    output.store(c * outputs.channel_stride, narrow<T>(total));
  }
}

}  // namespace fgvc_ext::cuda
