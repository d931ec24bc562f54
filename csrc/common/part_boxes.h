// The terms of the losses of part proposals, and their derivatives; one for CPU and CUDA. Of internal linkage: no
// instruction set may be given another's by the linker.
//
// What has no derivative in a point has that of torch: half for each of two equal edges, none at a side of zero.
#pragma once

#include <cmath>

#include "layout.h"
#include "part_box_losses.h"

namespace fgvc_ext {

template <class Value>
struct PartBox {
  Value x1, y1, x2, y2;
};

// max(x, 0); a NaN stays one.
template <class Value>
static inline FGVC_HOST_DEVICE Value positive(Value x) {
  return x <= 0 ? Value(0) : x;
}

// The larger and the smaller of two edges; a NaN wins.
template <class Value>
static inline FGVC_HOST_DEVICE Value later_edge(Value a, Value b) {
  return a > b || a != a ? a : b;
}
template <class Value>
static inline FGVC_HOST_DEVICE Value earlier_edge(Value a, Value b) {
  return a < b || a != a ? a : b;
}

// What of a derivative with respect to one of two edges is that of this one.
template <class Value>
static inline FGVC_HOST_DEVICE Value share(Value derivative, bool other_counts, bool equal) {
  return other_counts ? Value(0) : equal ? derivative / 2 : derivative;
}

// |B|; a box whose sides cross has none.
template <class Value>
static inline FGVC_HOST_DEVICE Value area_of(const PartBox<Value>& box) {
  return positive(box.x2 - box.x1) * positive(box.y2 - box.y1);
}

// Adds `factor` times the derivative of the box's area.
template <class Value>
static inline FGVC_HOST_DEVICE void add_area_derivative(const PartBox<Value>& box, Value factor,
                                                        PartBox<Value>& gradient) {
  const Value width = box.x2 - box.x1, height = box.y2 - box.y1;
  const Value of_width = width <= 0 ? Value(0) : factor * positive(height);
  const Value of_height = height <= 0 ? Value(0) : factor * positive(width);
  gradient.x1 -= of_width;
  gradient.x2 += of_width;
  gradient.y1 -= of_height;
  gradient.y2 += of_height;
}

// |A ∩ B| / (|A| + |B|); adds `factor` times its derivative to A. Two boxes without an area do not overlap.
template <class Value>
static inline FGVC_HOST_DEVICE Value overlap_of(const PartBox<Value>& a, const PartBox<Value>& b, Value factor,
                                                bool detach_denominator, PartBox<Value>& gradient) {
  const Value width = earlier_edge(a.x2, b.x2) - later_edge(a.x1, b.x1);
  const Value height = earlier_edge(a.y2, b.y2) - later_edge(a.y1, b.y1);
  const Value sum = area_of(a) + area_of(b), total = sum == 0 ? Value(1) : sum;
  const Value overlap = positive(width) * positive(height) / total;

  const Value of_width = width <= 0 ? Value(0) : factor / total * positive(height);
  const Value of_height = height <= 0 ? Value(0) : factor / total * positive(width);
  gradient.x1 -= share(of_width, a.x1 < b.x1, a.x1 == b.x1);
  gradient.x2 += share(of_width, a.x2 > b.x2, a.x2 == b.x2);
  gradient.y1 -= share(of_height, a.y1 < b.y1, a.y1 == b.y1);
  gradient.y2 += share(of_height, a.y2 > b.y2, a.y2 == b.y2);
  if (!detach_denominator && sum != 0) add_area_derivative(a, -factor * (overlap / total), gradient);
  return overlap;
}

// How far a ratio of areas is from one, and the derivative.
template <class Value>
struct AreaTerm {
  Value distance, slope;
};
template <class Value>
static inline FGVC_HOST_DEVICE AreaTerm<Value> area_term(AreaMode mode, Value ratio) {
  using std::log;
  const Value excess = ratio - 1, sign = excess > 0 ? Value(1) : excess < 0 ? Value(-1) : Value(0);
  if (mode == AreaMode::two_sided) return {excess < 0 ? -excess : excess, sign};
  if (mode == AreaMode::hinge) return {positive(excess), excess <= 0 ? Value(0) : Value(1)};
  const Value logarithm = log(ratio);
  return {logarithm < 0 ? -logarithm : logarithm, ratio == 0 ? Value(0) : sign / ratio};
}

// max(S/N, least); a NaN stays one.
template <class Value>
static inline FGVC_HOST_DEVICE Value part_area(Value object_area, Value parts, Value least) {
  const Value area = object_area / parts;
  return area < least ? least : area;
}

}  // namespace fgvc_ext
