#include "../common/global_k_max_pool.h"
#include "parallel.h"

namespace fgvc_ext {
namespace {

using torch::stable::parallel_for;

std::tuple<Tensor, Tensor, Tensor> global_k_max_pool(const Tensor& features, int64_t k,
                                                     const std::optional<Tensor>& weight, bool keep_values,
                                                     bool wide_indices) {
  const GlobalKMaxPoolCall call = prepare_pool(features, k, weight, keep_values, wide_indices);
  const GlobalKMaxPool& op = call.op;
  parallel_for(0, tiles(op.layout), tiles_per_task(op.layout), [&](int64_t begin, int64_t end) {
    const Scratch scratch(op.scratch_bytes());
    kernels().global_k_max_pool(op, begin, end, scratch.data());
  });
  return {call.output, call.indices, call.values};
}

// Σ grad · S_r / k: sums of fixed chunks of maps, then of the chunks in order, so that threads change no bit.
Tensor weight_grad(const Tensor& grad, const Tensor& values, const Tensor& weight) {
  constexpr int64_t kChunk = 1024;
  const int64_t k = values.size(2), maps = grad.numel(), chunks = (maps + kChunk - 1) / kChunk;
  std::vector<double> sums(chunks * k), total(k);
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const GlobalKMaxPoolWeightGrad op{dtype_of(grad), k, grad.const_data_ptr(), values.const_data_ptr(),
                                        sums.data() + chunk * k};
      kernels().global_k_max_pool_weight_grad(op, chunk * kChunk, std::min(maps, (chunk + 1) * kChunk));
    }
  });
  for (int64_t i = 0; i < chunks * k; ++i) total[i % k] += sums[i];
  Tensor result = empty(values, {k}, ScalarType::Double);
  std::copy(total.begin(), total.end(), result.mutable_data_ptr<double>());
  return weight.scalar_type() == ScalarType::Double ? result : torch::stable::to(result, weight.scalar_type());
}

std::tuple<Tensor, Tensor> global_k_max_pool_backward(const Tensor& grad, const Tensor& indices,
                                                      const std::optional<Tensor>& values,
                                                      const std::optional<Tensor>& weight, std::vector<int64_t> size,
                                                      std::vector<int64_t> stride, bool grad_features,
                                                      bool grad_weight) {
  const Tensor dense_grad = as_dense(grad);
  if (grad_weight) check_values(grad, values, weight);
  Tensor features = grad_features ? empty_strided(grad, size, stride) : empty(grad, {0});
  if (grad_features) {
    const auto weights = as_accumulation(weight, grad);
    const GlobalKMaxPoolBackward op = scatter_arguments(dense_grad, indices, weights, features);
    parallel_for(0, tiles(op.layout), tiles_per_task(op.layout),
                 [&](int64_t begin, int64_t end) { kernels().global_k_max_pool_backward(op, begin, end); });
  }
  return {features, grad_weight ? weight_grad(dense_grad, *values, *weight) : empty(grad, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) {
  m.impl("global_k_max_pool", TORCH_BOX(&global_k_max_pool));
  m.impl("global_k_max_pool_backward", TORCH_BOX(&global_k_max_pool_backward));
}

}  // namespace fgvc_ext
