// Operators with the schemas of ours that allocate their results and do nothing: what any call through this ABI costs.
#define FGVC_NAMESPACE fgvc_ext_floor
#include "library.cpp"

namespace fgvc_ext {
namespace {

std::tuple<Tensor, Tensor, Tensor> global_k_max_pool(
    const Tensor& features, int64_t k, const std::optional<Tensor>&, bool, bool) {
  const int64_t samples = features.size(0), channels = features.size(1);
  return {empty(features, {samples, channels}), empty(features, {samples, channels, k}, ScalarType::Short),
          empty(features, {samples, channels, 0})};
}

std::tuple<Tensor, Tensor> global_k_max_pool_backward(
    const Tensor& grad, const Tensor&, const Tensor&, const std::optional<Tensor>&, std::vector<int64_t> size,
    std::vector<int64_t> stride, bool, bool) {
  return {empty_strided(grad, size, stride), empty(grad, {0})};
}

std::tuple<Tensor, Tensor> diversify(const Tensor& maps, const Tensor&, int64_t, int64_t, int64_t, double) {
  const int64_t samples = maps.size(0), classes = maps.size(1);
  return {empty(maps, {samples, classes}),
          empty(maps, {samples, classes, (maps.size(2) * maps.size(3) + 7) / 8}, ScalarType::Byte)};
}

Tensor diversify_backward(
    const Tensor& grad, const Tensor&, double, std::vector<int64_t> size, std::vector<int64_t> stride) {
  return empty_strided(grad, size, stride);
}

std::tuple<Tensor, Tensor> gradient_boosting_cross_entropy(
    const Tensor& scores, const Tensor&, int64_t, int64_t, int64_t) {
  const ScalarType dtype = accumulation(scores);
  return {empty(scores, {}, dtype), empty(scores, {4, scores.size(0)}, dtype)};
}

Tensor gradient_boosting_cross_entropy_backward(
    const Tensor&, const Tensor& scores, const Tensor&, const Tensor&) {
  return dense_like(scores);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("global_k_max_pool", TORCH_BOX(&global_k_max_pool));
  m.impl("global_k_max_pool_backward", TORCH_BOX(&global_k_max_pool_backward));
  m.impl("diversify", TORCH_BOX(&diversify));
  m.impl("diversify_backward", TORCH_BOX(&diversify_backward));
  m.impl("gradient_boosting_cross_entropy", TORCH_BOX(&gradient_boosting_cross_entropy));
  m.impl("gradient_boosting_cross_entropy_backward", TORCH_BOX(&gradient_boosting_cross_entropy_backward));
}

}  // namespace fgvc_ext
