#include "../common/compose_parts.h"

#include "dispatch.h"

namespace fgvc_ext {

FGVC_KERNEL(part_blur_rows, ComposeParts)
FGVC_KERNEL(part_blur_columns, ComposeParts)
FGVC_KERNEL(compose_parts, ComposeParts)

namespace {

Tensor compose_parts(const Tensor& images, const Tensor& boxes, const Tensor& seed, double blur_sigma, double noise_std,
                     bool replace, int64_t part_height, int64_t part_width) {
  const ComposePartsCall call =
      prepare_parts(images, boxes, seed, blur_sigma, noise_std, replace, part_height, part_width);
  const ComposeParts& op = call.op;
  if (op.parts == 0) return call.output;
  if (op.blurs()) {
    const int64_t values = op.small_width * (2 * op.radius() + 1);
    run_on_rows(kernels::part_blur_rows, op, op.small_rows(), values + kPool * op.layout.width);
    run_on_rows(kernels::part_blur_columns, op, op.small_rows(), values);
  }
  run_on_rows(kernels::compose_parts, op, op.layout.samples * op.part_height,
              op.row_factor() * op.layout.width * kPartChannels * (op.parts + 1));
  return call.output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, CPU, m) { m.impl("compose_parts", TORCH_BOX(&compose_parts)); }

}  // namespace fgvc_ext
