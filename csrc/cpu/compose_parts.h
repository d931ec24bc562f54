// Part images, dual attention fusion section 3.3.
//
// Part images of one image differ only inside the boxes. So a row of the image is blurred and made noisy once, and a
// part's row is copied from that and from the image. The blur has run before, at a quarter of the size; noise is drawn
// only for vectors of pixels that reach into a box.
#pragma once

#include "../common/compose_parts.h"
#include "../common/normal.h"
#include "rows.h"
#include "scratch.h"
#include "stream.h"

namespace fgvc_ext::FGVC_ISA {

// --- the blur, at a quarter of the size ---

template <class Value>
FGVC_INLINE void gaussian(double sigma, int64_t radius, Value* weights) {
  const auto weight = [&](int64_t offset) {
    const double x = static_cast<double>(offset) / sigma;
    return std::exp(-0.5 * x * x);
  };
  double total = 0;
  for (int64_t offset = -radius; offset <= radius; ++offset) total += weight(offset);
  for (int64_t offset = -radius; offset <= radius; ++offset)
    weights[radius + offset] = static_cast<Value>(weight(offset) / total);
}

// The means of a row of cells of 4 × 4 pixels, of which those at the end may be smaller.
template <class T>
FGVC_INLINE void pool_row(const ComposeParts& op, const T* image, int64_t row, Accumulation<T>* line,
                          Accumulation<T>* means) {
  using Value = Accumulation<T>;
  const Layout4& layout = op.layout;
  const int64_t width = layout.width, top = row * kPool, height = smaller(kPool, layout.height - top);
  for (int64_t i = 0; i < height; ++i) {
    const T* from = image + (top + i) * layout.stride[2];
    if (layout.stride[3] == 1) {
      for (int64_t x = 0; x < width; ++x) line[x] = (i ? line[x] : Value(0)) + to_float(from[x]);
    } else {
      for (int64_t x = 0; x < width; ++x) line[x] = (i ? line[x] : Value(0)) + to_float(from[x * layout.stride[3]]);
    }
  }
  const int64_t whole = width / kPool;
  for (int64_t x = 0; x < whole; ++x)
    means[x] = (line[4 * x] + line[4 * x + 1] + line[4 * x + 2] + line[4 * x + 3]) / static_cast<Value>(kPool * height);
  if (whole == op.small_width) return;
  Value rest = 0;
  for (int64_t x = whole * kPool; x < width; ++x) rest += line[x];
  means[whole] = rest / static_cast<Value>((width - whole * kPool) * height);
}

template <class T>
FGVC_INLINE void blur_rows(const ComposeParts& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  const int64_t radius = op.radius(), width = op.small_width;
  auto* weights = scratch.take<Value>(2 * radius + 1);
  auto* line = scratch.take<Value>(op.layout.width);
  auto* padded = scratch.take<Value>(width + 2 * radius);
  if (begin < end) gaussian(op.small_sigma(), radius, weights);
  for (int64_t number = begin; number < end; ++number) {
    const int64_t map = number / op.small_height, row = number % op.small_height;
    const T* image = static_cast<const T*>(op.images) + op.layout.offset(map / kPartChannels, map % kPartChannels);
    pool_row(op, image, row, line, padded + radius);
    for (int64_t i = 1; i <= radius; ++i) {
      padded[radius - i] = padded[radius + reflected(-i, width)];
      padded[radius + width - 1 + i] = padded[radius + reflected(width - 1 + i, width)];
    }
    Value* to = static_cast<Value*>(op.rows) + number * op.small_pitch;
    for_each_vector<Value>(width, [&](auto how, int64_t x) {
      Vector<Value> total = {};
      for (int64_t k = 0; k <= 2 * radius; ++k) total += weights[k] * how.at(padded + k, x, 0);
      how.put(to, x, total);
    });
  }
}

template <class Value>
FGVC_INLINE void blur_columns(const ComposeParts& op, int64_t begin, int64_t end, Scratch& scratch) {
  const int64_t radius = op.radius(), height = op.small_height;
  auto* weights = scratch.take<Value>(2 * radius + 1);
  auto* from = scratch.take<const Value*>(2 * radius + 1);
  if (begin < end) gaussian(op.small_sigma(), radius, weights);
  for (int64_t number = begin; number < end; ++number) {
    const int64_t row = number % height;
    const Value* map = static_cast<const Value*>(op.rows) + (number - row) * op.small_pitch;
    for (int64_t k = 0; k <= 2 * radius; ++k) from[k] = map + reflected(row + k - radius, height) * op.small_pitch;
    Value* to = static_cast<Value*>(op.small) + number * op.small_pitch;
    for_each_vector<Value>(op.small_width, [&](auto how, int64_t x) {
      Vector<Value> total = {};
      for (int64_t k = 0; k <= 2 * radius; ++k) total += weights[k] * how.at(from[k], x, 0);
      how.put(to, x, total);
    });
  }
}

// --- a row of an image ---

// Reads the small image between its values. The task's tables say where each column does.
template <class Value>
class BlurredRows {
 public:
  FGVC_INLINE BlurredRows take(const ComposeParts& op, Scratch& scratch) {
    BlurredRows rows;
    rows.line_ = scratch.take<Value>(op.small_width + 2 + kLanes);
    rows.below_ = scratch.take<int32_t>(op.layout.width);
    rows.above_ = scratch.take<int32_t>(op.layout.width);
    rows.share_ = scratch.take<Value>(op.layout.width);
    return rows;
  }
  __attribute__((always_inline)) void fill(const ComposeParts& op) {
    for (int64_t x = 0; x < op.layout.width; ++x) {
      const Between place = place_between(x, op.layout.width, op.small_width);
      below_[x] = static_cast<int32_t>(place.below) + 1;
      above_[x] = static_cast<int32_t>(place.above) + 1;
      share_[x] = static_cast<Value>(place.share) / static_cast<Value>(2 * op.layout.width);
    }
  }
  // `to` has room for whole vectors.
  __attribute__((always_inline)) void read(const ComposeParts& op, const Value* small, int64_t y, Value* to) {
    const int64_t height = op.layout.height, width = op.small_width;
    const Between place = place_between(y, height, op.small_height);
    const Value share = static_cast<Value>(place.share) / static_cast<Value>(2 * height), rest = 1 - share;
    const Value *below = small + place.below * op.small_pitch, *above = small + place.above * op.small_pitch;
    for (int64_t x = 0; x < width; ++x) line_[x + 1] = rest * below[x] + share * above[x];
    line_[0] = line_[1];
    line_[width + 1] = line_[width];
    if constexpr (sizeof(Value) == 4) {
      if (op.layout.width == kPool * width) return read_fours(op.layout.width, to);
    }
    for (int64_t x = 0; x < op.layout.width; ++x)
      to[x] = (1 - share_[x]) * line_[below_[x]] + share_[x] * line_[above_[x]];
  }

