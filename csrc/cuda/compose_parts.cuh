// Part images, dual attention fusion section 3.3: the blur at a quarter of the size in three steps, then a thread for
// each pixel, which draws its noise once and writes all parts.
#pragma once

#include "../common/compose_parts.h"
#include "../common/normal.h"
#include "index.cuh"
#include "reduction.cuh"

namespace fgvc_ext::cuda {

constexpr int kPartThreads = kWarpsPerBlock * kWarp;
constexpr int kPartChannelsHere = static_cast<int>(kPartChannels);

// The pixels of an image side by side with their channels, as channels_last has them.
inline bool pixels_are_interleaved(const Layout4& layout) {
  return layout.stride[1] == 1 && layout.stride[3] == kPartChannels &&
         (layout.stride[2] == kPartChannels * layout.width || layout.height == 1);
}

// --- the blur, at a quarter of the size ---

// Means of 4 × 4 pixels: a block has kPartThreads columns of four rows of an image, in all channels. Grid: samples and
// rows; columns.
template <class T>
__global__ void __launch_bounds__(kPartThreads) pool_pixels(ComposeParts op, bool interleaved) {
  using Value = Accumulation<T>;
  __shared__ Value of_column[kPartChannels][kPartThreads];
  const int64_t sample = blockIdx.x / op.small_height, row = blockIdx.x - sample * op.small_height;
  const int64_t top = row * kPool, rows = smaller(kPool, op.layout.height - top);
  const auto image = Global<const T>(op.images).from(sample * op.layout.stride[0] + top * op.layout.stride[2]);
  const Global<Value> means(op.small);
  for (int64_t left = int64_t{blockIdx.y} * kPartThreads; left < op.layout.width;
       left += int64_t{gridDim.y} * kPartThreads) {
    const auto columns = static_cast<int>(smaller(kPartThreads, op.layout.width - left));
    __syncthreads();  // what the last columns left here has been read
    for (int i = threadIdx.x; i < kPartChannelsHere * columns; i += kPartThreads) {
      const int channel = interleaved ? i % kPartChannelsHere : i / columns;
      const int column = interleaved ? i / kPartChannelsHere : i - channel * columns;
      const int64_t at = channel * op.layout.stride[1] + (left + column) * op.layout.stride[3];
      Value total = 0;
      for (int64_t y = 0; y < rows; ++y) total += widen(image.load(at + y * op.layout.stride[2]));
      of_column[channel][column] = total;
    }
    __syncthreads();
    const int cells = (columns + 3) / 4;
    for (int i = threadIdx.x; i < kPartChannelsHere * cells; i += kPartThreads) {
      const int channel = i / cells, cell = i - channel * cells, end = cell * 4 + 4 < columns ? cell * 4 + 4 : columns;
      Value total = 0;
      for (int column = cell * 4; column < end; ++column) total += of_column[channel][column];
      means.store(op.small_offset(sample, channel) + row * op.small_pitch + left / kPool + cell,
                  total / static_cast<Value>(rows * (end - cell * 4)));
    }
  }
}

// The weights of a Gaussian for offsets of 0 to its radius, in shared memory, and the sum of those of both sides.
template <class Value>
class Gaussian {
 public:
  static int64_t bytes(const ComposeParts& op) { return (op.radius() + 1) * static_cast<int64_t>(sizeof(Value)); }

  __device__ explicit Gaussian(const ComposeParts& op)
      : radius_(static_cast<int>(op.radius())), weights_(Shared<Value>::at(0)) {
    for (int offset = threadIdx.x; offset <= radius_; offset += blockDim.x) {
      const double x = offset / op.small_sigma();
      weights_[offset] = static_cast<Value>(exp(-0.5 * x * x));
    }
    __syncthreads();
    double total = weights_[0];
    for (int offset = 1; offset <= radius_; ++offset) total += 2 * static_cast<double>(weights_[offset]);
    total_ = static_cast<Value>(total);
  }

  // The mean of the values that value(offset) gives around a place.
  template <class Around>
  __device__ Value mean(Around value) const {
    Value total = 0;
    for (int offset = -radius_; offset <= radius_; ++offset)
      total += weights_[offset < 0 ? -offset : offset] * value(offset);
    return total / total_;
  }

