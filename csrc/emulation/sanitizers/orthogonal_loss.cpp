#include "../../cuda/orthogonal_loss.cuh"

#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

template <class T>
void run(int64_t teachers, int64_t samples, int64_t positions, Digest& digest) {
  using Value = Accumulation<T>;
  const auto student = numbers<T>(samples * positions, 9);
  const auto teacher_maps = numbers<Value>(teachers * samples * positions, 10), grad = numbers<Value>(1, 11);
  std::vector<Value> losses(samples), gradient(student.size()), loss(1);
  std::vector<T> grad_student(student.size());

  OrthogonalLoss op{};
  op.samples = samples;
  op.positions = positions;
  op.teachers = teachers;
  op.student = student.data();
  op.teacher_maps = teacher_maps.data();
  op.losses = losses.data();
  op.gradient = gradient.data();
  launch(orthogonal_sample<T>, static_cast<unsigned>(samples), kOrthogonalThreads, 0, nullptr, op);
  launch(sum_losses<Value>, 1, kLossThreads, 0, nullptr, Global<const Value>(losses.data()), samples, Value(1),
         Global<const Value>(nullptr), Value(1), Global<Value>(loss.data()));

  LossGradient backward{};
  backward.losses = 1;
  backward.values = static_cast<int64_t>(gradient.size());
  backward.grads[0] = grad.data();
  backward.gradients = gradient.data();
  backward.output = grad_student.data();
  launch(scale_gradients<T>, blocks_for(backward.values, kLossThreads), kLossThreads, 0, nullptr, backward);

  digest.add(losses);
  digest.add(gradient);
  digest.add(loss);
  digest.add(grad_student);
}

void launches(Digest& digest) {
  run<float>(3, 4, 196, digest);
  run<double>(1, 2, 42, digest);
  run<__nv_bfloat16>(2, 3, 1, digest);
  run<__half>(1, 1, 300, digest);
}

const Registration registration("orthogonal_loss", launches);

}  // namespace
}  // namespace fgvc_ext::sanitizers
