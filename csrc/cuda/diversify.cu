#include "diversify.cuh"
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
  const Layout4 layout = layout_of(maps);
  STD_TORCH_CHECK(layout.height > 0 && layout.width > 0, "maps must have H and W of at least 1");
  STD_TORCH_CHECK(patch_size >= 1, "patch_size must be at least 1, got ", patch_size);
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && (seed.dim() == 0 || seed.numel() == layout.samples),
                  "seed must be int64 [] or [", layout.samples, "]");

  const Launcher launch(maps);
  Tensor scores = empty(maps, {layout.samples, layout.channels});
  Tensor bits = empty(maps, {layout.samples, layout.channels, (layout.positions() + 7) / 8}, ScalarType::Byte);
  const Tensor dense_seed = as_dense(seed);
  const Diversify op{dtype_of(maps),
                     layout,
                     maps.const_data_ptr(),
                     dense_seed.const_data_ptr<int64_t>(),
                     seed.dim() == 1,
                     static_cast<uint64_t>(peak_threshold),
                     static_cast<uint64_t>(patch_threshold),
                     patch_size,
                     alpha,
                     scores.mutable_data_ptr(),
                     bits.mutable_data_ptr<uint8_t>()};
  const int64_t calls = ceil_divide(1 + op.patch_rows() * op.patch_columns(), 4), drawn = calls * kMapsPerBlock;
  const bool draws_fit = drawn <= kSharedBytes;
  FGVC_SWITCH_CUDA_DTYPE(
      op.dtype, launch(pool_kernel<T>(chunk_size<T>(op.maps, layout)), ceil_divide(layout.maps(), kMapsPerBlock),
                       kMapsPerBlock * kWarp, draws_fit ? drawn : 0, op, calls, draws_fit));
  return {scores, bits};
}

int64_t spread_threads(const Layout4& layout) { return layout.maps() * ceil_divide(layout.positions(), kByte); }

Tensor diversify_backward(const Tensor& grad, const Tensor& bits, double alpha, std::vector<int64_t> size,
                          std::vector<int64_t> stride) {
  const Launcher launch(grad);
  Tensor maps = empty_strided(grad, size, stride);
  const Tensor dense_grad = as_dense(grad);
  const Layout4 layout = layout_of(maps);
  check_bits(grad, bits, layout);
  const SpreadBits op{
      dtype_of(grad),         layout, dense_grad.const_data_ptr(), bits.const_data_ptr<uint8_t>(), alpha,
      maps.mutable_data_ptr()};
  const int64_t threads = spread_threads(layout);
  FGVC_SWITCH_CUDA_DTYPE(op.dtype, launch(gradient_kernel<T>(chunk_size<T>(op.output, layout)),
                                          ceil_divide(threads, kSpreadThreads), kSpreadThreads, 0, op, threads));
  return maps;
}

Tensor suppression_mask(const Tensor& maps, const Tensor& seed, int64_t peak_threshold, int64_t patch_threshold,
                        int64_t patch_size) {
  const Tensor bits = std::get<1>(diversify(maps, seed, peak_threshold, patch_threshold, patch_size, 1.));
  const Launcher launch(maps);
  Tensor mask = dense_like(maps, ScalarType::Bool);
  const SpreadBits op{Dtype::float32,         layout_of(mask), nullptr, bits.const_data_ptr<uint8_t>(), 0.,
                      mask.mutable_data_ptr()};
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