 private:
  int radius_;
  Shared<Value> weights_;
  Value total_;
};

// Along the rows: a block for each row, which it keeps in shared memory where there is room. Global memory would have
// to give each warp's access another sector.
template <class Value, bool RowFits>
__global__ void __launch_bounds__(kPartThreads) blur_part_rows(ComposeParts op) {
  const Gaussian<Value> gaussian(op);
  const auto row = Shared<Value>::at(static_cast<unsigned>((op.radius() + 1) * sizeof(Value)));
  const auto from = Global<const Value>(op.small).from(static_cast<int64_t>(blockIdx.x) * op.small_pitch);
  const auto to = Global<Value>(op.rows).from(static_cast<int64_t>(blockIdx.x) * op.small_pitch);
  if constexpr (RowFits) {
    for (unsigned x = threadIdx.x; x < op.small_width; x += kPartThreads) row[x] = from.load(x);
    __syncthreads();
  }
  for (unsigned x = threadIdx.x; x < op.small_width; x += kPartThreads)
    to.store(x, gaussian.mean([&](int offset) {
      const int64_t place = reflected(int64_t{x} + offset, op.small_width);
      if constexpr (RowFits) {
        return row[static_cast<unsigned>(place)];
      } else {
        return from.load(place);
      }
    }));
}

// Along the columns: a warp for 32 columns of a row. Grid: maps and rows by eight; columns.
template <class Value>
__global__ void __launch_bounds__(kPartThreads) blur_part_columns(ComposeParts op) {
  const Gaussian<Value> gaussian(op);
  const int64_t blocks = (op.small_height + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const int64_t map = blockIdx.x / blocks, y = (blockIdx.x - map * blocks) * kWarpsPerBlock + warp_index();
  if (y >= op.small_height) return;
  const auto from = Global<const Value>(op.rows).from(map * op.small_height * op.small_pitch);
  const auto to = Global<Value>(op.small).from((map * op.small_height + y) * op.small_pitch);
  for (int64_t x = int64_t{blockIdx.y} * kWarp + lane_index(); x < op.small_width; x += int64_t{gridDim.y} * kWarp)
    to.store(x, gaussian.mean([&](int offset) {
      return from.load(reflected(y + offset, op.small_height) * op.small_pitch + x);
    }));
}

// --- a pixel ---

// How a side of the small image is read: `place_between` of the common header, with the divisor at hand.
template <class Index>
struct SmallSide {
  Divisor<Index> unit;
  Index count, size;

  SmallSide(int64_t whole, int64_t small)
      : unit(2 * whole), count(static_cast<Index>(whole)), size(static_cast<Index>(small)) {}
  __device__ Between read(Index i) const {
    Index share;
    const Index next = unit.divide((2 * i + 1) * size + count, share);
    return between(next, share, size);
  }
};

template <class Index>
struct PartImage {
  SmallSide<Index> rows, columns;
  Divisor<uint32_t> width, part_width, blocks;  // blocks: of a sample
  bool interleaved;

  PartImage(const ComposeParts& op, int64_t blocks_of_sample)
      : rows(op.layout.height, op.small_height),
        columns(op.layout.width, op.small_width),
        width(op.layout.width),
        part_width(op.part_width),
        blocks(blocks_of_sample),
        interleaved(pixels_are_interleaved(op.layout)) {}
};

template <class Value>
__device__ bool box_holds(const ComposeParts& op, int64_t box, uint32_t y, uint32_t x) {
  const auto sides = Global<const Value>(op.boxes).from(box * 4);
  const Value column = static_cast<Value>(x) + Value(0.5), row = static_cast<Value>(y) + Value(0.5);
  // All four before any comparison, so that the lanes of a warp load them together.
  const Value left = sides.load(0), top = sides.load(1), right = sides.load(2), bottom = sides.load(3);
  return left <= column && top <= row && column < right && row < bottom;
}

// Whether any box of the sample holds the pixel; bit m of `own` tells of box m < 32.
template <class Value>
__device__ bool any_box_holds(const ComposeParts& op, int64_t sample, uint32_t y, uint32_t x, uint32_t& own) {
  bool any = false;
  own = 0;
  for (int64_t part = 0; part < op.parts; ++part) {
    const bool holds = box_holds<Value>(op, sample * op.parts + part, y, x);
    any = any || holds;
    if (holds && part < 32) own |= 1u << part;
  }
  return any;
}

template <class Value>
struct PixelValues {
  Value channel[kPartChannels];
};

// What parts show that do not have the pixel in their box.
template <class Value, class Index>
__device__ PixelValues<Value> outside_of(const ComposeParts& op, const PartImage<Index>& image, int64_t sample,
                                         uint32_t y, uint32_t x, const PixelValues<Value>& pixel, bool noisy) {
  PixelValues<Value> values = pixel;
  if (noisy) {
    const auto words =
        philox({{y * static_cast<uint32_t>(op.layout.width) + x, 0,
                 op.seed_per_sample ? 0 : static_cast<uint32_t>(sample), kComposePartsStream}},
               static_cast<uint64_t>(Global<const int64_t>(op.seed).load(op.seed_per_sample ? sample : 0)));
    const auto add = [&](const auto& noise) {
#pragma unroll
      for (int c = 0; c < kPartChannelsHere; ++c)
        values.channel[c] =
            static_cast<Value>(op.noise_std) * noise.value[c] + (op.replace ? Value(0) : pixel.channel[c]);
    };
    if constexpr (sizeof(Value) == 8) {
      add(wide_normals_of(words));
    } else {
      add(normals_of<OneLane>(words));
    }
    return values;
  }
  if (!op.blurs()) return values;
  const Between row = image.rows.read(y), column = image.columns.read(x);
  const Value down = static_cast<Value>(row.share) / static_cast<Value>(2 * op.layout.height);
  const Value right = static_cast<Value>(column.share) / static_cast<Value>(2 * op.layout.width);
#pragma unroll
  for (int c = 0; c < kPartChannelsHere; ++c) {
    const auto map = Global<const Value>(op.small).from(op.small_offset(sample, c));
    const auto below = map.from(row.below * op.small_pitch), above = map.from(row.above * op.small_pitch);
    const Value left_side = (1 - down) * below.load(column.below) + down * above.load(column.below);
    const Value right_side = (1 - down) * below.load(column.above) + down * above.load(column.above);
    values.channel[c] = (1 - right) * left_side + right * right_side;
  }
  return values;
}

template <class T>
__device__ PixelValues<Accumulation<T>> pixel_at(const ComposeParts& op, int64_t sample, uint32_t y, uint32_t x) {
  const auto image =
      Global<const T>(op.images).from(sample * op.layout.stride[0] + y * op.layout.stride[2] + x * op.layout.stride[3]);
  PixelValues<Accumulation<T>> values;
#pragma unroll
  for (int c = 0; c < kPartChannelsHere; ++c) values.channel[c] = widen(image.load(c * op.layout.stride[1]));
  return values;
}

// --- the parts ---

// Parts as large as the image: a thread for each pixel.
template <class T, class Index>
__global__ void __launch_bounds__(kPartThreads) compose_pixels(ComposeParts op, PartImage<Index> image) {
  using Value = Accumulation<T>;
  __shared__ T of_block[kPartThreads * kPartChannels];
  uint32_t block, x;
  const int64_t sample = image.blocks.divide(blockIdx.x, block);
  const uint32_t first = block * kPartThreads, pixel = first + threadIdx.x, y = image.width.divide(pixel, x);
  const auto pixels = static_cast<uint32_t>(op.layout.positions());
  PixelValues<Value> own{};
  if (image.interleaved) {  // as they lie in memory, and from there to the threads
    const auto from = Global<const T>(op.images).from(sample * op.layout.stride[0] + int64_t{first} * kPartChannels);
    const uint32_t count = (pixels - first < kPartThreads ? pixels - first : kPartThreads) * kPartChannelsHere;
    for (uint32_t i = threadIdx.x; i < count; i += kPartThreads) of_block[i] = from.load(i);
    __syncthreads();
    if (pixel < pixels)
      for (int c = 0; c < kPartChannelsHere; ++c) own.channel[c] = widen(of_block[threadIdx.x * kPartChannelsHere + c]);
  } else if (pixel < pixels) {
    own = pixel_at<T>(op, sample, y, x);
  }
  if (pixel >= pixels) return;

  uint32_t of_box;
  const bool noisy = any_box_holds<Value>(op, sample, y, x, of_box);
  const PixelValues<Value> outside = outside_of(op, image, sample, y, x, own, noisy);
  for (int64_t part = 0; part < op.parts; ++part) {
    const bool holds = part < 32 ? of_box >> part & 1 : box_holds<Value>(op, sample * op.parts + part, y, x);
    const auto to = Global<T>(op.output).from((sample * op.parts + part) * kPartChannels * pixels + pixel);
#pragma unroll
    for (int c = 0; c < kPartChannelsHere; ++c)
      to.store(int64_t{c} * pixels, narrow<T>(holds ? own.channel[c] : outside.channel[c]));
  }
}

// Smaller parts: a thread for each pixel of each part, which goes over the image's pixels that it stands for.
template <class T, class Index>
__global__ void __launch_bounds__(kPartThreads) compose_means(ComposeParts op, PartImage<Index> image) {
  using Value = Accumulation<T>;
  uint32_t block, part_x;
  const int64_t number = image.blocks.divide(blockIdx.x, block), sample = number / op.parts;
  const uint32_t pixel = block * kPartThreads + threadIdx.x, part_y = image.part_width.divide(pixel, part_x);
  const int64_t pixels = op.part_height * op.part_width, rows = op.row_factor(), columns = op.column_factor();
  if (pixel >= pixels) return;
  PixelValues<Value> total{};
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) {
      const auto y = static_cast<uint32_t>(part_y * rows + row), x = static_cast<uint32_t>(part_x * columns + column);
      PixelValues<Value> value = pixel_at<T>(op, sample, y, x);
      if (!box_holds<Value>(op, number, y, x)) {
        uint32_t of_box;
        const bool noisy = any_box_holds<Value>(op, sample, y, x, of_box);
        value = outside_of(op, image, sample, y, x, value, noisy);
      }
#pragma unroll
      for (int c = 0; c < kPartChannelsHere; ++c) total.channel[c] += value.channel[c];
    }
  const auto to = Global<T>(op.output).from(number * kPartChannels * pixels + pixel);
#pragma unroll
  for (int c = 0; c < kPartChannelsHere; ++c)
    to.store(int64_t{c} * pixels, narrow<T>(total.channel[c] / static_cast<Value>(rows * columns)));
}

}  // namespace fgvc_ext::cuda
