// Spatial attention map, knowledge transfer eq. 1: M = mean_c(g_c · F_c) with g_c = mean_p F_c(p).
//
// A task takes the channels of one group of one sample. Their means are found while they are read from memory; the
// second look, which weighs them, finds them in the cache. Backward needs two numbers per channel, g_c and
// Σ_q dM(q) F_c(q), for which it reads the features once; what it writes follows from them and from dM.
#pragma once

#include <type_traits>

#include "../common/spatial_attention_map.h"
#include "maps.h"
#include "rows.h"

namespace fgvc_ext::FGVC_ISA {

// The channels of one group of one sample.
template <class Op>
FGVC_INLINE Tile group_at(const Op& op, int64_t number) {
  const int64_t sample = number / op.groups, channel = (number - sample * op.groups) * op.channels_per_group;
  return {sample, channel, smaller(op.channels_per_group, op.layout.channels - channel)};
}

// Rows that are looked at twice should still be in the first-level cache the second time. Where not even two fit, two
// are taken all the same: the sums, which are as long as a row, are then read and written half as often.
constexpr int64_t kCachedBytes = 32768;

FGVC_INLINE int64_t rows_at_once(Dtype dtype, const Layout4& layout) {
  const int64_t bytes = dtype == Dtype::float64 ? sizeof(double) : sizeof(float);
  const int64_t fit = kCachedBytes / (row_pitch(layout.positions()) * bytes);
  return smaller(fit < 2 ? 2 : fit, channels_at_once(dtype, layout));
}

template <class T>
FGVC_INLINE void widen_row(const T* from, int64_t size, Accumulation<T>* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = to_float(from[i]);
}

// Whether the vectors below can hold the channels of a position.
template <class T>
FGVC_INLINE bool takes_interleaved(const Layout4& layout) {
  return sizeof(T) <= 4 && layout.channels_are_contiguous() && !layout.map_is_contiguous();
}

// --- maps in rows ---

// sums[p] += Σ_c gains[c] · rows[c][p] over `Rows` rows.
template <int Rows, class Value>
FGVC_INLINE void add_weighted(const Value* rows, int64_t pitch, int64_t positions, const Value* gains, Value* sums) {
  Vector<Value> gain[Rows];
  for (int row = 0; row < Rows; ++row) gain[row] = gains[row] - Vector<Value>{};
  for_each_vector<Value>(positions, [&](auto how, int64_t i) {
    Vector<Value> even = {}, odd = {};  // two chains, so that neither waits for itself
    for (int row = 0; row < Rows; ++row) (row % 2 ? odd : even) += gain[row] * how.at(rows + row * pitch, i, 0);
    how.put(sums, i, how.at(sums, i, 0) + (even + odd));
  });
}

// The same for any number of rows.
template <class Value>
static __attribute__((noinline)) void add_weighted_rows(const Value* rows, int64_t pitch, int64_t count,
                                                        int64_t positions, const Value* gains, Value* sums) {
  constexpr int kRows = 8;
  int64_t row = 0;
  for (; row + kRows <= count; row += kRows)
    add_weighted<kRows>(rows + row * pitch, pitch, positions, gains + row, sums);
  for (; row < count; ++row) add_weighted<1>(rows + row * pitch, pitch, positions, gains + row, sums);
}

template <class T>
FGVC_INLINE void weigh_rows(const SpatialAttentionMap& op, const Tile& group, Accumulation<T>* gathered,
                            Accumulation<T>* sums) {
  using Value = Accumulation<T>;
  const int64_t positions = op.layout.positions(), at_once = rows_at_once(op.dtype, op.layout);
  for (int64_t i = 0; i < positions; ++i) sums[i] = 0;
  for (int64_t done = 0; done < group.channels; done += at_once) {
    const Tile tile{group.sample, group.channel + done, smaller(at_once, group.channels - done)};
    int64_t pitch;
    const Value* rows = tile_rows(static_cast<const T*>(op.features), op.layout, tile, gathered, pitch);
    Value gains[kTile];
    for (int64_t row = 0; row < tile.channels; ++row)
      gains[row] = row_sum(rows + row * pitch, positions) / static_cast<Value>(positions);
    add_weighted_rows(rows, pitch, tile.channels, positions, gains, sums);
  }
}

// --- interleaved channels: one channel per lane ---

constexpr int kVectorsAtOnce = 8;  // of neighbouring channels

template <class T>
FGVC_INLINE Floats load_channels(const T* from, int64_t count) {
  return count >= kLanes ? load(from) : load_partial(from, count < 0 ? 0 : count, 0.f);
}

// Calls take(position, vectors) for every position of up to `Vectors` vectors of channels; `Whole` if they are all
// full.
template <int Vectors, bool Whole, class T, class Take>
FGVC_INLINE void for_each_position(const Layout4& layout, const T* base, int64_t channels, Take take) {
  for (int64_t y = 0, position = 0; y < layout.height; ++y)
    for (int64_t x = 0; x < layout.width; ++x, ++position) {
      const T* from = base + y * layout.stride[2] + x * layout.stride[3];
      Floats values[Vectors];
      for (int v = 0; v < Vectors; ++v)
        values[v] = Whole ? load(from + v * kLanes) : load_channels(from + v * kLanes, channels - v * kLanes);
      take(position, values);
    }
}

// Σ_p F_c(p) and, where `Weighted`, Σ_p weights[p] F_c(p): a lane per channel, added up in blocks of positions.
template <bool Weighted, int Vectors, bool Whole, class T>
FGVC_INLINE void sum_channels(const Layout4& layout, const T* base, int64_t channels, const float* weights,
                              Floats* sums, Floats* weighted) {
  constexpr int64_t kBlock = 64;
  Floats block[Vectors] = {}, weighted_block[Vectors] = {};
  for (int v = 0; v < Vectors; ++v) {
    sums[v] = Floats{};
    if constexpr (Weighted) weighted[v] = Floats{};
  }
  const auto close = [&] {
    for (int v = 0; v < Vectors; ++v) {
      sums[v] += block[v];
      block[v] = Floats{};
      if constexpr (Weighted) {
        weighted[v] += weighted_block[v];
        weighted_block[v] = Floats{};
      }
    }
  };
  for_each_position<Vectors, Whole>(layout, base, channels, [&](int64_t position, const Floats values[Vectors]) {
    if (position % kBlock == 0) close();
    for (int v = 0; v < Vectors; ++v) {
      block[v] += values[v];
      if constexpr (Weighted) weighted_block[v] += weights[position] * values[v];
    }
  });
  close();
}

// Calls take(number, whole) with constants: how many vectors hold the channels, rounded up to a power of two, and
// whether the channels fill eight of them, which is what most layers have.
template <class Take>
FGVC_INLINE void with_vectors(int64_t channels, Take take) {
  static_assert(kVectorsAtOnce == 8);
  if (channels == 8 * kLanes) {
    take(std::integral_constant<int, 8>{}, std::true_type{});
  } else if (channels <= kLanes) {
    take(std::integral_constant<int, 1>{}, std::false_type{});
  } else if (channels <= 2 * kLanes) {
    take(std::integral_constant<int, 2>{}, std::false_type{});
  } else if (channels == 4 * kLanes) {
    take(std::integral_constant<int, 4>{}, std::true_type{});
  } else if (channels <= 4 * kLanes) {
    take(std::integral_constant<int, 4>{}, std::false_type{});
  } else {
    take(std::integral_constant<int, 8>{}, std::false_type{});
  }
}

// A function for each number of vectors: in one for all of them, the compiler leaves the loops' bodies as calls.
// And one more for whole vectors: it does not take that question out of the loop.
template <int Vectors, bool Whole, class T>
static __attribute__((noinline)) void weigh_vectors(const Layout4& layout, const T* base, int64_t channels,
                                                    float* sums) {
  Floats gains[Vectors];
  sum_channels<false, Vectors, Whole>(layout, base, channels, nullptr, gains, nullptr);
  for (int v = 0; v < Vectors; ++v) gains[v] /= static_cast<float>(layout.positions());
  for_each_position<Vectors, Whole>(layout, base, channels, [&](int64_t position, const Floats values[Vectors]) {
    Floats total = gains[0] * values[0];
    for (int v = 1; v < Vectors; ++v) total += gains[v] * values[v];
    sums[position] += sum(total);
  });
}

template <class T>
static __attribute__((noinline)) void weigh_interleaved(const SpatialAttentionMap& op, const Tile& group, float* sums) {
  const Layout4& layout = op.layout;
  for (int64_t i = 0; i < layout.positions(); ++i) sums[i] = 0;
  for (int64_t done = 0; done < group.channels; done += kVectorsAtOnce * kLanes) {
    const T* base = static_cast<const T*>(op.features) + layout.offset(group.sample, group.channel + done);
    const int64_t channels = smaller(kVectorsAtOnce * kLanes, group.channels - done);
    with_vectors(channels, [&](auto number, auto whole) {
      weigh_vectors<decltype(number)::value, decltype(whole)::value>(layout, base, channels, sums);
    });
  }
}

// --- forward ---

template <class T>
FGVC_INLINE void attention_groups(const SpatialAttentionMap& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  auto* gathered = take_rows<Value>(scratch, op.dtype, op.layout);
  for (int64_t number = begin; number < end; ++number) {
    const Tile group = group_at(op, number);
    Value* sums = static_cast<Value*>(op.sums) + number * op.layout.positions();
    if constexpr (sizeof(T) <= 4) {
      if (takes_interleaved<T>(op.layout)) {
        weigh_interleaved<T>(op, group, sums);
        continue;
      }
    }
    weigh_rows<T>(op, group, gathered, sums);
  }
}

// The sum over the groups, in their order, divided by C.
template <class T>
FGVC_INLINE void attention_totals(const SpatialAttentionMap& op, int64_t begin, int64_t end) {
  using Value = Accumulation<T>;
  const int64_t positions = op.layout.positions();
  for (int64_t sample = begin; sample < end; ++sample) {
    const Value* sums = static_cast<const Value*>(op.sums) + sample * op.groups * positions;
    T* map = static_cast<T*>(op.map) + sample * positions;
    for (int64_t i = 0; i < positions; ++i) {
      Value total = sums[i];
      for (int64_t group = 1; group < op.groups; ++group) total += sums[group * positions + i];
      map[i] = from_float<T>(total / static_cast<Value>(op.layout.channels));
    }
  }
}

// --- backward: dF_c(p) = slope[c] · dM(p) + offset[c] ---

template <class T>
FGVC_INLINE void slopes_of_rows(const SpatialAttentionMapBackward& op, const Tile& group, const Accumulation<T>* grad,
                                Accumulation<T>* gathered, Accumulation<T>* slope, Accumulation<T>* offset) {
  using Value = Accumulation<T>;
  const int64_t positions = op.layout.positions(), at_once = rows_at_once(op.dtype, op.layout);
  for (int64_t done = 0; done < group.channels; done += at_once) {
    const Tile tile{group.sample, group.channel + done, smaller(at_once, group.channels - done)};
    int64_t pitch;
    const Value* rows = tile_rows(static_cast<const T*>(op.features), op.layout, tile, gathered, pitch);
    for (int64_t row = 0; row < tile.channels; ++row) {
      const auto sums = row_sum_and_dot(rows + row * pitch, grad, positions);
      slope[done + row] = sums.first;
      offset[done + row] = sums.second;
    }
  }
}

template <int Vectors, bool Whole, class T>
static __attribute__((noinline)) void slopes_of_vectors(const Layout4& layout, const T* base, int64_t channels,
                                                        const float* grad, float* slope, float* offset) {
  Floats sums[Vectors], weighted[Vectors];
  sum_channels<true, Vectors, Whole>(layout, base, channels, grad, sums, weighted);
  std::memcpy(slope, sums, sizeof(sums));
  std::memcpy(offset, weighted, sizeof(weighted));
}

template <class T>
static __attribute__((noinline)) void slopes_of_interleaved(const SpatialAttentionMapBackward& op, const Tile& group,
                                                            const float* grad, float* slope, float* offset) {
  for (int64_t done = 0; done < group.channels; done += kVectorsAtOnce * kLanes) {
    const T* base = static_cast<const T*>(op.features) + op.layout.offset(group.sample, group.channel + done);
    const int64_t channels = smaller(kVectorsAtOnce * kLanes, group.channels - done);
    with_vectors(channels, [&](auto number, auto whole) {
      slopes_of_vectors<decltype(number)::value, decltype(whole)::value>(op.layout, base, channels, grad, slope + done,
                                                                         offset + done);
    });
  }
}

template <class T>
FGVC_INLINE void write_row(Accumulation<T> slope, Accumulation<T> offset, const Accumulation<T>* grad,
                           int64_t positions, T* to) {
  for (int64_t i = 0; i < positions; ++i) to[i] = from_float<T>(slope * grad[i] + offset);
}

template <class T>
FGVC_INLINE void write_gradient(const SpatialAttentionMapBackward& op, const Tile& group, const Accumulation<T>* grad,
                                const Accumulation<T>* slope, const Accumulation<T>* offset) {
  const Layout4& layout = op.grad_layout;
  T* base = static_cast<T*>(op.grad_features) + layout.offset(group.sample, group.channel);
  if (layout.map_is_contiguous()) {
    for (int64_t c = 0; c < group.channels; ++c)
      write_row<T>(slope[c], offset[c], grad, layout.positions(), base + c * layout.stride[1]);
    return;
  }
  for (int64_t y = 0, position = 0; y < layout.height; ++y)
    for (int64_t x = 0; x < layout.width; ++x, ++position) {
      T* at = base + y * layout.stride[2] + x * layout.stride[3];
      const Accumulation<T> g = grad[position];
      if (layout.channels_are_contiguous()) {
        for (int64_t c = 0; c < group.channels; ++c) at[c] = from_float<T>(slope[c] * g + offset[c]);
      } else {
        for (int64_t c = 0; c < group.channels; ++c) at[c * layout.stride[1]] = from_float<T>(slope[c] * g + offset[c]);
      }
    }
}

template <class T>
FGVC_INLINE void attention_gradients(const SpatialAttentionMapBackward& op, int64_t begin, int64_t end,
                                     Scratch& scratch) {
  using Value = Accumulation<T>;
  const int64_t positions = op.layout.positions(), channels = op.channels_per_group;
  auto* gathered = take_rows<Value>(scratch, op.dtype, op.layout);
  auto* grad = scratch.take<Value>(row_pitch(positions));
  auto* slope = scratch.take<Value>(channels + kVectorsAtOnce * kLanes);
  auto* offset = scratch.take<Value>(channels + kVectorsAtOnce * kLanes);
  int64_t sample = -1;
  for (int64_t number = begin; number < end; ++number) {
    const Tile group = group_at(op, number);
    if (group.sample != sample) {
      sample = group.sample;
      widen_row(static_cast<const T*>(op.grad) + sample * positions, positions, grad);
    }
    bool done = false;
    if constexpr (sizeof(T) <= 4) {
      done = takes_interleaved<T>(op.layout);
      if (done) slopes_of_interleaved<T>(op, group, grad, slope, offset);
    }
    if (!done) slopes_of_rows<T>(op, group, grad, gathered, slope, offset);
    const Value share = 1 / static_cast<Value>(op.layout.channels) / static_cast<Value>(positions);
    for (int64_t c = 0; c < group.channels; ++c) slope[c] *= share, offset[c] *= share;
    write_gradient<T>(op, group, grad, slope, offset);
  }
}

void spatial_attention_map(const SpatialAttentionMap& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, attention_groups<T>(op, begin, end, scratch));
}
void spatial_attention_map_total(const SpatialAttentionMap& op, int64_t begin, int64_t end, Scratch&) {
  FGVC_SWITCH_DTYPE(op.dtype, attention_totals<T>(op, begin, end));
}
void spatial_attention_map_backward(const SpatialAttentionMapBackward& op, int64_t begin, int64_t end,
                                    Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, attention_gradients<T>(op, begin, end, scratch));
}

}  // namespace fgvc_ext::FGVC_ISA
