// The backward kernel of losses whose gradient forward computed (csrc/common/loss_gradient.h).
#pragma once

#include "../common/loss_gradient.h"
#include "scratch.h"
#include "vector.h"

namespace fgvc_ext::FGVC_ISA {

template <class T>
FGVC_INLINE void scale_gradients(const LossGradient& op, int64_t begin, int64_t end) {
  using Value = Accumulation<T>;
  auto* output = static_cast<T*>(op.output);
  const Value* factor[kMostLosses];
  const Value* gradient[kMostLosses];
  int used = 0;
  for (int64_t loss = 0; loss < op.losses; ++loss) {
    if (!op.grads[loss]) continue;
    factor[used] = static_cast<const Value*>(op.grads[loss]);
    gradient[used++] = static_cast<const Value*>(op.gradients) + loss * op.values;
  }
  if (used == 2) {
    for (int64_t i = begin; i < end; ++i)
      output[i] = from_float<T>(*factor[0] * gradient[0][i] + *factor[1] * gradient[1][i]);
  } else if (used == 1) {
    for (int64_t i = begin; i < end; ++i) output[i] = from_float<T>(*factor[0] * gradient[0][i]);
  } else {
    for (int64_t i = begin; i < end; ++i) output[i] = from_float<T>(Value(0));
  }
}

}  // namespace fgvc_ext::FGVC_ISA
