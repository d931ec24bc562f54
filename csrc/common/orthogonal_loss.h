// Orthogonal loss, knowledge transfer eq. 2–5: what its kernels take, and what both host sides check and allocate.
#pragma once

#include "loss_gradient.h"

namespace fgvc_ext {

struct OrthogonalLoss {
  Dtype dtype;  // of the student's map
  int64_t samples, positions, teachers;
  const void* student;       // [N,H·W], dtype
  const void* teacher_maps;  // [T,N,H·W], accumulation type
  void* losses;              // [N], accumulation type: the sample's share of the loss
  void* gradient;            // [N,H·W], accumulation type
};

}  // namespace fgvc_ext

#ifndef FGVC_KERNELS_ONLY
#include "checks.h"

namespace fgvc_ext {

// A call's results, what it reads, and the kernel's arguments, which point into both.
struct OrthogonalLossCall {
  Tensor loss, gradient, losses, student, teachers;
  OrthogonalLoss op;
};

inline OrthogonalLossCall prepare_orthogonal_loss(const Tensor& student_map, const Tensor& teacher_maps) {
  const Checks check("orthogonal_loss");
  check.floating("student_map", student_map, 3);
  check.floating("teacher_maps", teacher_maps, 4);
  const int64_t samples = student_map.size(0), height = student_map.size(1), width = student_map.size(2);
  const int64_t teachers = teacher_maps.size(0);
  check.that(height > 0 && width > 0, "student_map must have H and W of at least 1");
  check.that(height <= INT32_MAX / width, "student_map must have maps of at most 2^31 - 1 positions");
  check.that(teachers > 0, "teacher_maps must hold at least one teacher");
  check.beside("teacher_maps", teacher_maps, student_map, {teachers, samples, height, width});
  const ScalarType dtype = accumulation(student_map);
  const Tensor student = as_dense(student_map), wide_teachers = *as_accumulation(teacher_maps, student_map);
  Tensor loss = empty(student_map, {}, dtype), losses = empty(student_map, {samples}, dtype);
  Tensor gradient = empty(student_map, {1, samples, height, width}, dtype);
  const OrthogonalLoss op{.dtype = dtype_of(student_map),
                          .samples = samples,
                          .positions = height * width,
                          .teachers = teachers,
                          .student = student.const_data_ptr(),
                          .teacher_maps = wide_teachers.const_data_ptr(),
                          .losses = losses.mutable_data_ptr(),
                          .gradient = gradient.mutable_data_ptr()};
  return {loss, gradient, losses, student, wide_teachers, op};
}

}  // namespace fgvc_ext
#endif
