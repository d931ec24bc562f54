#include "../../cuda/part_box_losses.cuh"

#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

template <class T>
void run(int64_t samples, int64_t boxes_per_sample, AreaMode mode, Digest& digest) {
  using Value = Accumulation<T>;
  const int64_t count = samples * boxes_per_sample;
  const auto boxes = numbers<T>(count * 4, 16);
  const auto object_areas = numbers<Value>(samples, 17), grads = numbers<Value>(2, 18);
  std::vector<uint8_t> valid;
  for (int64_t i = 0; i < count; ++i) valid.push_back(i % 5 != 2);
  std::vector<Value> overlaps(samples), areas(samples), gradients(2 * count * 4), losses(2);
  std::vector<T> grad_boxes(count * 4);

  PartBoxLosses op{};
  op.samples = samples;
  op.boxes_per_sample = boxes_per_sample;
  op.stride[0] = boxes_per_sample * 4;
  op.stride[1] = 4;
  op.stride[2] = 1;
  op.boxes = boxes.data();
  op.valid = valid.data();
  op.object_areas = object_areas.data();
  op.iou_weight = 2;
  op.parts = 4;
  op.min_area = 0.5;
  op.mode = mode;
  op.overlaps = overlaps.data();
  op.areas = areas.data();
  op.gradients = gradients.data();
  launch(part_boxes_of_sample<T>, blocks_for(samples, kWarpsPerBlock), kPartBoxThreads, 0, nullptr, op);
  for (int loss = 0; loss < 2; ++loss)
    launch(sum_losses<Value>, 1, kLossThreads, 0, nullptr,
           Global<const Value>(loss == 0 ? overlaps.data() : areas.data()), samples, static_cast<Value>(samples),
           Global<const Value>(nullptr), Value(1), Global<Value>(losses.data() + loss));

  LossGradient backward{};
  backward.losses = 2;
  backward.values = count * 4;
  backward.grads[0] = grads.data();
  backward.grads[1] = grads.data() + 1;
  backward.gradients = gradients.data();
  backward.output = grad_boxes.data();
  launch(scale_gradients<T>, blocks_for(backward.values, kLossThreads), kLossThreads, 0, nullptr, backward);

  digest.add(overlaps);
  digest.add(areas);
  digest.add(gradients);
  digest.add(losses);
  digest.add(grad_boxes);
}

void launches(Digest& digest) {
  run<float>(9, 3, AreaMode::two_sided, digest);
  run<double>(2, 35, AreaMode::hinge, digest);
  run<__nv_bfloat16>(1, 1, AreaMode::log, digest);
  run<__half>(3, 6, AreaMode::two_sided, digest);
}

const Registration registration("part_box_losses", launches);

}  // namespace
}  // namespace fgvc_ext::sanitizers
