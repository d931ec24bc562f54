// The backward kernel of losses whose gradient forward computed (csrc/common/loss_gradient.h).
#pragma once

#include "../common/loss_gradient.h"
#include "scratch.h"
#include "vector.h"

namespace fgvc_ext::FGVC_ISA {

template <class T>
FGVC_INLINE void scale_gradients(const LossGradient& op, int64_t begin, int64_t end) {
  using Value = Accumulation<T>;
  const auto* first = static_cast<const Value*>(op.gradients);
  const auto* second = first + op.values;
  auto* output = static_cast<T*>(op.output);
  const Value factor = *static_cast<const Value*>(op.grads[0]);
  if (op.losses == 1) {
    for (int64_t i = begin; i < end; ++i) output[i] = from_float<T>(factor * first[i]);
    return;
  }
  const Value other = *static_cast<const Value*>(op.grads[1]);
  for (int64_t i = begin; i < end; ++i) output[i] = from_float<T>(factor * first[i] + other * second[i]);
}

}  // namespace fgvc_ext::FGVC_ISA
