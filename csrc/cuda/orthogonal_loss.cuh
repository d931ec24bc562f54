// Orthogonal loss, knowledge transfer eq. 2–5: one block per sample. It adds up |z| over the teachers where the
// gradient will stand, then turns that into the sample's share of the loss and into the gradient to the student's map.
#pragma once

#include "../common/orthogonal_loss.h"
#include "loss_gradient.cuh"

namespace fgvc_ext::cuda {

constexpr int kOrthogonalThreads = 128;

template <class Value>
__device__ __forceinline__ Value magnitude(Value x) {
  return x < 0 ? -x : x;
}

// z(x) = (x − mean) / deviation, eq. 2. The mean is found twice, the second time of what the first one left, so that a
// map far from zero keeps its digits. The largest |x − mean| is divided out before squaring: z does not depend on the
// map's scale, and so the squares of small and of large maps are finite.
template <class Value>
struct Normalisation {
  bool constant;  // z = 0: such a map has no direction
  Value mean, left, largest, deviation;

  __device__ Value centred(Value x) const { return (x - mean) - left; }
  __device__ Value operator()(Value x) const { return constant ? Value(0) : centred(x) / largest / deviation; }
};

// Σ term(x) over the map. All threads of the block must call.
template <class T, class Term>
__device__ Accumulation<T> sum_over(const Global<const T>& map, unsigned positions, Term term) {
  Accumulation<T> total = 0;
  for (unsigned i = threadIdx.x; i < positions; i += kOrthogonalThreads) total += term(widen(map.load(i)));
  return block_reduce<kOrthogonalThreads>(total, Sum());
}

template <class T>
__device__ Normalisation<Accumulation<T>> normalisation_of(const Global<const T>& map, unsigned positions) {
  using Value = Accumulation<T>;
  const Value first = widen(map.load(0u)), count = static_cast<Value>(positions);
  Normalisation<Value> z{};
  z.constant = sum_over(map, positions, [&](Value x) { return x == first ? Value(0) : Value(1); }) == 0;
  z.mean = sum_over(map, positions, [&](Value x) { return x; }) / count;
  z.left = sum_over(map, positions, [&](Value x) { return x - z.mean; }) / count;
  Value largest = 0;
  for (unsigned i = threadIdx.x; i < positions; i += kOrthogonalThreads)
    largest = Larger()(magnitude(z.centred(widen(map.load(i)))), largest);
  z.largest = block_reduce<kOrthogonalThreads>(largest, Larger());
  const Value squares = sum_over(map, positions, [&](Value x) {
    const Value scaled = z.centred(x) / z.largest;
    return scaled * scaled;
  });
  z.deviation = static_cast<Value>(sqrt(squares / count));
  return z;
}

template <class T>
__global__ void __launch_bounds__(kOrthogonalThreads) orthogonal_sample(OrthogonalLoss op) {
  using Value = Accumulation<T>;
  const auto positions = static_cast<unsigned>(op.positions);
  const int64_t sample = blockIdx.x, first = sample * op.positions;
  const auto student = Global<const T>(op.student).from(first);
  const auto gradient = Global<Value>(op.gradient).from(first);
  const Value maps = static_cast<Value>(op.teachers) * static_cast<Value>(op.samples),
              count = static_cast<Value>(positions);

  for (int64_t teacher = 0; teacher < op.teachers; ++teacher) {
    const auto map = Global<const Value>(op.teacher_maps).from((teacher * op.samples + sample) * op.positions);
    const auto z = normalisation_of<Value>(map, positions);
    for (unsigned i = threadIdx.x; i < positions; i += kOrthogonalThreads) {
      const Value before = teacher == 0 ? Value(0) : gradient.load(i);
      gradient.store(i, before + magnitude(z(map.load(i))));
    }
  }

  const auto z = normalisation_of<T>(student, positions);
  Value total = 0, mean = 0, projection = 0;
  for (unsigned i = threadIdx.x; i < positions; i += kOrthogonalThreads) {
    const Value at = z(widen(student.load(i))), weight = gradient.load(i) / (maps * count);
    const Value active = at <= 0 ? Value(0) : weight;
    total += weight * (at <= 0 ? Value(0) : at);  // a NaN of either stays one
    mean += active;
    projection += active * at;
    gradient.store(i, active);
  }
  total = block_reduce<kOrthogonalThreads>(total, Sum());
  mean = block_reduce<kOrthogonalThreads>(mean, Sum()) / count;
  projection = block_reduce<kOrthogonalThreads>(projection, Sum()) / count;
  for (unsigned i = threadIdx.x; i < positions; i += kOrthogonalThreads) {
    const Value along = gradient.load(i) - mean - z(widen(student.load(i))) * projection;
    gradient.store(i, z.constant ? Value(0) : along / z.deviation / z.largest);
  }
  if (threadIdx.x == 0) Global<Value>(op.losses).store(sample, total);
}

}  // namespace fgvc_ext::cuda
