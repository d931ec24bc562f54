// Greedy non-maximum suppression with a fixed number of results, dual attention fusion section 3.3: as many rounds as
// results. Each finds the highest of the scores that are left and takes away those of boxes that overlap its box.
#pragma once

#include "../common/select_boxes.h"
#include "rows.h"
#include "scratch.h"

namespace fgvc_ext::FGVC_ISA {

// A box, or one a lane.
template <class V>
struct Corners {
  V x1, y1, x2, y2;
};

template <class V>
FGVC_INLINE V area_of(const Corners<V>& box) {
  return (box.x2 - box.x1) * (box.y2 - box.y1);
}

// Whether their intersection over union exceeds the threshold, which a NaN and the 0/0 of an empty union do not.
template <class V>
FGVC_INLINE auto overlaps(const Corners<V>& a, const Corners<V>& b, V area_of_a, V threshold) {
  const V zero = {};
  V width = (a.x2 < b.x2 ? a.x2 : b.x2) - (a.x1 > b.x1 ? a.x1 : b.x1);
  V height = (a.y2 < b.y2 ? a.y2 : b.y2) - (a.y1 > b.y1 ? a.y1 : b.y1);
  width = width > 0 ? width : zero;
  height = height > 0 ? height : zero;
  const V intersection = width * height;
  return intersection / (area_of_a + area_of(b) - intersection) > threshold;
}

// kLanes boxes that stand one after the other.
FGVC_INLINE Corners<Floats> load_boxes(const float* from) {
  Ints even, odd;
  for (int i = 0; i < kLanes; ++i) {
    even[i] = 2 * i;
    odd[i] = 2 * i + 1;
  }
  const Floats a = load(from), b = load(from + kLanes), c = load(from + 2 * kLanes), d = load(from + 3 * kLanes);
  const Floats x_ab = __builtin_shuffle(a, b, even), x_cd = __builtin_shuffle(c, d, even);
  const Floats y_ab = __builtin_shuffle(a, b, odd), y_cd = __builtin_shuffle(c, d, odd);
  return {__builtin_shuffle(x_ab, x_cd, even), __builtin_shuffle(y_ab, y_cd, even), __builtin_shuffle(x_ab, x_cd, odd),
          __builtin_shuffle(y_ab, y_cd, odd)};
}

// What is not to be selected has −∞ in the row of scores that are left, and what has been selected NaN.
template <class Value>
constexpr Value kOut = -static_cast<Value>(__builtin_inff());
template <class Value>
constexpr Value kTaken = static_cast<Value>(__builtin_nanf(""));

template <class Value>
FGVC_INLINE void suppress(const Value* boxes, int64_t count, int64_t selected, Value threshold, Value* left) {
  const Value* own = boxes + 4 * selected;
  const Corners<Value> box{own[0], own[1], own[2], own[3]};
  const Value area = area_of(box);
  int64_t i = 0;
  if constexpr (sizeof(Value) == 4) {
    const Corners<Floats> wide{broadcast(box.x1), broadcast(box.y1), broadcast(box.x2), broadcast(box.y2)};
    const Floats wide_area = broadcast(area), wide_threshold = broadcast(threshold), out = broadcast(kOut<float>);
    for (; i + kLanes <= count; i += kLanes) {
      const Floats scores = load(left + i);
      if (!greater_bits(scores, out)) continue;
      const auto close = overlaps(wide, load_boxes(boxes + 4 * i), wide_area, wide_threshold) & (scores > out);
      store(left + i, close ? out : scores);
    }
  }
  for (; i < count; ++i) {
    const Value* other = boxes + 4 * i;
    if (!(left[i] > kOut<Value>)) continue;
    if (overlaps(box, Corners<Value>{other[0], other[1], other[2], other[3]}, area, threshold)) left[i] = kOut<Value>;
  }
}

// The first of the highest scores that are left; −1 where none is.
template <class Value>
FGVC_INLINE int64_t highest(const Value* left, int64_t count) {
  Value most = kOut<Value>;
  int64_t at = -1, i = 0;
  if constexpr (sizeof(Value) == 4) {
    Floats most_of_lane = broadcast(kOut<float>);
    for (; i + kLanes <= count; i += kLanes) most_of_lane = maximum(load(left + i), most_of_lane);
    for (int lane = 0; lane < kLanes; ++lane) most = most_of_lane[lane] > most ? most_of_lane[lane] : most;
    if (most > kOut<Value>) {
      for (at = 0; !equal_bits(load(left + at), broadcast(most));) at += kLanes;
      at += __builtin_ctz(equal_bits(load(left + at), broadcast(most)));
    }
  }
  for (; i < count; ++i)
    if (left[i] > most) most = left[i], at = i;
  return at;
}

// One image's scores, of any strides.
template <class T>
struct RawScores {
  const T* scores;
  const uint8_t* candidates;
  int64_t score_step, candidate_step;

