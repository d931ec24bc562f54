#include "../../cuda/heatmap_to_boxes.cuh"

#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

template <class T>
void run(int64_t maps, int64_t height, int64_t width, double threshold, Digest& digest) {
  const auto heatmaps = numbers<T>(maps * height * width, 8);
  std::vector<Accumulation<T>> boxes(maps * 4);
  HeatmapToBoxes op{};
  op.maps = maps;
  op.height = height;
  op.width = width;
  op.stride[0] = height * width;
  op.stride[1] = width;
  op.stride[2] = 1;
  op.heatmaps = heatmaps.data();
  op.threshold = threshold;
  op.image_height = 448;
  op.image_width = 300;
  op.min_size = 10;
  op.boxes = boxes.data();
  launch(box_of_map<T>, blocks_for(maps, kWarpsPerBlock), kBoxThreads, 0, nullptr, op, Divisor<uint32_t>(width));
  digest.add(boxes);
}

void launches(Digest& digest) {
  run<float>(9, 14, 14, 0.8, digest);
  run<double>(1, 3, 37, 0.3, digest);
  run<__nv_bfloat16>(3, 1, 1, 0.5, digest);
  run<__half>(2, 7, 5, 1, digest);
}

const Registration registration("heatmap_to_boxes", launches);

}  // namespace
}  // namespace fgvc_ext::sanitizers
