// Group bilinear pooling (deep bilinear transformation): at every position T = tanh(scale · Σ_g a_g a_gᵀ) of the
// channels a_g of each group, resized to the output's channels.
//
// A task takes some neighbouring positions of one sample, which lie in the lanes of its vectors, with all their
// channels: what is computed of them stays in the cache, and features are read and the result is written once. T is
// symmetric: i ≤ k is computed. Backward computes T anew; with D the gradient of its values and
// S = scale · (D + Dᵀ)(1 − T²), the gradient of row g is a_g S.
#pragma once

#include "../common/group_bilinear.h"
#include "maps.h"
#include "rows.h"

namespace fgvc_ext::FGVC_ISA {

constexpr int kSide = 4;  // a square of products is computed in registers

// Some neighbouring positions of one sample.
struct PositionBlock {
  int64_t sample, line, first, count;

  FGVC_INLINE PositionBlock at(const PositionBlocks& blocks, int64_t number) {
    const int64_t line = number / blocks.per_line, first = (number - line * blocks.per_line) * blocks.at_once;
    const int64_t sample = line / blocks.lines;
    return {sample, line - sample * blocks.lines, first, smaller(blocks.at_once, blocks.length - first)};
  }
  // Its maps, each of them one row.
  __attribute__((always_inline)) Layout4 of(const Layout4& layout) const {
    const int64_t step = layout.positions_are_evenly_spaced() ? layout.position_step() : layout.stride[3];
    return {1, layout.channels, 1, count, {0, layout.stride[1], 0, step}};
  }
  __attribute__((always_inline)) int64_t offset(const Layout4& layout) const {
    const Layout4 row = of(layout);
    return sample * layout.stride[0] + line * layout.stride[2] + first * row.stride[3];
  }
};

// Rows of all channels at the block's positions, `pitch` apart. What lies behind the last position is no number of
// theirs, but may be read.
template <class T>
FGVC_INLINE const Accumulation<T>* block_rows(const void* data, const Layout4& layout, const PositionBlock& block,
                                              Accumulation<T>* scratch, int64_t& pitch) {
  const Layout4 row = block.of(layout);
  return tile_rows(static_cast<const T*>(data) + block.offset(layout), row, Tile{0, 0, layout.channels}, scratch,
                   pitch);
}

// Asks for the memory of a block, which lies in as many pieces as there are channels: too short ones for the processor
// to foresee.
template <class T, bool Written>
FGVC_INLINE void ask_for(const void* data, const Layout4& layout, const PositionBlock& block) {
  if (!layout.map_is_contiguous()) return;
  const char* piece = reinterpret_cast<const char*>(static_cast<const T*>(data) + block.offset(layout));
  const int64_t bytes = block.count * static_cast<int64_t>(sizeof(T));
  for (int64_t channel = 0; channel < layout.channels; ++channel, piece += layout.stride[1] * sizeof(T))
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(piece + at, Written, 2);
}

// a = features + position, [C][pitch].
template <class T>
FGVC_INLINE void read_features(const GroupBilinearInput& input, const PositionBlock& block, Accumulation<T>* values,
                               int64_t pitch) {
  using Value = Accumulation<T>;
  const auto* position = static_cast<const Value*>(input.position);
  int64_t from_pitch;
  const Value* rows = block_rows<T>(input.features, input.layout, block, values, from_pitch);
  if (rows == values && !position) return;
  for (int64_t channel = 0; channel < input.layout.channels; ++channel) {
    const Vector<Value> code = (position ? position[channel] : Value(0)) - Vector<Value>{};
    for_each_vector<Value>(block.count, [&](auto how, int64_t i) {
      const Vector<Value> x = how.at(rows + channel * from_pitch, i, 0);
      store(values + channel * pitch + i, position ? x + code : x);
    });
  }
}

// take(r, c, Σ_k a[r·row + k·step] · b[c·column + k·b_step]) for a square of Rows × Columns vectors.
template <int Rows, int Columns, class Value, class Take>
FGVC_INLINE void multiply_square(const Value* a, int64_t row, int64_t step, const Value* b, int64_t column,
                                 int64_t b_step, int64_t depth, Take take) {
  Vector<Value> sums[Rows][Columns] = {};
  for (int64_t k = 0; k < depth; ++k, a += step, b += b_step) {
    Vector<Value> x[Rows], y[Columns];
    for (int r = 0; r < Rows; ++r) x[r] = load(a + r * row);
    for (int c = 0; c < Columns; ++c) y[c] = load(b + c * column);
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Columns; ++c) sums[r][c] = multiply_add(x[r], y[c], sums[r][c]);
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Columns; ++c) take(r, c, sums[r][c]);
}

