// Sums over rows of values: of maps, of embeddings. Long rows are added up in blocks, so that they lose little, and in
// an order that only their length decides.
#pragma once

#include <cmath>

#include "../common/tiles.h"
#include "vector.h"

namespace fgvc_ext::FGVC_ISA {

// How `sum_of_terms` reads: whole vectors, or what is left of the row at its end.
struct WholeVectors {
  FGVC_INLINE Floats at(const float* row, int64_t i, float) { return load(row + i); }
};
struct RestOfRow {
  int64_t size;
  __attribute__((always_inline)) Floats at(const float* row, int64_t i, float fill) const {
    return load_within(row, i, size, fill);
  }
};

// Σ term(read, i) over the vectors of a row.
template <class Term>
FGVC_INLINE float sum_of_terms(int64_t size, Term term) {
  constexpr int64_t kPair = 2 * kLanes, kPairsPerBlock = 32;
  Floats total = {};
  int64_t i = 0;
  while (size - i >= kPair) {
    const int64_t stop = i + smaller((size - i) / kPair, kPairsPerBlock) * kPair;
    Floats even = {}, odd = {};  // two chains, so that neither waits for itself
    for (; i < stop; i += kPair) {
      even += term(WholeVectors{}, i);
      odd += term(WholeVectors{}, i + kLanes);
    }
    total += even + odd;
  }
  for (; i < size; i += kLanes) total += term(RestOfRow{size}, i);
  return sum(total);
}

FGVC_INLINE float row_sum(const float* a, int64_t size) {
  return sum_of_terms(size, [&](auto read, int64_t i) { return read.at(a, i, 0.f); });
}
FGVC_INLINE float row_dot(const float* a, const float* b, int64_t size) {
  return sum_of_terms(size, [&](auto read, int64_t i) { return read.at(a, i, 0.f) * read.at(b, i, 0.f); });
}
// Σ ((a − mean) / scale)²
FGVC_INLINE float row_square_deviation(const float* a, float mean, float scale, int64_t size) {
  return sum_of_terms(size, [&](auto read, int64_t i) {
    const Floats x = (read.at(a, i, mean) - mean) / scale;
    return x * x;
  });
}
// Σ (a − b)²
FGVC_INLINE float row_square_distance(const float* a, const float* b, int64_t size) {
  return sum_of_terms(size, [&](auto read, int64_t i) {
    const Floats x = read.at(a, i, 0.f) - read.at(b, i, 0.f);
    return x * x;
  });
}

FGVC_INLINE double row_sum(const double* a, int64_t size) {
  double total = 0;
  for (int64_t i = 0; i < size; ++i) total += a[i];
  return total;
}
FGVC_INLINE double row_dot(const double* a, const double* b, int64_t size) {
  double total = 0;
  for (int64_t i = 0; i < size; ++i) total += a[i] * b[i];
  return total;
}
FGVC_INLINE double row_square_deviation(const double* a, double mean, double scale, int64_t size) {
  double total = 0;
  for (int64_t i = 0; i < size; ++i) total += ((a[i] - mean) / scale) * ((a[i] - mean) / scale);
  return total;
}
FGVC_INLINE double row_square_distance(const double* a, const double* b, int64_t size) {
  double total = 0;
  for (int64_t i = 0; i < size; ++i) total += (a[i] - b[i]) * (a[i] - b[i]);
  return total;
}

// Whether all values are equal; false where one is NaN.
template <class Value>
FGVC_INLINE bool row_is_constant(const Value* a, int64_t size) {
  for (int64_t i = 0; i < size; ++i)
    if (!(a[i] == a[0])) return false;
  return true;
}

}  // namespace fgvc_ext::FGVC_ISA
