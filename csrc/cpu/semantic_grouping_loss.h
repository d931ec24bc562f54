// Semantic grouping loss (deep bilinear transformation): k · Σ_ij (co_ij − gt_ij)², where co is the mean over the
// samples of the products of the channels' directions Z.
//
// Forward writes Z with the channels side by side. co is symmetric: of its squares of 64 × 64 those on and above the
// diagonal are computed, each by one task, and a square's share of the loss with it. Backward takes 64 channels of a
// sample at a time, whose gradient depends on all channels: dZ = (4k/N) R Z, and dU = (dZ − Z <Z, dZ>) / |V|.
#pragma once

#include <cmath>

#include "../common/semantic_grouping_loss.h"
#include "maps.h"
#include "products.h"

namespace fgvc_ext::FGVC_ISA {

static_assert(kPanel == kGroupingSquare);

template <class T>
FGVC_INLINE void directions_of_tiles(const GroupingDirections& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  const Layout4& layout = op.layout;
  const int64_t positions = layout.positions(), at_once = channels_at_once(op.dtype, layout);
  auto* gathered = take_rows<Value>(scratch, op.dtype, layout);
  auto* rows = scratch.take<Value>(at_once * row_pitch(positions));
  for (int64_t number = begin; number < end; ++number) {
    const Tile whole = tile_at(layout, number);
    for (int64_t done = 0; done < whole.channels; done += at_once) {
      const Tile tile{whole.sample, whole.channel + done, smaller(at_once, whole.channels - done)};
      int64_t from_pitch;
      const int64_t pitch = row_pitch(positions);
      const Value* from = tile_rows(static_cast<const T*>(op.features), layout, tile, gathered, from_pitch);
      for (int64_t c = 0; c < tile.channels; ++c) {
        const Value *x = from + c * from_pitch, offset = static_cast<Value>(kGroupingOffset);
        const Value squares = sum_of_terms<Value>(positions, [&](auto how, int64_t i) {
          const Vector<Value> v = how.at(x, i, -offset) + offset;
          return v * v;
        });
        // A length that overflows has no direction: NaN, where dividing by infinity would give zeros.
        const Value finite = squares + static_cast<Value>(kGroupingLengthEpsilon);
        const Value length = std::sqrt(finite - finite == 0 ? finite : finite - finite);
        static_cast<Value*>(op.lengths)[tile.sample * layout.channels + tile.channel + c] = length;
        for_each_vector<Value>(
            positions, [&](auto how, int64_t i) { how.put(rows + c * pitch, i, (how.at(x, i, 0) + offset) / length); });
      }
      write_tile_rows(rows, pitch, op.directions_layout, tile, static_cast<Value*>(op.directions));
    }
  }
}

// The square at row i and column j ≥ i, of squares numbered row by row.
FGVC_INLINE void square_at(int64_t number, int64_t per_side, int64_t& i, int64_t& j) {
  for (i = 0; number >= per_side - i; ++i) number -= per_side - i;
  j = i + number;
}

template <class Value>
FGVC_INLINE void residuals_of_squares(const GroupingCorrelations& op, int64_t begin, int64_t end, Scratch& scratch) {
  const GroupingResidual& of = op.residual;
  const int64_t channels = of.channels, per_side = ceil_divide(channels, kPanel);
  auto* a = scratch.take<Value>(kPanelDepth * kPanel);
  auto* b = scratch.take<Value>(kPanelDepth * kPanel);
  auto* products = scratch.take<Value>(kPanel * kPanel);
  for (int64_t number = begin; number < end; ++number) {
    int64_t row, column;
    square_at(number, per_side, row, column);
    const int64_t i0 = row * kPanel, j0 = column * kPanel;
    const int64_t rows = smaller(kPanel, channels - i0), columns = smaller(kPanel, channels - j0);
    for (int64_t i = 0; i < kPanel * kPanel; ++i) products[i] = 0;
    for (int64_t done = 0; done < op.depth; done += kPanelDepth) {
      const Value* directions = static_cast<const Value*>(op.directions) + done * channels;
      const int64_t depth = smaller(kPanelDepth, op.depth - done);
      pack_panel(directions + i0, channels, depth, rows, a);
      if (row != column) pack_panel(directions + j0, channels, depth, columns, b);
      add_product(a, row == column ? a : b, depth, products, kPanel);
    }
    auto* residual = static_cast<Value*>(of.residual);
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t group = (i0 + i) / of.per_group, first = group * of.per_group, past = first + of.per_group;
      double of_row = 0;
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t at = j0 + j;
        const Value together = at >= first && at < past ? Value(1) : Value(0);
        const Value r = products[i * kPanel + j] / static_cast<Value>(of.divisor) - together;
        residual[(i0 + i) * channels + at] = r;
        residual[at * channels + i0 + i] = r;
        of_row += static_cast<double>(r) * r;
      }
      total += of_row;
    }
    static_cast<Value*>(of.losses)[number] = static_cast<Value>(total * (row == column ? 1 : 2));
  }
}

