#include "../common/global_k_max_pool.h"

#include "dispatch.h"

namespace fgvc_ext {

FGVC_KERNEL(global_k_max_pool, GlobalKMaxPool)
FGVC_KERNEL(global_k_max_pool_backward, GlobalKMaxPoolBackward)
FGVC_KERNEL(global_k_max_pool_weight_grad, GlobalKMaxPoolWeightGrad)

namespace {

std::tuple<Tensor, Tensor, Tensor> global_k_max_pool(const Tensor& features, int64_t k,
                                                     const std::optional<Tensor>& weight, bool keep_values,
                                                     bool wide_indices) {
  const GlobalKMaxPoolCall call = prepare_pool(features, k, weight, keep_values, wide_indices);
  run_on_tiles(kernels::global_k_max_pool, call.op);
  return {call.output, call.indices, call.values};
}

// Sums of fixed chunks of maps, then of the chunks in order, so that threads change no bit.
Tensor weight_grad(GlobalKMaxPoolWeightGrad op, const Tensor& values, const Tensor& weight) {
  op.maps_per_chunk = 1024;
  const int64_t chunks = ceil_divide(op.maps, op.maps_per_chunk);
  std::vector<double> sums(chunks * op.k), total(op.k);
  op.sums = sums.data();
  run(kernels::global_k_max_pool_weight_grad, op, chunks, 1);
  for (int64_t i = 0; i < chunks * op.k; ++i) total[i % op.k] += sums[i];
  Tensor result = empty(values, {op.k}, ScalarType::Double);
  std::copy(total.begin(), total.end(), result.mutable_data_ptr<double>());
  return weight.scalar_type() == ScalarType::Double ? result : torch::stable::to(result, weight.scalar_type());
}

std::tuple<Tensor, Tensor> global_k_max_pool_backward(const Tensor& grad, const Tensor& indices,
                                                      const std::optional<Tensor>& values,
                                                      const std::optional<Tensor>& weight, std::vector<int64_t> size,
                                                      std::vector<int64_t> stride, bool grad_features,
                                                      bool grad_weight) {
  const GlobalKMaxPoolBackwardCall call =
      prepare_pool_backward(grad, indices, values, weight, size, stride, grad_features, grad_weight);
  if (grad_features) run_on_tiles(kernels::global_k_max_pool_backward, call.scatter);
  return {call.grad_features, grad_weight ? weight_grad(call.sum, *values, *weight) : call.grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) {
  m.impl("global_k_max_pool", TORCH_BOX(&global_k_max_pool));
  m.impl("global_k_max_pool_backward", TORCH_BOX(&global_k_max_pool_backward));
}

}  // namespace fgvc_ext
