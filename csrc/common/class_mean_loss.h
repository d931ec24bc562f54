// Class-mean embedding loss, ELoPE eq. 5–12: what its kernels take, and what both host sides check and allocate.
#pragma once

#include "loss_gradient.h"

namespace fgvc_ext {

struct ClassMeanLoss {
  Dtype dtype, means_dtype;  // of embeddings; of class_means and batch_means
  int64_t samples, size, classes;
  int64_t embedding_stride[2], means_stride[2];
  const void* embeddings;   // [N,E]
  const int64_t* labels;    // [N]
  const void* class_means;  // [C,E]
  double alpha, margin, gamma;
  bool normalize;

  // The samples ordered by class: those of group g are order[start[g]] … order[start[g + 1] − 1], in ascending order.
  int64_t groups;
  const int64_t *order, *start;

  // Accumulation type:
  void* features;          // [N,E], f: the embeddings, of length one where they are normalised
  void* lengths;           // [2,N]: ‖scale · embedding‖, and the scale; ones where nothing is normalised
  void* means;             // [groups,E], μ^t
  void *within, *between;  // [groups]: Σ ‖f − μ^t‖² of each class, Σ max(m − d², 0)² over its pairs with later classes
  void* gradients;         // [2,N,E]: of L_w and of L_b to the embeddings
  void* batch_means;       // [N,E], means_dtype
};

}  // namespace fgvc_ext

#ifndef FGVC_KERNELS_ONLY
#include "checks.h"

namespace fgvc_ext {

// A call's results, what it reads and works in, and the kernel's arguments, which point into them. What depends on the
// labels (groups, order, start, means, within, between) is the host's to fill in.
struct ClassMeanLossCall {
  Tensor within, between, batch_means, gradients, labels, features, lengths;
  ClassMeanLoss op;
};

inline ClassMeanLossCall prepare_class_mean_loss(const Tensor& embeddings, const Tensor& labels,
                                                 const Tensor& class_means, double alpha, double margin, double gamma,
                                                 bool normalize) {
  const Checks check("class_mean_loss");
  check.floating("embeddings", embeddings, 2);
  check.floating("class_means", class_means, 2);
  const int64_t samples = embeddings.size(0), size = embeddings.size(1), classes = class_means.size(0);
  check.input("labels", labels, embeddings, ScalarType::Long, {samples});
  check.beside("class_means", class_means, embeddings, {classes, size});
  const ScalarType dtype = accumulation(embeddings);
  const Tensor dense_labels = as_dense(labels);
  Tensor within = empty(embeddings, {}, dtype), between = empty(embeddings, {}, dtype);
  Tensor batch_means = empty(class_means, {samples, size}), gradients = empty(embeddings, {2, samples, size}, dtype);
  Tensor features = empty(embeddings, {samples, size}, dtype), lengths = empty(embeddings, {2, samples}, dtype);
  const ClassMeanLoss op{.dtype = dtype_of(embeddings),
                         .means_dtype = dtype_of(class_means),
                         .samples = samples,
                         .size = size,
                         .classes = classes,
                         .embedding_stride = {embeddings.stride(0), embeddings.stride(1)},
                         .means_stride = {class_means.stride(0), class_means.stride(1)},
                         .embeddings = embeddings.const_data_ptr(),
                         .labels = dense_labels.const_data_ptr<int64_t>(),
                         .class_means = class_means.const_data_ptr(),
                         .alpha = alpha,
                         .margin = margin,
                         .gamma = gamma,
                         .normalize = normalize,
                         .groups = 0,
                         .order = nullptr,
                         .start = nullptr,
                         .features = features.mutable_data_ptr(),
                         .lengths = lengths.mutable_data_ptr(),
                         .means = nullptr,
                         .within = nullptr,
                         .between = nullptr,
                         .gradients = gradients.mutable_data_ptr(),
                         .batch_means = batch_means.mutable_data_ptr()};
  return {within, between, batch_means, gradients, dense_labels, features, lengths, op};
}

}  // namespace fgvc_ext
#endif
