// Greedy non-maximum suppression with a fixed number of results, dual attention fusion section 3.3: one block per
// image. A round for each result finds the highest of the scores that are left, and then takes away those of boxes that
// overlap its box. A thread looks at the same boxes in every round.
#pragma once

#include "../common/select_boxes.h"
#include "memory.cuh"
#include "reduction.cuh"

namespace fgvc_ext::cuda {

constexpr int kSelectThreads = 1024;
constexpr int kNoBox = INT32_MAX;

// One image's box, of which intersections over union are computed.
template <class Value>
struct Corners {
  Value x1, y1, x2, y2;

  // No product may be contracted with a sum: whether a box is suppressed can hang on its last bit.
  __device__ Value area() const { return rounded_product(x2 - x1, y2 - y1); }
  // Whether the intersection over union exceeds the threshold, which a NaN and the 0/0 of an empty union do not.
  __device__ bool overlaps(const Corners& other, Value threshold) const {
    const Value width = Larger()(Smaller()(x2, other.x2) - Larger()(x1, other.x1), Value(0));
    const Value height = Larger()(Smaller()(y2, other.y2) - Larger()(y1, other.y1), Value(0));
    const Value intersection = rounded_product(width, height);
    return intersection / (area() + other.area() - intersection) > threshold;
  }
};

template <class B>
struct SelectableBoxes {
  Global<const B> boxes;
  int64_t step, side_step;
  bool in_chunks;  // four numbers side by side, where one access may begin

  __device__ Corners<Accumulation<B>> at(int i) const {
    if (in_chunks) {
      const auto box = boxes.template load_chunk<4>(i * int64_t{4});
      return {widen(box.element[0]), widen(box.element[1]), widen(box.element[2]), widen(box.element[3])};
    }
    const auto box = boxes.from(i * step);
    return {widen(box.load(0)), widen(box.load(side_step)), widen(box.load(2 * side_step)),
            widen(box.load(3 * side_step))};
  }
};

// A box and what it is chosen by; the same for all threads of the block after `first_of_block`.
template <class Value>
struct Choice {
  Value score;
  int box;

  // Keeps the better one; a thread comes by in the order of the boxes.
  __device__ void consider(Value other_score, int other) {
    if (box == kNoBox || other_score > score) score = other_score, box = other;
  }
};
template <class Value>
__device__ Choice<Value> first_of_block(const Choice<Value>& own) {
  const Value highest = block_reduce<kSelectThreads>(own.score, Larger());
  return {highest, block_reduce<kSelectThreads>(own.score == highest ? own.box : kNoBox, Smaller())};
}

// One image. What is not to be selected has −∞ in the row of scores that are left, and what has been selected NaN.
template <class T, class B>
struct Selection {
  using Value = Accumulation<T>;
  Global<const T> scores;
  Global<const uint8_t> candidates;
  int64_t score_step, candidate_step;
  SelectableBoxes<B> boxes;
  Global<Value> left;
  int count;
  Value threshold;

  __device__ Value out() const { return -static_cast<Value>(INFINITY); }
  // NaN as −∞.
  __device__ Value score_of(int i) const {
    const Value score = widen(scores.load(i * score_step));
    return score > out() ? score : out();
  }
  __device__ bool is_candidate(int i, Value score) const {
    return candidates.load(i * candidate_step) != 0 && score > out();
  }

  // Calls use(i, choice) for the thread's boxes and gives the block's first.
  template <class Use>
  __device__ Choice<Value> choose(Use use) const {
    Choice<Value> own{out(), kNoBox};
    for (int64_t i = threadIdx.x; i < count; i += kSelectThreads) use(static_cast<int>(i), own);
    return first_of_block(own);
  }

  __device__ Choice<Value> first_candidate() const {
    return choose([&](int i, Choice<Value>& own) {
      const Value score = score_of(i);
      const bool counts = is_candidate(i, score);
      left.store(i, counts ? score : out());
      if (counts) own.consider(score, i);
    });
  }
  __device__ Choice<Value> next_candidate(int selected) const {
    const auto box = boxes.at(selected);
    return choose([&](int i, Choice<Value>& own) {
      const Value score = left.load(i);
      if (!(score > out())) return;
      if (i == selected) return take(i);
      if (box.overlaps(boxes.at(i), threshold)) return left.store(i, out());
      own.consider(score, i);
    });
  }
  // Among those that are candidates or among those that are not: the next by score, and among equals by number, after
  // one with `score` and number `after`. What has been taken does not count.
  __device__ Choice<Value> next_by_score(bool of_candidates, Value score, int after) const {
    return choose([&](int i, Choice<Value>& own) {
      const Value kept = left.load(i), other = score_of(i);
      if (kept != kept || is_candidate(i, other) != of_candidates) return;
      if (other < score || (other == score && i > after)) own.consider(other, i);
    });
  }
  __device__ void take(int i) const { left.store(i, static_cast<Value>(NAN)); }
};

template <class T, class B>
__global__ void __launch_bounds__(kSelectThreads)
    select_of_image(SelectBoxes op, Global<Accumulation<T>> left, bool boxes_in_chunks) {
  using Value = Accumulation<T>;
  const int64_t sample = blockIdx.x;
  const Selection<T, B> selection{
      Global<const T>(op.scores).from(sample * op.score_stride[0]),
      Global<const uint8_t>(op.candidates).from(sample * op.candidate_stride[0]),
      op.score_stride[1],
      op.candidate_stride[1],
      {Global<const B>(op.boxes).from(sample * op.box_stride[0]), op.box_stride[1], op.box_stride[2], boxes_in_chunks},
      left.from(sample * op.boxes_per_sample),
      static_cast<int>(op.boxes_per_sample),
      static_cast<Value>(op.threshold)};
  int64_t found = sample * op.top;
  const int64_t all = found + op.top;
  const auto write = [&](int box, bool valid) {
    if (threadIdx.x == 0) {
      Global<int64_t>(op.indices).store(found, static_cast<int64_t>(box));
      Global<uint8_t>(op.valid).store(found, static_cast<uint8_t>(valid));
    }
    ++found;
  };

  for (auto best = selection.first_candidate(); best.box != kNoBox; best = selection.next_candidate(best.box)) {
    write(best.box, true);
    if (found == all) return;
  }
  for (int of_candidates = 1; of_candidates >= 0; --of_candidates) {
    auto best = selection.next_by_score(of_candidates != 0, static_cast<Value>(INFINITY), -1);
    for (; best.box != kNoBox; best = selection.next_by_score(of_candidates != 0, best.score, best.box)) {
      write(best.box, false);
      if (found == all) return;
    }
  }
}

}  // namespace fgvc_ext::cuda
