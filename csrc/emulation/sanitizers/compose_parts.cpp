#include "../../cuda/compose_parts.cuh"

#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

template <class T, bool RowFits, class Index>
void run(const Layout4& layout, int64_t part_height, int64_t part_width, double blur_sigma, bool seed_per_sample,
         Digest& digest) {
  using Value = Accumulation<T>;
  constexpr int64_t kParts = 3;
  const auto images = numbers<T>(layout.maps() * layout.positions(), 9);
  std::vector<int64_t> seed(seed_per_sample ? layout.samples : 1, -17);
  std::vector<Value> boxes;
  for (int64_t i = 0; i < layout.samples * kParts; ++i)
    for (const double side : {0.1 * i * layout.width, 1.0, 0.6 * layout.width, 0.7 * layout.height})
      boxes.push_back(static_cast<Value>(side));

  ComposeParts op{};
  op.layout = layout;
  op.images = images.data();
  op.parts = kParts;
  op.boxes = boxes.data();
  op.seed = seed.data();
  op.seed_per_sample = seed_per_sample;
  op.blur_sigma = blur_sigma;
  op.noise_std = 0.5;
  op.part_height = part_height;
  op.part_width = part_width;
  op.small_height = (layout.height + kPool - 1) / kPool;
  op.small_width = (layout.width + kPool - 1) / kPool;
  op.small_pitch = row_pitch(op.small_width);
  std::vector<Value> rows(op.small_rows() * op.small_pitch), small(rows.size());
  std::vector<T> output(layout.samples * kParts * kPartChannels * part_height * part_width);
  op.rows = rows.data();
  op.small = small.data();
  op.output = output.data();

  const int64_t weights = Gaussian<Value>::bytes(op);
  launch(pool_pixels<T>, dim3(layout.samples * op.small_height, blocks_for(layout.width, kPartThreads)), kPartThreads,
         0, nullptr, op, pixels_are_interleaved(layout));
  launch(blur_part_rows<Value, RowFits>, op.small_rows(), kPartThreads,
         weights + (RowFits ? op.small_width * sizeof(Value) : 0), nullptr, op);
  launch(blur_part_columns<Value>,
         dim3(layout.samples * kPartChannels * blocks_for(op.small_height, kWarpsPerBlock),
              blocks_for(op.small_width, kWarp)),
         kPartThreads, weights, nullptr, op);
  const bool whole = part_height == layout.height && part_width == layout.width;
  const auto blocks = blocks_for(part_height * part_width, kPartThreads);
  const auto kernel = whole ? compose_pixels<T, Index> : compose_means<T, Index>;
  launch(kernel, blocks * layout.samples * (whole ? 1 : kParts), kPartThreads, 0, nullptr, op,
         PartImage<Index>(op, blocks));
  digest.add(output);
}

void launches(Digest& digest) {
  run<float, true, uint32_t>(contiguous(2, 3, 19, 21), 19, 21, 5, false, digest);
  run<float, false, uint64_t>(channels_last(1, 3, 8, 40), 8, 40, 30, true, digest);
  run<double, true, uint32_t>(contiguous(1, 3, 6, 9), 2, 9, 2, true, digest);
  run<__nv_bfloat16, true, uint32_t>(channels_last(2, 3, 1, 7), 1, 7, 3, false, digest);
  run<__half, true, uint32_t>(contiguous(1, 3, 8, 300), 4, 150, 4, false, digest);
}

const Registration registration("compose_parts", launches);

}  // namespace
}  // namespace fgvc_ext::sanitizers
