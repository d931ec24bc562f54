// The backward of losses whose gradient forward computed already, but for the factor that comes from above: a scalar
// for each loss of the operator.
#pragma once

#include "tiles.h"

namespace fgvc_ext {

constexpr int kMostLosses = 2;  // of one operator

// output[i] = Σ_l grads[l] · gradients[l][i] over the losses that have one: zero times a NaN of the others is none of
// their gradient.
struct LossGradient {
  Dtype dtype;  // of output
  int64_t losses, values;
  const void* grads[kMostLosses];  // [] each, accumulation type, or null
  const void* gradients;           // [losses, values], accumulation type
  void* output;                    // [values], dtype
};

}  // namespace fgvc_ext

#ifndef FGVC_KERNELS_ONLY
#include "checks.h"

namespace fgvc_ext {

struct LossGradientCall {
  Tensor output;
  LossGradient op;
};

// `gradients` is [losses, *size]; the output is [*size] in `dtype`.
inline LossGradientCall prepare_loss_gradient(const char* name, std::initializer_list<std::optional<Tensor>> grads,
                                              const Tensor& gradients, ScalarType dtype) {
  const Checks check(name);
  check.that(gradients.dim() >= 1 && gradients.size(0) == static_cast<int64_t>(grads.size()),
             "gradients must begin with one entry per loss");
  const auto sizes = gradients.sizes();
  const std::vector<int64_t> size(sizes.begin() + 1, sizes.end());
  const ScalarType wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check.that(gradients.scalar_type() == wide && gradients.is_contiguous(),
             "gradients must be contiguous and of the dtype in which ", torch::headeronly::toString(dtype),
             " is added up");
  Tensor output = empty(gradients, size, dtype);
  LossGradient op{.dtype = dtype_of(output),
                  .losses = static_cast<int64_t>(grads.size()),
                  .values = output.numel(),
                  .grads = {},
                  .gradients = gradients.const_data_ptr(),
                  .output = output.mutable_data_ptr()};
  int number = 0;
  for (const std::optional<Tensor>& grad : grads) {
    if (grad) check.input("grad", *grad, gradients, wide, {});
    op.grads[number++] = data_or_null(grad);
  }
  return {output, op};
}

}  // namespace fgvc_ext
#endif
