#include "global_k_max_pool.cuh"

#include "../common/global_k_max_pool.h"
#include "global_k_max_pool_backward.cuh"
#include "launch.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

constexpr int kThreads = kWarpsPerBlock * kWarp;

template <class T>
void pool(const Launcher& on, const GlobalKMaxPool& op) {
  const Layout4& layout = op.layout;
  const bool interleaved = channels_are_interleaved(layout) && op.k <= kCapacityLimit;
  const int64_t blocks_of_warps = ceil_divide(layout.maps(), kWarpsPerBlock);
  with_index(layout, [&](auto index) {
    using Index = decltype(index);
    if (interleaved) {
      with_capacity(op.k, [&](auto capacity) {
        on.launch(pool_channels<T, capacity(), Index>, ChannelGroups<Index>::blocks(layout), kThreads, 0, op,
                  ChannelGroups<Index>(layout));
      });
    } else if (op.k > kWarpLimit) {
      on.launch(pool_sorted<T, Index>, layout.maps(), kThreads, 0, op, Maps<Index>(layout));
    } else {
      with_elements<T>(chunk_size<T>(op.features, layout), [&](auto elements) {
        if (layout.positions() < kLargeMap) {
          on.launch(pool_maps<T, elements(), 1, Index>, blocks_of_warps, kThreads, 0, op, Maps<Index>(layout));
        } else {
          on.launch(pool_maps<T, elements(), kWarpsPerBlock, Index>, layout.maps(), kThreads, 0, op,
                    Maps<Index>(layout));
        }
      });
    }
  });
}

template <class T>
void scatter(const Launcher& on, const GlobalKMaxPoolBackward& op) {
  const Layout4& layout = op.layout;
  const int64_t parts = ceil_divide(layout.positions(), kScatterPart);
  with_index(layout, [&](auto index) {
    using Index = decltype(index);
    if (channels_are_interleaved(layout) && op.k <= kCapacityLimit) {
      with_capacity(op.k, [&](auto capacity) {
        on.launch(scatter_channels<T, capacity(), Index>, Blocks(ChannelGroups<Index>::blocks(layout), parts), kThreads,
                  0, op, ChannelGroups<Index>(layout));
      });
    } else {
      with_elements<T>(chunk_size<T>(op.grad_features, layout), [&](auto elements) {
        on.launch(scatter_maps<T, elements(), Index>, Blocks(ceil_divide(layout.maps(), kWarpsPerBlock), parts),
                  kThreads, 0, op, Maps<Index>(layout));
      });
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> global_k_max_pool(const Tensor& features, int64_t k,
                                                     const std::optional<Tensor>& weight, bool keep_values,
                                                     bool wide_indices) {
  const Launcher on(features);
  const GlobalKMaxPoolCall call = prepare_pool(features, k, weight, keep_values, wide_indices);
  FGVC_SWITCH_CUDA_DTYPE(call.op.dtype, pool<T>(on, call.op));
  return {call.output, call.indices, call.values};
}

template <class T>
Tensor weight_grad(const Launcher& on, const Tensor& grad, const Tensor& values) {
  using Value = Accumulation<T>;
  const int64_t k = values.size(2), maps = grad.numel(), chunks = ceil_divide(maps, kMapsPerChunk);
  Tensor sums = empty(values, {chunks, k}), total = empty(values, {k});
  if (k == 0) return total;
  GlobalKMaxPoolWeightGrad op{};
  op.k = k;
  op.grad = grad.const_data_ptr();
  op.values = values.const_data_ptr();
  op.sums = sums.mutable_data_ptr();
  if (values.numel() <= INT32_MAX) {
    on.launch(sum_weight_gradient<T, uint32_t>, chunks, kWeightThreads, 0, op, static_cast<uint32_t>(maps));
  } else {
    on.launch(sum_weight_gradient<T, uint64_t>, chunks, kWeightThreads, 0, op, static_cast<uint64_t>(maps));
  }
  on.launch(sum_chunks<Value>, k, kWeightThreads, 0, Global<const Value>(sums.const_data_ptr()),
            Global<Value>(total.mutable_data_ptr()), chunks, k);
  return total;
}

std::tuple<Tensor, Tensor> global_k_max_pool_backward(const Tensor& grad, const Tensor& indices,
                                                      const std::optional<Tensor>& values,
                                                      const std::optional<Tensor>& weight, std::vector<int64_t> size,
                                                      std::vector<int64_t> stride, bool grad_features,
                                                      bool grad_weight) {
  const Launcher on(grad);
  const Tensor dense_grad = as_dense(grad);
  Tensor features = grad_features ? empty_strided(grad, size, stride) : empty(grad, {0});
  if (grad_features) {
    const auto weights = as_accumulation(weight, grad);
    const GlobalKMaxPoolBackward op = scatter_arguments(dense_grad, indices, weights, features);
    FGVC_SWITCH_CUDA_DTYPE(op.dtype, scatter<T>(on, op));
  }
  if (!grad_weight) return {features, empty(grad, {0})};
  check_values(grad, values, weight);
  Tensor total;
  FGVC_SWITCH_CUDA_DTYPE(dtype_of(grad), total = weight_grad<T>(on, dense_grad, *values));
  return {features,
          weight->scalar_type() == total.scalar_type() ? total : torch::stable::to(total, weight->scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("global_k_max_pool", TORCH_BOX(&global_k_max_pool));
  m.impl("global_k_max_pool_backward", TORCH_BOX(&global_k_max_pool_backward));
}

}  // namespace fgvc_ext
