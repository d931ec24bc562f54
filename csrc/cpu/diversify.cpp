#include "../common/diversify.h"
#include "parallel.h"

namespace fgvc_ext {
namespace {

using torch::stable::parallel_for;

std::tuple<Tensor, Tensor> diversify(const Tensor& maps, const Tensor& seed, int64_t peak_threshold,
                                     int64_t patch_threshold, int64_t patch_size, double alpha) {
  const DiversifyCall call = prepare_diversify(maps, seed, peak_threshold, patch_threshold, patch_size, alpha);
  const Diversify& op = call.op;
  parallel_for(0, tiles(op.layout), tiles_per_task(op.layout), [&](int64_t begin, int64_t end) {
    const Scratch scratch(op.scratch_bytes());
    kernels().diversify(op, begin, end, scratch.data());
  });
  return {call.scores, call.bits};
}

void spread(const SpreadBits& op) {
  parallel_for(0, tiles(op.layout), tiles_per_task(op.layout),
               [&](int64_t begin, int64_t end) { kernels().spread_bits(op, begin, end); });
}

Tensor diversify_backward(const Tensor& grad, const Tensor& bits, double alpha, std::vector<int64_t> size,
                          std::vector<int64_t> stride) {
  Tensor maps = empty_strided(grad, size, stride);
  const Tensor dense_grad = as_dense(grad);
  spread(gradient_arguments(dense_grad, bits, alpha, maps));
  return maps;
}

Tensor suppression_mask(const Tensor& maps, const Tensor& seed, int64_t peak_threshold, int64_t patch_threshold,
                        int64_t patch_size) {
  const Tensor bits = std::get<1>(diversify(maps, seed, peak_threshold, patch_threshold, patch_size, 1.));
  Tensor mask = dense_like(maps, ScalarType::Bool);
  spread(mask_arguments(bits, mask));
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) {
  m.impl("diversify", TORCH_BOX(&diversify));
  m.impl("diversify_backward", TORCH_BOX(&diversify_backward));
  m.impl("suppression_mask", TORCH_BOX(&suppression_mask));
}

}  // namespace fgvc_ext