 private:
  // Where the width is a multiple of four: a vector of the row needs a quarter of a vector, which is permuted.
  __attribute__((always_inline)) void read_fours(int64_t width, float* to) const {
    const Ints lanes = lane_numbers() + 2, below = lanes >> 2, above = below + 1;
    const Floats share = __builtin_convertvector(lanes & 3, Floats) * 0.25f + 0.125f, rest = 1.f - share;
    for (int64_t x = 0; x < width; x += kLanes) {
      const Floats values = load(line_ + x / 4);
      store(to + x, rest * __builtin_shuffle(values, below) + share * __builtin_shuffle(values, above));
    }
  }

  Value* line_;  // the row of the small image; its ends stand there twice
  int32_t *below_, *above_;
  Value* share_;
};

// A sample's box: the rows and columns of its pixels.
struct PixelBox {
  PixelRange rows, columns;
};
template <class Value>
FGVC_INLINE PixelBox box_of(const ComposeParts& op, int64_t sample, int64_t part) {
  const Value* box = static_cast<const Value*>(op.boxes) + (sample * op.parts + part) * 4;
  return {pixels_between(box[1], box[3], op.layout.height), pixels_between(box[0], box[2], op.layout.width)};
}

struct NoiseStream {
  uint64_t seed;
  uint32_t sample;
};
FGVC_INLINE NoiseStream noise_of(const ComposeParts& op, int64_t sample) {
  if (op.seed_per_sample) return {static_cast<uint64_t>(op.seed[sample]), 0};
  return {static_cast<uint64_t>(op.seed[0]), static_cast<uint32_t>(sample)};
}

// Puts noisy pixels into `rows`, `pitch` apart, where `covered` has all bits set.
template <class T>
static __attribute__((noinline)) void add_noise(const ComposeParts& op, const NoiseStream& stream, int64_t first,
                                                const int32_t* covered, const T* const own[3], float* rows,
                                                int64_t pitch) {
  const float deviation = static_cast<float>(op.noise_std);
  const int64_t width = op.layout.width;
  for (int64_t x = 0; x < width; x += kLanes) {
    const uint32_t bits = lane_bits(load(covered + x));
    if (!bits) continue;
    const Words position = Words{} + static_cast<uint32_t>(first + x) + reinterpret_cast<Words>(lane_numbers());
    const auto noise = normals_of<VectorLanes>(philox<VectorLanes>(
        {{position, Words{}, Words{} + stream.sample, Words{} + kComposePartsStream}}, stream.seed));
    for (int64_t c = 0; c < kPartChannels; ++c) {
      const Floats pixels = x + kLanes <= width ? load(own[c] + x) : load_partial(own[c] + x, width - x, 0.f);
      const Floats added = deviation * noise.value[c], noisy = op.replace ? added : pixels + added;
      float* to = rows + c * pitch + x;
      store(to, select(bits, noisy, load(to)));
    }
  }
}
static __attribute__((noinline)) void add_noise(const ComposeParts& op, const NoiseStream& stream, int64_t first,
                                                const int32_t* covered, const double* const own[3], double* rows,
                                                int64_t pitch) {
  for (int64_t x = 0; x < op.layout.width; ++x) {
    if (!covered[x]) continue;
    const auto noise = wide_normals_of(
        philox({{static_cast<uint32_t>(first + x), 0, stream.sample, kComposePartsStream}}, stream.seed));
    for (int64_t c = 0; c < kPartChannels; ++c)
      rows[c * pitch + x] = op.noise_std * noise.value[c] + (op.replace ? 0. : own[c][x]);
  }
}

// What all parts of an image share in one of its rows: its pixels, and what is seen outside the own box.
template <class T>
struct ImageRow {
  using Value = Accumulation<T>;
  const T* own[kPartChannels];  // in the image itself, or in `gathered`
  Value* outside;               // rows, `pitch` apart
  T* narrow;                    // the same in T, where that is another type
  T* gathered;
  int32_t* covered;
  int64_t pitch;
  BlurredRows<Value> blurred;

