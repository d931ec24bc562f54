#include "../common/diversify.h"

#include "dispatch.h"

namespace fgvc_ext {

FGVC_KERNEL(diversify, Diversify)
FGVC_KERNEL(spread_gradient, SpreadGradient)
FGVC_KERNEL(spread_mask, SpreadMask)

namespace {

std::tuple<Tensor, Tensor> diversify(const Tensor& maps, const Tensor& seed, int64_t peak_threshold,
                                     int64_t patch_threshold, int64_t patch_size, double alpha) {
  const DiversifyCall call =
      prepare_diversify("diversify", maps, seed, peak_threshold, patch_threshold, patch_size, alpha);
  run_on_tiles(kernels::diversify, call.op);
  return {call.scores, call.bits};
}

Tensor diversify_backward(const Tensor& grad, const Tensor& bits, double alpha, std::vector<int64_t> size,
                          std::vector<int64_t> stride) {
  const SpreadGradientCall call = prepare_diversify_backward(grad, bits, alpha, size, stride);
  run_on_tiles(kernels::spread_gradient, call.op);
  return call.grad_maps;
}

Tensor suppression_mask(const Tensor& maps, const Tensor& seed, int64_t peak_threshold, int64_t patch_threshold,
                        int64_t patch_size) {
  const DiversifyCall drawn =
      prepare_diversify("suppression_mask", maps, seed, peak_threshold, patch_threshold, patch_size, 1.);
  run_on_tiles(kernels::diversify, drawn.op);
  const SpreadMaskCall call = prepare_mask(maps, drawn.bits);
  run_on_tiles(kernels::spread_mask, call.op);
  return call.mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) {
  m.impl("diversify", TORCH_BOX(&diversify));
  m.impl("diversify_backward", TORCH_BOX(&diversify_backward));
  m.impl("suppression_mask", TORCH_BOX(&suppression_mask));
}

}  // namespace fgvc_ext
