#include "../common/tensor.h"
#include "parallel.h"

namespace fgvc_ext {
namespace {

using torch::stable::parallel_for;

std::tuple<Tensor, Tensor> diversify(const Tensor& maps, const Tensor& seed, int64_t peak_threshold,
                                     int64_t patch_threshold, int64_t patch_size, double alpha) {
  const Layout4 layout = layout_of(maps);
  STD_TORCH_CHECK(layout.height > 0 && layout.width > 0, "maps must have H and W of at least 1");
  STD_TORCH_CHECK(patch_size >= 1, "patch_size must be at least 1, got ", patch_size);
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && (seed.dim() == 0 || seed.numel() == layout.samples),
                  "seed must be int64 [] or [", layout.samples, "]");

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
  parallel_for(0, tiles(layout), tiles_per_task(layout), [&](int64_t begin, int64_t end) {
    const Scratch scratch(op.scratch_bytes());
    kernels().diversify(op, begin, end, scratch.data());
  });
  return {scores, bits};
}

void spread(const SpreadBits& op) {
  parallel_for(0, tiles(op.layout), tiles_per_task(op.layout),
               [&](int64_t begin, int64_t end) { kernels().spread_bits(op, begin, end); });
}

Tensor diversify_backward(const Tensor& grad, const Tensor& bits, double alpha, std::vector<int64_t> size,
                          std::vector<int64_t> stride) {
  Tensor maps = empty_strided(grad, size, stride);
  const Tensor dense_grad = as_dense(grad);
  check_bits(grad, bits, layout_of(maps));
  spread({dtype_of(grad), layout_of(maps), dense_grad.const_data_ptr(), bits.const_data_ptr<uint8_t>(), alpha,
          maps.mutable_data_ptr()});
  return maps;
}

Tensor suppression_mask(const Tensor& maps, const Tensor& seed, int64_t peak_threshold, int64_t patch_threshold,
                        int64_t patch_size) {
  const Tensor bits = std::get<1>(diversify(maps, seed, peak_threshold, patch_threshold, patch_size, 1.));
  Tensor mask = dense_like(maps, ScalarType::Bool);
  spread({Dtype::float32, layout_of(mask), nullptr, bits.const_data_ptr<uint8_t>(), 0., mask.mutable_data_ptr()});
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) {
  m.impl("diversify", TORCH_BOX(&diversify));
  m.impl("diversify_backward", TORCH_BOX(&diversify_backward));
  m.impl("suppression_mask", TORCH_BOX(&suppression_mask));
}

}  // namespace fgvc_ext
