// Sums on the host side, in the order of the values, whatever the thread count.
#pragma once

#include "../common/tensor.h"

namespace fgvc_ext {

// Writes factor · Σ values / divisor, or 0 where there are no values, into the tensor `result` [] of their dtype.
inline void write_sum(const Tensor& values, double divisor, Tensor& result, double factor = 1) {
  const auto add_up = [&](const auto* from, auto* to) {
    double total = 0;
    for (int64_t i = 0; i < values.numel(); ++i) total += from[i];
    *to = static_cast<std::decay_t<decltype(*to)>>(values.numel() == 0 ? 0. : factor * total / divisor);
  };
  if (values.scalar_type() == ScalarType::Double) {
    add_up(values.const_data_ptr<double>(), result.mutable_data_ptr<double>());
  } else {
    add_up(values.const_data_ptr<float>(), result.mutable_data_ptr<float>());
  }
}

}  // namespace fgvc_ext