// The same from each of `rows` × `columns` products, squares where they fit. take(i, k, sum); `first_column(i)` is the
// first column that rows from i on need.
template <class Value, class FirstColumn, class Take>
FGVC_INLINE void multiply(const Value* a, int64_t rows, int64_t row, int64_t step, const Value* b, int64_t columns,
                          int64_t column, int64_t b_step, int64_t depth, FirstColumn first_column, Take take) {
  int64_t i = 0;
  const auto strip = [&](auto height) {
    constexpr int kRows = decltype(height)::value;
    int64_t k = first_column(i);
    for (; k + kSide <= columns; k += kSide)
      multiply_square<kRows, kSide>(a + i * row, row, step, b + k * column, column, b_step, depth,
                                    [&](int r, int c, Vector<Value> sum) { take(i + r, k + c, sum); });
    for (; k < columns; ++k)
      multiply_square<kRows, 1>(a + i * row, row, step, b + k * column, column, b_step, depth,
                                [&](int r, int, Vector<Value> sum) { take(i + r, k, sum); });
    i += kRows;
  };
  while (i + kSide <= rows) strip(std::integral_constant<int, kSide>{});
  while (i < rows) strip(std::integral_constant<int, 1>{});
}

// Calls take(upper, lower, T) for the vectors of T: where those of its two places lie, in rows `pitch` apart.
template <class Value, class Take>
FGVC_INLINE void for_each_response(const GroupBilinearInput& input, const Value* values, int64_t pitch, Take take) {
  const int64_t p = input.per_group;
  const Value scale = static_cast<Value>(input.scale);
  for (int64_t at = 0; at < pitch; at += kLanesOf<Value>) {
    const Value* a = values + at;
    multiply(
        a, p, pitch, p * pitch, a, p, pitch, p * pitch, input.groups, [](int64_t i) { return i; },
        [&](int64_t i, int64_t k, Vector<Value> sum) {
          if (k < i) return;  // the lower half of a square on the diagonal
          take((i * p + k) * pitch + at, (k * p + i) * pitch + at, tanh(sum * scale));
        });
  }
}

// T, [p·p][pitch].
template <class Value>
static __attribute__((noinline)) void compute_responses(const GroupBilinearInput& input, const Value* values,
                                                        int64_t pitch, Value* responses) {
  for_each_response(input, values, pitch, [&](int64_t upper, int64_t lower, Vector<Value> t) {
    store(responses + upper, t);
    store(responses + lower, t);
  });
}

// S, [p·p][pitch], in place of D.
template <class Value>
static __attribute__((noinline)) void compute_slopes(const GroupBilinearInput& input, const Value* values,
                                                     int64_t pitch, Value* gradient) {
  const Value scale = static_cast<Value>(input.scale);
  for_each_response(input, values, pitch, [&](int64_t upper, int64_t lower, Vector<Value> t) {
    const Vector<Value> slope = (load(gradient + upper) + load(gradient + lower)) * (1 - t * t) * scale;
    store(gradient + upper, slope);
    store(gradient + lower, slope);
  });
}

// Calls take(j, x, above) for every output j, which is (1 − above) · T[x] + above · T[x + 1], or T[x] alone.
template <class Value, class Take>
FGVC_INLINE void for_each_output(const Resize& resize, Take take) {
  for (int64_t j = 0; j < resize.channels; ++j) {
    int64_t rest;
    const int64_t x = resize.lower(j, rest);
    take(j, x, static_cast<Value>(rest) / static_cast<Value>(resize.steps()));
  }
}

template <class T>
FGVC_INLINE void pool_blocks(const GroupBilinear& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  const GroupBilinearInput& input = op.input;
  const Resize& resize = op.resize;
  const PositionBlocks blocks = blocks_of(op);
  auto* values = scratch.take<Value>(input.layout.channels * blocks.at_once);
  auto* responses = scratch.take<Value>(input.responses() * blocks.at_once);
  const bool same = resize.from == resize.channels;
  auto* resized = scratch.take<Value>(same ? 0 : resize.channels * blocks.at_once);
  for (int64_t number = begin; number < end; ++number) {
    const PositionBlock block = PositionBlock::at(blocks, number);
    const int64_t pitch = row_pitch(block.count);
    read_features<T>(input, block, values, pitch);
    ask_for<T, true>(op.output, op.output_layout, block);
    if (number + 1 < end) ask_for<T, false>(input.features, input.layout, PositionBlock::at(blocks, number + 1));
    compute_responses(input, values, pitch, responses);
    if (!same)
      for_each_output<Value>(resize, [&](int64_t j, int64_t x, Value above) {
        const Value *from = responses + x * pitch, below = 1 - above;
        for (int64_t i = 0; i < pitch; i += kLanesOf<Value>) {
          const Vector<Value> low = load(from + i);
          store(resized + j * pitch + i, above == 0 ? low : low * below + load(from + pitch + i) * above);
        }
      });
    write_tile_rows(same ? responses : resized, pitch, block.of(op.output_layout), Tile{0, 0, resize.channels},
                    static_cast<T*>(op.output) + block.offset(op.output_layout));
  }
}

