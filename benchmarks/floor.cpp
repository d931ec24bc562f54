// An operator that allocates its results and does nothing: what any call through this ABI costs.
#include "common/tensor.h"

namespace fgvc_ext {
namespace {

std::tuple<Tensor, Tensor> do_nothing(const Tensor& first, int64_t, double) {
  return {empty(first, {first.size(0)}), empty(first, {first.size(0)})};
}

Tensor do_nothing_backward(const Tensor& grad, const Tensor&, std::vector<int64_t> size, std::vector<int64_t> stride) {
  return empty_strided(grad, size, stride);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fgvc_ext, m) {
  m.def("do_nothing(Tensor first, SymInt k, float factor) -> (Tensor, Tensor)");
  m.def("do_nothing_backward(Tensor grad, Tensor kept, SymInt[] size, SymInt[] stride) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fgvc_ext, CompositeExplicitAutograd, m) {
  m.impl("do_nothing", TORCH_BOX(&do_nothing));
  m.impl("do_nothing_backward", TORCH_BOX(&do_nothing_backward));
}

}  // namespace fgvc_ext