  __attribute__((always_inline)) Accumulation<T> at(int64_t i) const { return to_float(scores[i * score_step]); }
  __attribute__((always_inline)) bool is_candidate(int64_t i) const {
    return candidates[i * candidate_step] && at(i) > kOut<Accumulation<T>>;
  }
};

template <class T, class Value>
FGVC_INLINE void candidate_scores(const RawScores<T>& raw, int64_t count, Value* left) {
  int64_t i = 0;
  if constexpr (sizeof(T) <= 4) {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
    const bool side_by_side = raw.score_step == 1 && raw.candidate_step == 1;
    for (; side_by_side && i + kLanes <= count; i += kLanes) {
      Bytes candidates;
      std::memcpy(&candidates, raw.candidates + i, sizeof(candidates));
      const Floats scores = load(raw.scores + i), out = broadcast(kOut<float>);
      const Ints counts = (__builtin_convertvector(candidates, Ints) != 0) & (scores > out);  // a NaN does not
      store(left + i, counts ? scores : out);
    }
  }
  for (; i < count; ++i) left[i] = raw.is_candidate(i) ? raw.at(i) : kOut<Value>;
}

// Among those that are candidates or among those that are not: the next by score, and among equals by number, after one
// with `score` and number `after`. What has been taken does not count. −1 where there is none.
template <class T, class Value>
FGVC_INLINE int64_t next_by_score(const RawScores<T>& raw, const Value* left, int64_t count, bool candidates,
                                  Value score, int64_t after) {
  int64_t at = -1;
  Value most = kOut<Value>;
  for (int64_t i = 0; i < count; ++i) {
    if (left[i] != left[i] || raw.is_candidate(i) != candidates) continue;
    const Value own = raw.at(i) > kOut<Value> ? raw.at(i) : kOut<Value>;
    if (own < score || (own == score && i > after))
      if (at < 0 || own > most) most = own, at = i;
  }
  return at;
}

// Rows of boxes: in place, or gathered.
template <class B, class Value>
FGVC_INLINE const Value* box_rows(const SelectBoxes& op, int64_t sample, Value* gathered) {
  const B* boxes = static_cast<const B*>(op.boxes) + sample * op.box_stride[0];
  if constexpr (sizeof(B) == sizeof(Value))
    if (!gathered) return boxes;
  for (int64_t i = 0; i < op.boxes_per_sample; ++i)
    for (int64_t side = 0; side < 4; ++side)
      gathered[4 * i + side] = to_float(boxes[i * op.box_stride[1] + side * op.box_stride[2]]);
  return gathered;
}

template <class T, class B>
FGVC_INLINE void select_of_samples(const SelectBoxes& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  const int64_t count = op.boxes_per_sample;
  const bool in_place = sizeof(B) == sizeof(Value) && op.box_stride[2] == 1 && op.box_stride[1] == 4;
  auto* left = scratch.take<Value>(count);
  auto* gathered = in_place ? nullptr : scratch.take<Value>(4 * count);
  const Value threshold = static_cast<Value>(op.threshold);
  for (int64_t sample = begin; sample < end; ++sample) {
    const RawScores<T> raw{static_cast<const T*>(op.scores) + sample * op.score_stride[0],
                           op.candidates + sample * op.candidate_stride[0], op.score_stride[1], op.candidate_stride[1]};
    int64_t found = sample * op.top;
    const int64_t all = found + op.top;
    const auto take = [&](int64_t number, bool valid) {
      left[number] = kTaken<Value>;
      op.indices[found] = number;
      op.valid[found++] = valid;
    };

    candidate_scores(raw, count, left);
    const Value* boxes = box_rows<B>(op, sample, gathered);
    for (int64_t at; found < all && (at = highest(left, count)) >= 0;) {
      take(at, true);
      if (found < all) suppress(boxes, count, at, threshold, left);
    }
    const auto fill_up = [&](bool candidates) {
      Value score = -kOut<Value>;
      for (int64_t at = -1; found < all && (at = next_by_score(raw, left, count, candidates, score, at)) >= 0;) {
        score = raw.at(at) > kOut<Value> ? raw.at(at) : kOut<Value>;
        take(at, false);
      }
    };
    fill_up(true);
    fill_up(false);
  }
}

// Boxes have the scores' dtype, or float beside half.
template <class T>
FGVC_INLINE void select_beside(const SelectBoxes& op, int64_t begin, int64_t end, Scratch& scratch) {
  if (op.boxes_dtype == op.dtype) return select_of_samples<T, T>(op, begin, end, scratch);
  select_of_samples<T, Accumulation<T>>(op, begin, end, scratch);
}

void select_boxes(const SelectBoxes& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, select_beside<T>(op, begin, end, scratch));
}

}  // namespace fgvc_ext::FGVC_ISA