  FGVC_INLINE ImageRow take(const ComposeParts& op, Scratch& scratch) {
    ImageRow row{};
    const int64_t width = op.layout.width;
    row.pitch = row_pitch(width);
    row.outside = scratch.take<Value>(kPartChannels * row.pitch);
    row.narrow = scratch.take<T>(sizeof(T) < sizeof(Value) ? kPartChannels * row.pitch : 0);
    row.gathered = scratch.take<T>(op.layout.stride[3] == 1 ? 0 : kPartChannels * row.pitch);
    row.covered = scratch.take<int32_t>(row.pitch);
    row.blurred = BlurredRows<Value>::take(op, scratch);
    return row;
  }

  __attribute__((always_inline)) const T* outside_of(int64_t channel) const {
    if constexpr (sizeof(T) < sizeof(Value)) {
      return narrow + channel * pitch;
    } else {
      return outside + channel * pitch;
    }
  }

  __attribute__((always_inline)) void fill(const ComposeParts& op, int64_t sample, int64_t y) {
    const int64_t width = op.layout.width;
    for (int64_t c = 0; c < kPartChannels; ++c) {
      const T* from = static_cast<const T*>(op.images) + op.layout.offset(sample, c) + y * op.layout.stride[2];
      own[c] = from;
      if (op.layout.stride[3] != 1) {
        T* const to = gathered + c * pitch;
        for (int64_t x = 0; x < width; ++x) to[x] = from[x * op.layout.stride[3]];
        own[c] = to;
      }
      Value* const row = outside + c * pitch;
      if (op.blurs()) {
        blurred.read(op, static_cast<const Value*>(op.small) + op.small_offset(sample, c), y, row);
      } else {
        for (int64_t x = 0; x < width; ++x) row[x] = to_float(own[c][x]);
      }
    }
    if (cover(op, sample, y)) add_noise(op, noise_of(op, sample), y * width, covered, own, outside, pitch);
    if constexpr (sizeof(T) < sizeof(Value))
      for (int64_t c = 0; c < kPartChannels; ++c)
        for (int64_t x = 0; x < width; ++x) narrow[c * pitch + x] = from_float<T>(outside[c * pitch + x]);
  }

