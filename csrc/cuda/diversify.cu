#include "diversify.cuh"

#include "../common/diversify.h"
#include "launch.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

// What a block may hold in shared memory without asking for more.
constexpr int64_t kSharedBytes = 48 * 1024;

template <class T>
auto pool_kernel(int elements) {
  if constexpr (sizeof(T) == 2)
    if (elements == 8) return suppress_and_pool<T, 8>;
  if constexpr (sizeof(T) <= 4)
    if (elements == 4) return suppress_and_pool<T, 4>;
  return elements == 2 ? suppress_and_pool<T, 2> : suppress_and_pool<T, 1>;
}

template <class T>
auto gradient_kernel(int elements) {
  if constexpr (sizeof(T) == 2)
    if (elements == 8) return spread_gradient<T, 8>;
  if constexpr (sizeof(T) <= 4)
    if (elements == 4) return spread_gradient<T, 4>;
  return elements == 2 ? spread_gradient<T, 2> : spread_gradient<T, 1>;
}

std::tuple<Tensor, Tensor> diversify(const Tensor& maps, const Tensor& seed, int64_t peak_threshold,
                                     int64_t patch_threshold, int64_t patch_size, double alpha) {
  const Launcher launch(maps);
  const DiversifyCall call = prepare_diversify(maps, seed, peak_threshold, patch_threshold, patch_size, alpha);
  const Diversify& op = call.op;
  const int64_t calls = ceil_divide(1 + op.patch_rows() * op.patch_columns(), 4), drawn = calls * kMapsPerBlock;
  const bool draws_fit = drawn <= kSharedBytes;
  FGVC_SWITCH_CUDA_DTYPE(
      op.dtype, launch(pool_kernel<T>(chunk_size<T>(op.maps, op.layout)), ceil_divide(op.layout.maps(), kMapsPerBlock),
                       kMapsPerBlock * kWarp, draws_fit ? drawn : 0, op, calls, draws_fit));
  return {call.scores, call.bits};
}

int64_t spread_threads(const Layout4& layout) { return layout.maps() * ceil_divide(layout.positions(), kByte); }

Tensor diversify_backward(const Tensor& grad, const Tensor& bits, double alpha, std::vector<int64_t> size,
                          std::vector<int64_t> stride) {
  const Launcher launch(grad);
  Tensor maps = empty_strided(grad, size, stride);
  const Tensor dense_grad = as_dense(grad);
  const SpreadBits op = gradient_arguments(dense_grad, bits, alpha, maps);
  const int64_t threads = spread_threads(op.layout);
  FGVC_SWITCH_CUDA_DTYPE(op.dtype, launch(gradient_kernel<T>(chunk_size<T>(op.output, op.layout)),
                                          ceil_divide(threads, kSpreadThreads), kSpreadThreads, 0, op, threads));
  return maps;
}

Tensor suppression_mask(const Tensor& maps, const Tensor& seed, int64_t peak_threshold, int64_t patch_threshold,
                        int64_t patch_size) {
  const Tensor bits = std::get<1>(diversify(maps, seed, peak_threshold, patch_threshold, patch_size, 1.));
  const Launcher launch(maps);
  Tensor mask = dense_like(maps, ScalarType::Bool);
  const SpreadBits op = mask_arguments(bits, mask);
  const int64_t threads = spread_threads(op.layout);
  launch(spread_mask, ceil_divide(threads, kSpreadThreads), kSpreadThreads, 0, op, threads);
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) {
  m.impl("diversify", TORCH_BOX(&diversify));
  m.impl("diversify_backward", TORCH_BOX(&diversify_backward));
  m.impl("suppression_mask", TORCH_BOX(&suppression_mask));
}

}  // namespace fgvc_ext
