#include "global_k_max_pool.cuh"

#include "../common/global_k_max_pool.h"
#include "launch.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

int64_t blocks_of(const Layout4& layout) { return ceil_divide(layout.maps(), kMapsPerBlock); }

template <class T, int Capacity>
auto list_kernel(int elements) {
  if constexpr (sizeof(T) == 2)
    if (elements == 8) return pool_with_lists<T, Capacity, 8>;
  if constexpr (sizeof(T) <= 4)
    if (elements == 4) return pool_with_lists<T, Capacity, 4>;
  if (elements == 2) return pool_with_lists<T, Capacity, 2>;
  return pool_with_lists<T, Capacity, 1>;
}

template <class T>
auto pool_kernel(int64_t k, int elements) {
  if (k > kListLimit) return pool_rank_by_rank<T>;
  if (k > 8) return list_kernel<T, 16>(elements);
  if (k > 4) return list_kernel<T, 8>(elements);
  return k > 1 ? list_kernel<T, 4>(elements) : list_kernel<T, 1>(elements);
}

template <class T>
auto scatter_kernel(int elements) {
  if constexpr (sizeof(T) == 2)
    if (elements == 8) return scatter_gradient<T, 8>;
  if constexpr (sizeof(T) <= 4)
    if (elements == 4) return scatter_gradient<T, 4>;
  return elements == 2 ? scatter_gradient<T, 2> : scatter_gradient<T, 1>;
}

std::tuple<Tensor, Tensor, Tensor> global_k_max_pool(const Tensor& features, int64_t k,
                                                     const std::optional<Tensor>& weight, bool keep_values,
                                                     bool wide_indices) {
  const Launcher launch(features);
  const GlobalKMaxPoolCall call = prepare_pool(features, k, weight, keep_values, wide_indices);
  const GlobalKMaxPool& op = call.op;
  FGVC_SWITCH_CUDA_DTYPE(op.dtype, launch(pool_kernel<T>(k, chunk_size<T>(op.features, op.layout)),
                                          blocks_of(op.layout), kMapsPerBlock * kWarp, 0, op));
  return {call.output, call.indices, call.values};
}

template <class T>
Tensor weight_grad(const Launcher& launch, const Tensor& grad, const Tensor& values) {
  using Value = Accumulation<T>;
  const int64_t k = values.size(2), maps = grad.numel(), chunks = ceil_divide(maps, kMapsPerChunk);
  Tensor sums = empty(values, {chunks, k}), total = empty(values, {k});
  const GlobalKMaxPoolWeightGrad op{dtype_of(grad), k, grad.const_data_ptr(), values.const_data_ptr(),
                                    sums.mutable_data_ptr()};
  launch(sum_weight_gradient<T>, chunks, kWeightThreads, 0, op, maps);
  launch(sum_chunks<Value>, k, kWeightThreads, 0, sums.const_data_ptr<Value>(), total.mutable_data_ptr<Value>(), chunks,
         k);
  return total;
}

std::tuple<Tensor, Tensor> global_k_max_pool_backward(const Tensor& grad, const Tensor& indices,
                                                      const std::optional<Tensor>& values,
                                                      const std::optional<Tensor>& weight, std::vector<int64_t> size,
                                                      std::vector<int64_t> stride, bool grad_features,
                                                      bool grad_weight) {
  const Launcher launch(grad);
  const Tensor dense_grad = as_dense(grad);
  Tensor features = grad_features ? empty_strided(grad, size, stride) : empty(grad, {0});
  if (grad_features) {
    const auto weights = as_accumulation(weight, grad);
    const GlobalKMaxPoolBackward op = scatter_arguments(dense_grad, indices, weights, features);
    FGVC_SWITCH_CUDA_DTYPE(op.dtype, launch(scatter_kernel<T>(chunk_size<T>(op.grad_features, op.layout)),
                                            blocks_of(op.layout), kMapsPerBlock * kWarp, 0, op));
  }
  if (!grad_weight) return {features, empty(grad, {0})};
  check_values(grad, values, weight);
  Tensor total;
  FGVC_SWITCH_CUDA_DTYPE(dtype_of(grad), total = weight_grad<T>(launch, dense_grad, *values));
  return {features,
          weight->scalar_type() == total.scalar_type() ? total : torch::stable::to(total, weight->scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("global_k_max_pool", TORCH_BOX(&global_k_max_pool));
  m.impl("global_k_max_pool_backward", TORCH_BOX(&global_k_max_pool_backward));
}

}  // namespace fgvc_ext
