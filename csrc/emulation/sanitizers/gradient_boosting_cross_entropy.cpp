#include "../../cuda/gradient_boosting_cross_entropy.cuh"

#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

template <class T, int PerLane>
void by_warp(const GradientBoosting& op, int64_t samples) {
  launch(boosted_loss_of_warp<T, PerLane>, blocks_for(samples, kWarpsPerBlock), kRowThreads, 0, nullptr, op, samples);
}
template <class T>
void by_block(const GradientBoosting& op, int64_t samples) {
  launch(boosted_loss_of_block<T>, static_cast<unsigned>(samples), kRowThreads, 0, nullptr, op);
}

template <class T>
void run(void (*losses_of)(const GradientBoosting&, int64_t), int64_t samples, int64_t classes, int64_t k,
         Reduction reduction, Digest& digest) {
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
  forward.rows = {highest.data(), log_sum.data(), threshold.data(), losses.data()};
  losses_of(forward, samples);
  launch(reduce_losses<Value>, 1, kRowThreads, 0, nullptr, Global<Value>(losses.data()),
         Global<const int64_t>(target.data()), samples, forward.ignore_index, reduction, Global<Value>(loss.data()));

  GradientBoostingBackward backward{};
  backward.classes = backward.row_stride = backward.grad_row_stride = classes;
  backward.column_stride = backward.grad_column_stride = 1;
  backward.scores = scores.data();
  backward.target = target.data();
  backward.rows = forward.rows;
  backward.grad = grad.data();
  backward.grad_per_sample = reduction == kNone;
  backward.grad_scores = grad_scores.data();
  launch(boosted_gradient<T>, static_cast<unsigned>(samples), kRowThreads, 0, nullptr, backward);

  digest.add(losses);
  digest.add(highest);
  digest.add(log_sum);
  digest.add(threshold);
  digest.add(loss);
  digest.add(grad_scores);
}

void launches(Digest& digest) {
  run<float>(by_warp<float, 8>, 4, 10, 3, kMean, digest);
  run<float>(by_warp<float, 8>, 1, 1, 1, kNone, digest);
  run<float>(by_warp<float, 32>, 3, 700, 15, kSum, digest);
  run<float>(by_block<float>, 3, 1100, 15, kSum, digest);
  run<double>(by_warp<double, 8>, 9, 33, 32, kMean, digest);
  run<double>(by_warp<double, 32>, 2, 300, 100, kNone, digest);
  run<__nv_bfloat16>(by_warp<__nv_bfloat16, 8>, 3, 200, 15, kMean, digest);
  run<__half>(by_block<__half>, 3, 257, 2, kMean, digest);
}

const Registration registration("gradient_boosting_cross_entropy", launches);

}  // namespace
}  // namespace fgvc_ext::sanitizers
