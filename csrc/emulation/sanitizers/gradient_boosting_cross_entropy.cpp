#include "../../cuda/gradient_boosting_cross_entropy.cuh"

#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

template <class T, int Threads>
void run(int64_t samples, int64_t classes, int64_t k, Reduction reduction, Digest& digest) {
  using Value = Accumulation<T>;
  const auto scores = numbers<T>(samples * classes, 6);
  const auto grad = numbers<Value>(reduction == kNone ? samples : 1, 7);
  std::vector<int64_t> target;
  for (int64_t row = 0; row < samples; ++row) target.push_back(row * 5 % classes);
  target.back() = -100;
  if (samples > 2) target[1] = classes;  // a wrong label
  std::vector<Value> losses(samples), highest(samples), log_sum(samples), threshold(samples), loss(grad.size());
  std::vector<T> grad_scores(scores.size());

  GradientBoosting forward{};
  forward.classes = forward.row_stride = classes;
  forward.column_stride = 1;
  forward.scores = scores.data();
  forward.target = target.data();
  forward.k = k;
  forward.ignore_index = -100;
  forward.losses = losses.data();
  forward.highest = highest.data();
  forward.log_sum = log_sum.data();
  forward.threshold = threshold.data();
  launch(boosted_loss<T, Threads>, static_cast<unsigned>(samples), Threads, 0, nullptr, forward);
  launch(reduce_losses<Value>, 1, kReduceThreads, 0, nullptr, losses.data(), target.data(), samples,
         forward.ignore_index, reduction, loss.data());

  GradientBoostingBackward backward{};
  backward.forward = forward;
  backward.grad = grad.data();
  backward.grad_per_sample = reduction == kNone;
  backward.weight = losses.data();
  backward.grad_scores = grad_scores.data();
  backward.row_stride = classes;
  backward.column_stride = 1;
  launch(boosted_gradient<T, 256>, static_cast<unsigned>(samples), 256, 0, nullptr, backward);

  digest.add(losses);
  digest.add(highest);
  digest.add(log_sum);
  digest.add(threshold);
  digest.add(loss);
  digest.add(grad_scores);
}

}  // namespace

void gradient_boosting_cross_entropy(Digest& digest) {
  run<float, 32>(4, 10, 3, kMean, digest);
  run<float, 32>(1, 1, 1, kNone, digest);
  run<float, 256>(3, 700, 15, kSum, digest);
  run<double, 32>(2, 33, 32, kMean, digest);
  run<double, 256>(2, 300, 100, kNone, digest);
  run<__nv_bfloat16, 32>(3, 200, 15, kMean, digest);
  run<__half, 256>(3, 257, 2, kMean, digest);
}

}  // namespace fgvc_ext::sanitizers
