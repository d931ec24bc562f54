#include "compose_parts.cuh"

#include "launch.cuh"

namespace fgvc_ext {
namespace {

using namespace cuda;

template <class T>
void blur(const Launcher& on, const ComposeParts& op) {
  using Value = Accumulation<T>;
  const int64_t rows = op.small_rows(), weights = Gaussian<Value>::bytes(op);
  on.launch(pool_pixels<T>, Blocks(op.layout.samples * op.small_height, ceil_divide(op.layout.width, kPartThreads)),
            kPartThreads, 0, op, pixels_are_interleaved(op.layout));
  const int64_t row = op.small_width * static_cast<int64_t>(sizeof(Value));
  if (weights + row <= kSharedBytes) {
    on.launch(blur_part_rows<Value, true>, rows, kPartThreads, weights + row, op);
  } else {
    on.launch(blur_part_rows<Value, false>, rows, kPartThreads, weights, op);
  }
  const int64_t blocks = ceil_divide(op.small_height, kWarpsPerBlock);
  on.launch(blur_part_columns<Value>,
            Blocks(op.layout.samples * kPartChannels * blocks, ceil_divide(op.small_width, kWarp)), kPartThreads,
            weights, op);
}

template <class T, class Index>
void compose(const Launcher& on, const ComposeParts& op) {
  if (op.row_factor() == 1 && op.column_factor() == 1) {
    const int64_t blocks = ceil_divide(op.layout.positions(), kPartThreads);
    on.launch(compose_pixels<T, Index>, op.layout.samples * blocks, kPartThreads, 0, op, PartImage<Index>(op, blocks));
    return;
  }
  const int64_t blocks = ceil_divide(op.part_height * op.part_width, kPartThreads);
  on.launch(compose_means<T, Index>, op.layout.samples * op.parts * blocks, kPartThreads, 0, op,
            PartImage<Index>(op, blocks));
}

template <class T>
void launch_all(const Launcher& on, const ComposeParts& op) {
  if (op.blurs()) blur<T>(on, op);
  const int64_t longest = std::max(op.layout.height, op.layout.width);
  longest <= 46340 / 2 ? compose<T, uint32_t>(on, op)
                       : compose<T, uint64_t>(on, op);  // its square, twice, fits 31 bits
}

Tensor compose_parts(const Tensor& images, const Tensor& boxes, const Tensor& seed, double blur_sigma, double noise_std,
                     bool replace, int64_t part_height, int64_t part_width) {
  const Launcher on(images);
  const ComposePartsCall call =
      prepare_parts(images, boxes, seed, blur_sigma, noise_std, replace, part_height, part_width);
  if (call.op.parts > 0) FGVC_SWITCH_CUDA_DTYPE(call.op.dtype, launch_all<T>(on, call.op));
  return call.output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FGVC_NAMESPACE, FGVC_CUDA_KEY, m) { m.impl("compose_parts", TORCH_BOX(&compose_parts)); }

}  // namespace fgvc_ext