 private:
  // Marks the pixels of the row that lie in a box; whether there are any. With one box no part shows noise.
  __attribute__((always_inline)) bool cover(const ComposeParts& op, int64_t sample, int64_t y) {
    bool any = false;
    for (int64_t part = 0; op.parts > 1 && part < op.parts; ++part) {
      const PixelBox box = box_of<Value>(op, sample, part);
      if (!box.rows.holds(y) || box.columns.begin >= box.columns.end) continue;
      if (!any) std::memset(covered, 0, pitch * sizeof(int32_t));
      any = true;
      for (int64_t x = box.columns.begin; x < box.columns.end; ++x) covered[x] = -1;
    }
    return any;
  }
};

// --- the parts ---

// A part's row: `own` in the columns of its box, `outside` in the others.
template <class T>
struct PartRow {
  const T *own, *outside;
  PixelRange box;

  // The values [begin, end), from `begin` on.
  __attribute__((always_inline)) void copy(int64_t begin, int64_t end, T* to) const {
    const auto within = [&](int64_t x) { return x < begin ? begin : x > end ? end : x; };
    const int64_t left = within(box.begin), right = within(box.end);
    std::memcpy(to, outside + begin, (left - begin) * sizeof(T));
    std::memcpy(to + (left - begin), own + left, (right - left) * sizeof(T));
    std::memcpy(to + (right - begin), outside + right, (end - right) * sizeof(T));
  }
  // All of them past the caches; both are whole vectors.
  __attribute__((always_inline)) void stream_to(T* to, int64_t width) const {
    constexpr int64_t kStep = sizeof(Floats) / sizeof(T);
    for (int64_t x = 0; x < width; x += kStep) {
      Floats values;
      if (x + kStep <= box.begin || x >= box.end) {
        std::memcpy(&values, outside + x, sizeof(values));
      } else if (x >= box.begin && x + kStep <= box.end) {
        std::memcpy(&values, own + x, sizeof(values));
      } else {
        T mixed[kStep];
        copy(x, x + kStep, mixed);
        std::memcpy(&values, mixed, sizeof(values));
      }
      stream(to + x, values);
    }
  }
};

template <class T>
FGVC_INLINE void compose_rows(const ComposeParts& op, int64_t begin, int64_t end, ImageRow<T>& row) {
  const int64_t width = op.layout.width, height = op.layout.height, bytes = width * static_cast<int64_t>(sizeof(T));
  const bool past_caches = streams(op.output, op.layout.samples * op.parts * kPartChannels * height * bytes, bytes);
  for (int64_t number = begin; number < end; ++number) {
    const int64_t sample = number / height, y = number % height;
    row.fill(op, sample, y);
    for (int64_t part = 0; part < op.parts; ++part) {
      const PixelBox box = box_of<Accumulation<T>>(op, sample, part);
      const PixelRange columns = box.rows.holds(y) ? box.columns : PixelRange{0, 0};
      T* to = static_cast<T*>(op.output) + ((sample * op.parts + part) * kPartChannels * height + y) * width;
      for (int64_t c = 0; c < kPartChannels; ++c, to += height * width) {
        const PartRow<T> values{row.own[c], row.outside_of(c), columns};
        past_caches ? values.stream_to(to, width) : values.copy(0, width, to);
      }
    }
  }
  if (past_caches) end_streaming();
}

// sums[i] += the values of cell i, each `factor` wide.
template <class Value>
FGVC_INLINE void add_cells(const Value* line, int64_t cells, int64_t factor, Value* sums) {
  if (factor == 2) {
    for (int64_t i = 0; i < cells; ++i) sums[i] += line[2 * i] + line[2 * i + 1];
    return;
  }
  for (int64_t i = 0; i < cells; ++i)
    for (int64_t k = 0; k < factor; ++k) sums[i] += line[i * factor + k];
}

template <class T>
FGVC_INLINE void compose_means(const ComposeParts& op, int64_t begin, int64_t end, ImageRow<T>& row,
                               Accumulation<T>* line, Accumulation<T>* sums) {
  using Value = Accumulation<T>;
  const int64_t width = op.layout.width, cells = op.part_width, factor = op.row_factor();
  const Value pixels = static_cast<Value>(factor * op.column_factor());
  for (int64_t number = begin; number < end; ++number) {
    const int64_t sample = number / op.part_height, part_row = number % op.part_height;
    for (int64_t i = 0; i < op.parts * kPartChannels * cells; ++i) sums[i] = 0;
    for (int64_t y = part_row * factor; y < (part_row + 1) * factor; ++y) {
      row.fill(op, sample, y);
      for (int64_t part = 0; part < op.parts; ++part) {
        const PixelBox box = box_of<Value>(op, sample, part);
        const PixelRange own = box.rows.holds(y) ? box.columns : PixelRange{0, 0};
        for (int64_t c = 0; c < kPartChannels; ++c) {
          std::memcpy(line, row.outside + c * row.pitch, width * sizeof(Value));
          for (int64_t x = own.begin; x < own.end; ++x) line[x] = to_float(row.own[c][x]);
          add_cells(line, cells, op.column_factor(), sums + (part * kPartChannels + c) * cells);
        }
      }
    }
    for (int64_t map = 0; map < op.parts * kPartChannels; ++map) {
      T* to =
          static_cast<T*>(op.output) + ((sample * op.parts * kPartChannels + map) * op.part_height + part_row) * cells;
      for (int64_t i = 0; i < cells; ++i) to[i] = from_float<T>(sums[map * cells + i] / pixels);
    }
  }
}

template <class T>
FGVC_INLINE void compose(const ComposeParts& op, int64_t begin, int64_t end, Scratch& scratch) {
  using Value = Accumulation<T>;
  ImageRow<T> row = ImageRow<T>::take(op, scratch);
  const bool whole = op.row_factor() == 1 && op.column_factor() == 1;
  auto* line = scratch.take<Value>(whole ? 0 : op.layout.width);
  auto* sums = scratch.take<Value>(whole ? 0 : op.parts * kPartChannels * op.part_width);
  if (begin == end) return;
  row.blurred.fill(op);
  if (whole) return compose_rows(op, begin, end, row);
  compose_means(op, begin, end, row, line, sums);
}

void part_blur_rows(const ComposeParts& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, blur_rows<T>(op, begin, end, scratch));
}
void part_blur_columns(const ComposeParts& op, int64_t begin, int64_t end, Scratch& scratch) {
  op.dtype == Dtype::float64 ? blur_columns<double>(op, begin, end, scratch)
                             : blur_columns<float>(op, begin, end, scratch);
}
void compose_parts(const ComposeParts& op, int64_t begin, int64_t end, Scratch& scratch) {
  FGVC_SWITCH_DTYPE(op.dtype, compose<T>(op, begin, end, scratch));
}

}  // namespace fgvc_ext::FGVC_ISA
