// Every operator's schema: the table of contents. An operator <op> is registered by csrc/cpu/<op>.cpp and
// csrc/cuda/<op>.cu; its fake kernel, its autograd and its contract stand in fgvc_ext/ops/<op>.py.
#include "common/tensor.h"

STABLE_TORCH_LIBRARY(FGVC_NAMESPACE, m) {
  // Global k-max pooling (ELoPE, eq. 2–4) -> output, indices (int16, or int32 where wide), values
  m.def(
      "global_k_max_pool(Tensor features, SymInt k, Tensor? weight, bool keep_values, bool wide_indices=False) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "global_k_max_pool_backward(Tensor grad, Tensor indices, Tensor? values, Tensor? weight, SymInt[] size, "
      "SymInt[] stride, bool grad_features, bool grad_weight) -> (Tensor, Tensor)");

  // Diversification block (subtle differences, eq. 1–8) -> scores, bits; thresholds are probability · 2^32
  m.def(
      "diversify(Tensor maps, Tensor seed, int peak_threshold, int patch_threshold, SymInt patch_size, float alpha) "
      "-> (Tensor, Tensor)");
  m.def("diversify_backward(Tensor grad, Tensor bits, float alpha, SymInt[] size, SymInt[] stride) -> Tensor");
  m.def(
      "suppression_mask(Tensor maps, Tensor seed, int peak_threshold, int patch_threshold, SymInt patch_size) "
      "-> Tensor");

  // Gradient-boosting cross-entropy (subtle differences, eq. 9–14) -> loss, and [4,N] for backward: each row's highest
  // score, log Σ exp above it, t_k, weight in the loss; reduction: 0 none, 1 mean, 2 sum
  m.def(
      "gradient_boosting_cross_entropy(Tensor scores, Tensor target, SymInt k, int reduction, int ignore_index) "
      "-> (Tensor, Tensor)");
  m.def("gradient_boosting_cross_entropy_backward(Tensor grad, Tensor scores, Tensor target, Tensor rows) -> Tensor");

  // Spatial attention map (knowledge transfer, eq. 1) -> map [N,H,W]
  m.def("spatial_attention_map(Tensor features) -> Tensor");
  m.def("spatial_attention_map_backward(Tensor grad, Tensor features) -> Tensor");

  // Orthogonal loss (knowledge transfer, eq. 2–5) -> loss, and its gradient [1,N,H,W] to the student's map
  m.def("orthogonal_loss(Tensor student_map, Tensor teacher_maps) -> (Tensor, Tensor)");
  m.def("orthogonal_loss_backward(Tensor grad, Tensor gradients, ScalarType dtype) -> Tensor");

  // Class-mean embedding loss (ELoPE, eq. 5–12) -> within, between, batch_means, and [2,N,E]: the gradients of both
  // losses
  m.def(
      "class_mean_loss(Tensor embeddings, Tensor labels, Tensor class_means, float alpha, float margin, float gamma, "
      "bool normalize) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "class_mean_loss_backward(Tensor? grad_within, Tensor? grad_between, Tensor gradients, ScalarType dtype) "
      "-> Tensor");

  // Boxes around the hot part of heat maps (ELoPE, section 5) -> [N,4] x1, y1, x2, y2
  m.def(
      "heatmap_to_boxes(Tensor heatmaps, float threshold, SymInt image_height, SymInt image_width, float min_size) "
      "-> Tensor");

  // Location heat map (dual attention fusion, section 3.2) -> [N,1,H,W]
  m.def("location_heatmap(Tensor[] features, SymInt image_height, SymInt image_width) -> Tensor");

  // Greedy non-maximum suppression with a fixed number of results (dual attention fusion, section 3.3) -> indices and
  // valid [N,top]
  m.def(
      "select_boxes(Tensor scores, Tensor boxes, Tensor candidates, float iou_threshold, SymInt top) "
      "-> (Tensor, Tensor)");

  // Part images (dual attention fusion, section 3.3) -> [N,M,3,h,w]
  m.def(
      "compose_parts(Tensor images, Tensor boxes, Tensor seed, float blur_sigma, float noise_std, bool replace, "
      "SymInt part_height, SymInt part_width) -> Tensor");

  // Losses of part proposals (dual attention fusion, section 3.7.2) -> overlap, area, and [2,N,M,4]: the gradients of
  // both; area_mode: 0 two_sided, 1 hinge, 2 log
  m.def(
      "part_box_losses(Tensor boxes, Tensor valid, Tensor object_area, float iou_weight, SymInt parts, float min_area, "
      "int area_mode, bool detach_denominator) -> (Tensor, Tensor, Tensor)");
  m.def(
      "part_box_losses_backward(Tensor? grad_overlap, Tensor? grad_area, Tensor gradients, ScalarType dtype) "
      "-> Tensor");

  // Group bilinear pooling per position (deep bilinear transformation) -> [N,out_channels,H,W]
  m.def("group_bilinear(Tensor features, SymInt groups, Tensor? position, SymInt out_channels, float scale) -> Tensor");
  m.def(
      "group_bilinear_backward(Tensor grad, Tensor features, SymInt groups, Tensor? position, float scale) -> Tensor");

  // Semantic grouping loss (deep bilinear transformation) -> loss, and co - gt [C,C] for backward
  m.def("semantic_grouping_loss(Tensor features, SymInt groups) -> (Tensor, Tensor)");
  m.def("semantic_grouping_loss_backward(Tensor grad, Tensor features, Tensor residual) -> Tensor");
}
