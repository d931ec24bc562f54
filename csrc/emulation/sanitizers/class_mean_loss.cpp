#include "../../cuda/class_mean_loss.cuh"

#include "launches.h"

namespace fgvc_ext::sanitizers {
namespace {

using namespace cuda;

template <class T, class M>
void run(int64_t samples, int64_t size, int64_t classes, bool normalize, Digest& digest) {
  using Value = Accumulation<T>;
  const auto embeddings = numbers<T>(samples * size, 14);
  const auto class_means = numbers<M>(classes * size, 15);
  std::vector<int64_t> labels;
  for (int64_t row = 0; row < samples; ++row) labels.push_back(row * 5 % classes);
  labels.back() = classes;  // a wrong label
  std::vector<Value> features(samples * size), lengths(2 * samples), gradients(2 * samples * size);
  std::vector<Value> means(samples * size), residuals(samples * size), pulls(samples * size), rows(2 * samples);
  std::vector<Value> pairs(1), losses(2);
  std::vector<M> batch_means(samples * size);
  std::vector<int32_t> lead(samples), count(samples);

  ClassMeanLoss op{};
  op.samples = samples;
  op.size = size;
  op.classes = classes;
  op.embedding_stride[0] = op.means_stride[0] = size;
  op.embedding_stride[1] = op.means_stride[1] = 1;
  op.embeddings = embeddings.data();
  op.labels = labels.data();
  op.class_means = class_means.data();
  op.alpha = 0.5;
  op.margin = 100;  // means of these numbers are far apart
  op.gamma = 16;
  op.normalize = normalize;
  op.features = features.data();
  op.lengths = lengths.data();
  op.gradients = gradients.data();
  op.batch_means = batch_means.data();
  const Global<Value> of_rows(rows.data());
  const ClassMeanWork<Value> work{Global<int32_t>(lead.data()), Global<int32_t>(count.data()),
                                  Global<Value>(means.data()),  Global<Value>(residuals.data()),
                                  Global<Value>(pulls.data()),  of_rows,
                                  of_rows.from(samples),        Global<Value>(pairs.data())};
  const auto blocks = static_cast<unsigned>(samples);
  launch(class_features<T>, blocks, kClassThreads, 0, nullptr, op, work);
  launch(cuda::class_means<T, M>, blocks, kClassThreads, 0, nullptr, op, work);
  launch(class_distances<T, M>, blocks, kClassThreads, 0, nullptr, op, work);
  launch(class_gradients<T>, blocks, kClassThreads, 0, nullptr, op, work);
  launch(sum_losses<Value>, 1, kLossThreads, 0, nullptr, Global<const Value>(work.between), samples, Value(1),
         Global<const Value>(work.pairs), Value(4), Global<Value>(losses.data()));

  digest.add(batch_means);
  digest.add(lead);
  digest.add(count);
  digest.add(rows);
  digest.add(losses);
}

void launches(Digest& digest) {
  run<float, float>(9, 33, 4, true, digest);
  run<double, double>(3, 5, 2, false, digest);
  run<__nv_bfloat16, float>(5, 130, 3, true, digest);
  run<__half, __half>(2, 1, 1, true, digest);
}

const Registration registration("class_mean_loss", launches);

}  // namespace
}  // namespace fgvc_ext::sanitizers