template <class T>
FGVC_INLINE void gradients_of_channels(const GroupingGradient& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  const Layout4& layout = op.directions_layout;
  const int64_t channels = layout.channels, positions = layout.positions(), blocks = ceil_divide(channels, kPanel);
  const int64_t pitch = ceil_divide(positions, kPanel) * kPanel;
  auto* a = scratch.take<Value>(kPanelDepth * kPanel);
  auto* b = scratch.take<Value>(kPanelDepth * kPanel);
  auto* products = scratch.take<Value>(kPanel * pitch);
  const auto* residual = static_cast<const Value*>(op.residual);
  for (int64_t number = begin; number < end; ++number) {
    const int64_t sample = number / blocks, first = (number - sample * blocks) * kPanel;
    const int64_t count = smaller(kPanel, channels - first), row = layout.stride[1];
    const Value* directions = static_cast<const Value*>(op.directions) + layout.offset(sample, 0);
    for (int64_t i = 0; i < kPanel * pitch; ++i) products[i] = 0;
    for (int64_t done = 0; done < channels; done += kPanelDepth) {
      const int64_t depth = smaller(kPanelDepth, channels - done);
      pack_panel(residual + done * channels + first, channels, depth, count, a);
      for (int64_t at = 0; at < positions; at += kPanel) {
        pack_panel(directions + done * row + at, row, depth, smaller(kPanel, positions - at), b);
        add_product(a, b, depth, products + at, pitch);
      }
    }
    const Value factor = static_cast<Value>(op.factor) * static_cast<const Value*>(op.grad)[0];
    for (int64_t c = 0; c < count; ++c) {
      Value* dz = products + c * pitch;
      const Value* z = directions + (first + c) * row;
      const Value along = row_dot<Value>(dz, z, positions);
      const Value slope = factor / static_cast<const Value*>(op.lengths)[sample * channels + first + c];
      for_each_vector<Value>(positions, [&](auto how, int64_t i) {
        how.put(dz, i, (how.at(dz, i, 0) - how.at(z, i, 0) * along) * slope);
      });
    }
    write_tile_rows(products, pitch, op.grad_layout, Tile{sample, first, count}, static_cast<T*>(op.grad_features));
  }
}

void semantic_grouping_directions(const GroupingDirections& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, directions_of_tiles<T>(op, begin, end, scratch));
}
void semantic_grouping_loss(const GroupingCorrelations& op, int64_t begin, int64_t end, Scratch& scratch) {
  if (op.residual.dtype == Dtype::float64) {
    residuals_of_squares<double>(op, begin, end, scratch);
  } else {
    residuals_of_squares<float>(op, begin, end, scratch);
  }
}
void semantic_grouping_loss_backward(const GroupingGradient& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, gradients_of_channels<T>(op, begin, end, scratch));
}

}  // namespace fgvc_ext::FGVC_ISA
