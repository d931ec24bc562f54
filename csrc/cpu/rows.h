// Sums over rows of values: of maps, of embeddings. Long rows are added up in blocks, so that they lose little, and in
// an order that only their length decides.
#pragma once

#include <cmath>

#include "../common/tiles.h"
#include "vector.h"

namespace fgvc_ext::FGVC_ISA {

// --- vectors of float and of double, as wide as a register ---

typedef double Doubles __attribute__((vector_size(4 * kLanes)));

template <class Value>
struct VectorOf {
  using Type = Floats;
};
template <>
struct VectorOf<double> {
  using Type = Doubles;
};
template <class Value>
using Vector = typename VectorOf<Value>::Type;
template <class Value>
constexpr int64_t kLanesOf = 4 * kLanes / static_cast<int64_t>(sizeof(Value));

FGVC_INLINE Doubles load(const double* from) {
  Doubles x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
FGVC_INLINE Doubles load_partial(const double* from, int64_t count, double fill) {
  Doubles x = fill - Doubles{};
  for (int64_t i = 0; i < count; ++i) x[i] = from[i];
  return x;
}
FGVC_INLINE double sum(Doubles x) {
  for (int width = kLanesOf<double> / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

FGVC_INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}
FGVC_INLINE Doubles tanh(Doubles x) {
  for (int i = 0; i < kLanesOf<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

// --- how rows are read and written: whole vectors, and what is left of the row at its end ---

struct WholeVectors {
  template <class T>
  FGVC_INLINE auto at(const T* row, int64_t i, Accumulation<T>) {
    return load(row + i);
  }
  template <class Value>
  FGVC_INLINE void put(Value* row, int64_t i, Vector<Value> x) {
    store(row + i, x);
  }
};
struct RestOfRow {
  int64_t size;
  template <class T>
  __attribute__((always_inline)) auto at(const T* row, int64_t i, Accumulation<T> fill) const {
    return load_partial(row + i, size - i, fill);
  }
  template <class Value>
  __attribute__((always_inline)) void put(Value* row, int64_t i, Vector<Value> x) const {
    std::memcpy(row + i, &x, (size - i) * sizeof(Value));
  }
};

// Calls take(how, i) for the vectors of a row.
template <class Value, class Take>
FGVC_INLINE void for_each_vector(int64_t size, Take take) {
  int64_t i = 0;
  for (; i + kLanesOf<Value> <= size; i += kLanesOf<Value>) take(WholeVectors{}, i);
  if (i < size) take(RestOfRow{size}, i);
}

// Terms of two sums that are added up together.
template <class Value>
struct Two {
  Vector<Value> first, second;
  __attribute__((always_inline)) Two operator+(const Two& other) const {
    return {first + other.first, second + other.second};
  }
  __attribute__((always_inline)) void operator+=(const Two& other) { *this = *this + other; }
};
template <class Value>
struct TwoSums {
  Value first, second;
};
template <class Value>
FGVC_INLINE TwoSums<Value> sum(const Two<Value>& x) {
  return {sum(x.first), sum(x.second)};
}

// Σ term(how, i) over the vectors of a row; a term is a vector, or two of them.
template <class Value, class Term>
FGVC_INLINE auto sum_of_terms(int64_t size, Term term) {
  constexpr int64_t kStep = kLanesOf<Value>, kPair = 2 * kStep, kPairsPerBlock = 32;
  using Terms = decltype(term(WholeVectors{}, int64_t{0}));
  Terms total = {};
  int64_t i = 0;
  while (size - i >= kPair) {
    const int64_t stop = i + smaller((size - i) / kPair, kPairsPerBlock) * kPair;
    Terms even = {}, odd = {};  // two chains, so that neither waits for itself
    for (; i < stop; i += kPair) {
      even += term(WholeVectors{}, i);
      odd += term(WholeVectors{}, i + kStep);
    }
    total += even + odd;
  }
  if (size - i >= kStep) {
    total += term(WholeVectors{}, i);
    i += kStep;
  }
  if (i < size) total += term(RestOfRow{size}, i);
  return sum(total);
}

// --- sums ---

template <class Value>
FGVC_INLINE Value row_sum(const Value* a, int64_t size) {
  return sum_of_terms<Value>(size, [&](auto how, int64_t i) { return how.at(a, i, 0); });
}
template <class Value>
FGVC_INLINE Value row_dot(const Value* a, const Value* b, int64_t size) {
  return sum_of_terms<Value>(size, [&](auto how, int64_t i) { return how.at(a, i, 0) * how.at(b, i, 0); });
}
// Σ a and Σ a b
template <class Value>
FGVC_INLINE TwoSums<Value> row_sum_and_dot(const Value* a, const Value* b, int64_t size) {
  return sum_of_terms<Value>(size, [&](auto how, int64_t i) {
    const Vector<Value> x = how.at(a, i, 0);
    return Two<Value>{x, x * how.at(b, i, 0)};
  });
}
// Σ (a − b)²
template <class Value>
FGVC_INLINE Value row_square_distance(const Value* a, const Value* b, int64_t size) {
  return sum_of_terms<Value>(size, [&](auto how, int64_t i) {
    const Vector<Value> x = how.at(a, i, 0) - how.at(b, i, 0);
    return x * x;
  });
}

}  // namespace fgvc_ext::FGVC_ISA
