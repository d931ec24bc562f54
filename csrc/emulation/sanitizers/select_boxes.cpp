#include "../../cuda/select_boxes.cuh"

#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

// Every `each`-th box is a candidate.
template <class T, class B>
void run(int64_t samples, int64_t boxes_per_sample, int64_t top, int64_t each, Digest& digest) {
  const int64_t count = samples * boxes_per_sample;
  const auto scores = numbers<T>(count, 19);
  const auto boxes = numbers<B>(count * 4, 20);
  std::vector<uint8_t> candidates, valid(samples * top);
  for (int64_t i = 0; i < count; ++i) candidates.push_back(i % each == 0);
  std::vector<int64_t> indices(samples * top);
  std::vector<Accumulation<T>> left(count);

  SelectBoxes op{};
  op.samples = samples;
  op.boxes_per_sample = boxes_per_sample;
  op.top = top;
  op.score_stride[0] = op.candidate_stride[0] = boxes_per_sample;
  op.box_stride[0] = boxes_per_sample * 4;
  op.score_stride[1] = op.candidate_stride[1] = op.box_stride[2] = 1;
  op.box_stride[1] = 4;
  op.scores = scores.data();
  op.boxes = boxes.data();
  op.candidates = candidates.data();
  op.threshold = 0.25;
  op.indices = indices.data();
  op.valid = valid.data();
  for (const bool in_chunks : {false, true}) {
    launch(select_of_image<T, B>, static_cast<unsigned>(samples), kSelectThreads, 0, nullptr, op,
           Global<Accumulation<T>>(left.data()), in_chunks);
    digest.add(indices);
    digest.add(valid);
  }
}

void launches(Digest& digest) {
  run<float, float>(2, 1100, 3, 2, digest);
  run<double, double>(1, 7, 7, 3, digest);  // more than there are candidates
  run<__nv_bfloat16, float>(1, 40, 4, 1, digest);
  run<__half, __half>(2, 5, 3, 6, digest);
}

const Registration registration("select_boxes", launches);

}  // namespace
}  // namespace fgvc_ext::sanitizers
