// Products of matrices whose rows of both factors lie along the result's sides: Σ_k a[k][i] · b[k][j], in squares of
// 64 × 64. Their sums have an order that does not depend on who computes them, which a library's have not.
#pragma once

#include "rows.h"

namespace fgvc_ext::FGVC_ISA {

constexpr int64_t kPanel = 64;  // rows and columns of a square
constexpr int64_t kPanelDepth =
    32;  // of k at once: two panels stay in the first-level cache, sums of so few lose little
constexpr int kProductRows = kLanes >= 16 ? 8 : 4, kProductColumns = 2;  // held in registers; columns in vectors

// Copies `columns` ≤ 64 of `depth` rows, zeros behind them.
template <class Value>
FGVC_INLINE void pack_panel(const Value* from, int64_t pitch, int64_t depth, int64_t columns, Value* panel) {
  for (int64_t k = 0; k < depth; ++k, from += pitch, panel += kPanel) {
    if (columns == kPanel) {
      for (int64_t i = 0; i < kPanel; ++i) panel[i] = from[i];
    } else {
      for (int64_t i = 0; i < kPanel; ++i) panel[i] = i < columns ? from[i] : Value(0);
    }
  }
}

// result[i][j] += Σ_k a[k][i] · b[k][j] for two panels of `depth` rows.
template <class Value>
static __attribute__((noinline)) void add_product(const Value* a, const Value* b, int64_t depth, Value* result,
                                                  int64_t pitch) {
  constexpr int64_t kWidth = kProductColumns * kLanesOf<Value>;
  for (int64_t j = 0; j < kPanel; j += kWidth)
    for (int64_t i = 0; i < kPanel; i += kProductRows) {
      Vector<Value> sums[kProductRows][kProductColumns] = {};
      for (int64_t k = 0; k < depth; ++k) {
        Vector<Value> y[kProductColumns];
        for (int c = 0; c < kProductColumns; ++c) y[c] = load(b + k * kPanel + j + c * kLanesOf<Value>);
        for (int r = 0; r < kProductRows; ++r) {
          const Vector<Value> x = a[k * kPanel + i + r] - Vector<Value>{};
          for (int c = 0; c < kProductColumns; ++c) sums[r][c] = multiply_add(x, y[c], sums[r][c]);
        }
      }
      for (int r = 0; r < kProductRows; ++r)
        for (int c = 0; c < kProductColumns; ++c) {
          Value* to = result + (i + r) * pitch + j + c * kLanesOf<Value>;
          store(to, load(to) + sums[r][c]);
        }
    }
}

}  // namespace fgvc_ext::FGVC_ISA