// D, [p·p][pitch]: the gradient of T's values.
template <class T>
FGVC_INLINE void read_gradient(const GroupBilinearBackward& op, const PositionBlock& block, Accumulation<T>* gathered,
                               Accumulation<T>* gradient, int64_t pitch) {
  using Value = Accumulation<T>;
  int64_t from_pitch;
  const Value* rows = block_rows<T>(op.grad, op.grad_layout, block, gathered, from_pitch);
  // Outputs come in the order of the responses below them: rows up to `begun` have something, those behind nothing yet.
  int64_t begun = 0;
  const auto add = [&](int64_t x, Value share, const Value* row) {
    Value* to = gradient + x * pitch;
    for (; begun < x; ++begun)
      for (int64_t i = 0; i < pitch; ++i) gradient[begun * pitch + i] = 0;
    const bool first = begun == x;
    begun += first;
    for_each_vector<Value>(block.count, [&](auto how, int64_t i) {
      const Vector<Value> g = how.at(row, i, 0) * share;
      store(to + i, first ? g : load(to + i) + g);
    });
  };
  for_each_output<Value>(op.resize, [&](int64_t j, int64_t x, Value above) {
    add(x, 1 - above, rows + j * from_pitch);
    if (above != 0) add(x + 1, above, rows + j * from_pitch);
  });
  for (int64_t i = begun * pitch; i < op.resize.from * pitch; ++i) gradient[i] = 0;
}

// a_g S of every group, [C][pitch]. S is symmetric: its rows, which lie in one piece, are read for its columns.
template <class Value>
static __attribute__((noinline)) void multiply_by_slopes(const GroupBilinearInput& input, const Value* values,
                                                         const Value* slopes, int64_t pitch, Value* result) {
  const int64_t p = input.per_group;
  for (int64_t at = 0; at < pitch; at += kLanesOf<Value>)
    multiply(
        values + at, input.groups, p * pitch, pitch, slopes + at, p, p * pitch, pitch, p, [](int64_t) { return 0; },
        [&](int64_t group, int64_t i, Vector<Value> sum) { store(result + (group * p + i) * pitch + at, sum); });
}

template <class T>
FGVC_INLINE void gradient_blocks(const GroupBilinearBackward& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  const GroupBilinearInput& input = op.input;
  const PositionBlocks blocks = blocks_of(op);
  const int64_t channels = input.layout.channels;
  auto* values = scratch.take<Value>(channels * blocks.at_once);
  auto* gradient = scratch.take<Value>(input.responses() * blocks.at_once);
  // Once D is made of it, the gradient of the output makes room for that of the features.
  auto* rows = scratch.take<Value>((op.resize.channels > channels ? op.resize.channels : channels) * blocks.at_once);
  for (int64_t number = begin; number < end; ++number) {
    const PositionBlock block = PositionBlock::at(blocks, number);
    const int64_t pitch = row_pitch(block.count);
    read_features<T>(input, block, values, pitch);
    read_gradient<T>(op, block, rows, gradient, pitch);
    ask_for<T, true>(op.grad_features, op.grad_features_layout, block);
    if (number + 1 < end) {
      const PositionBlock next = PositionBlock::at(blocks, number + 1);
      ask_for<T, false>(input.features, input.layout, next);
      ask_for<T, false>(op.grad, op.grad_layout, next);
    }
    compute_slopes(input, values, pitch, gradient);
    multiply_by_slopes(input, values, gradient, pitch, rows);
    write_tile_rows(rows, pitch, block.of(op.grad_features_layout), Tile{0, 0, channels},
                    static_cast<T*>(op.grad_features) + block.offset(op.grad_features_layout));
  }
}

void group_bilinear(const GroupBilinear& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.input.dtype, pool_blocks<T>(op, begin, end, scratch));
}
void group_bilinear_backward(const GroupBilinearBackward& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.input.dtype, gradient_blocks<T>(op, begin, end, scratch));
}

}  // namespace fgvc_ext::FGVC_ISA
