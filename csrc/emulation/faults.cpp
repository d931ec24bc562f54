// Kernels with planted faults: the test of the emulation and of the sanitizers around it. `faults NAME` runs one and
// prints its result; each must be reported, or give results that depend on the schedule. `faults sound` is the kernel
// without a fault. `faults speed` measures.
#include <cuda_runtime.h>

#include <chrono>
#include <iostream>

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kBlocks = 3;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

enum class Fault {
  kNone,
  kMissingBarrier,           // reads what other warps may not have written yet
  kShuffleInPlaceOfBarrier,  // reads what other lanes wrote, ordered by a shuffle only
  kUnwrittenShared,
  kForeignMask,     // one lane leaves itself out, the others count on it
  kOwnLaneLeftOut,  // a lane's mask names only others
  kDifferentMasks,
  kDifferentCollectives,
  kMissingLanes,  // half of the mask's lanes never come
  kDivergentBarrier,
  kEarlyExit,  // one warp leaves before a barrier
  kSharedOutOfBounds,
  kDynamicOutOfBounds,
  kGlobalOutOfBounds,
  kLocalOutOfBounds,
  kMisaligned,  // a 16-byte load from an address that is no multiple of 16
};

template <Fault fault>
__device__ float warp_sum(float value) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int offset = 16; offset > 0; offset /= 2) {
    unsigned mask = kAllLanes;
    if (fault == Fault::kForeignMask && lane == 7) mask = ~(1u << 7);
    if (fault == Fault::kDifferentMasks && lane >= 16) mask = 0xFFFFFFFEu;
    if (fault == Fault::kMissingLanes && lane >= 16) return value;
    if (fault == Fault::kDifferentCollectives && lane == 3) {
      value += __shfl_xor_sync(mask, value, offset);
    } else {
      value += __shfl_down_sync(mask, value, offset);
    }
  }
  return value;
}

// The sum of each row, in two stages.
template <Fault fault>
__global__ void __launch_bounds__(kThreads) row_sums(const float* __restrict__ rows, float* sums, int columns) {
  __shared__ float of_warps[kWarps];
  float* scratch = fgvc_ext::dynamic_shared<float>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const float* row = rows + int64_t{blockIdx.x} * columns;
  float parts[4] = {};
  const int last = fault == Fault::kGlobalOutOfBounds ? columns + static_cast<int>(blockIdx.x) : columns - 1;
  for (int column = thread; column <= last; column += kThreads) parts[column / kThreads % 4] += row[column];
  const int more = fault == Fault::kLocalOutOfBounds ? columns / kThreads + 1 : 3;
  float value = parts[0] + parts[1] + parts[2] + parts[more];

  scratch[thread + (fault == Fault::kDynamicOutOfBounds)] = value;
  if (fault == Fault::kShuffleInPlaceOfBarrier) {
    value = __shfl_sync(kAllLanes, value, lane);
  } else {
    __syncwarp();
  }
  if (fault == Fault::kOwnLaneLeftOut && thread == 0) __syncwarp(0xFFFE);
  if (fault == Fault::kMisaligned) value = reinterpret_cast<const float4*>(scratch + (thread ^ 1) / 4 * 4 + 1)->x;
  value = scratch[thread ^ 1];
  if (fault == Fault::kEarlyExit && warp == 2) return;
  value = warp_sum<fault>(value);
  if (lane == 0 && !(fault == Fault::kUnwrittenShared && warp == 1)) {
    of_warps[warp + (fault == Fault::kSharedOutOfBounds)] = value;
  }
  if (fault == Fault::kDivergentBarrier && warp == 1) {
    __syncthreads();
  } else if (fault != Fault::kMissingBarrier) {
    __syncthreads();
  }
  if (thread == 0) {
    float sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += of_warps[i];
    sums[blockIdx.x] = sum;
  }
}

template <Fault fault>
void run(int blocks) {
  constexpr int kColumns = 4 * kThreads - 5;
  const auto rows = std::make_unique<float[]>(static_cast<size_t>(blocks) * kColumns);
  for (int i = 0; i < blocks * kColumns; ++i) rows[i] = static_cast<float>(i % 17);
  std::vector<float> sums(blocks);
  fgvc_ext::launch(row_sums<fault>, blocks, kThreads, kThreads * sizeof(float), nullptr, rows.get(), sums.data(),
                   kColumns);
  for (int block = 0; block < std::min(blocks, kBlocks); ++block) std::cout << sums[block] << ' ';
  std::cout << '\n';
}

void run_empty_grid(int) { run<Fault::kNone>(0); }

void measure() {
  constexpr int kMany = 4000;
  const auto start = std::chrono::steady_clock::now();
  run<Fault::kNone>(kMany);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::cout << kMany * kThreads / seconds.count() << " threads of a block reduction a second\n";
}

const std::vector<std::pair<std::string, void (*)(int)>> kPrograms = {
    {"sound", run<Fault::kNone>},
    {"missing_barrier", run<Fault::kMissingBarrier>},
    {"shuffle_in_place_of_barrier", run<Fault::kShuffleInPlaceOfBarrier>},
    {"unwritten_shared", run<Fault::kUnwrittenShared>},
    {"foreign_mask", run<Fault::kForeignMask>},
    {"own_lane_left_out", run<Fault::kOwnLaneLeftOut>},
    {"different_masks", run<Fault::kDifferentMasks>},
    {"different_collectives", run<Fault::kDifferentCollectives>},
    {"missing_lanes", run<Fault::kMissingLanes>},
    {"divergent_barrier", run<Fault::kDivergentBarrier>},
    {"early_exit", run<Fault::kEarlyExit>},
    {"shared_out_of_bounds", run<Fault::kSharedOutOfBounds>},
    {"dynamic_out_of_bounds", run<Fault::kDynamicOutOfBounds>},
    {"global_out_of_bounds", run<Fault::kGlobalOutOfBounds>},
    {"local_out_of_bounds", run<Fault::kLocalOutOfBounds>},
    {"misaligned", run<Fault::kMisaligned>},
    {"empty_grid", run_empty_grid},
};

}  // namespace

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  if (wanted == "speed") return measure(), 0;
  for (const auto& [name, program] : kPrograms) {
    if (name != wanted) continue;
    try {
      program(kBlocks);
      return 0;
    } catch (const std::exception& error) {
      std::cout << error.what() << '\n';
      return 1;
    }
  }
  std::cerr << "usage: faults NAME, one of: speed";
  for (const auto& program : kPrograms) std::cerr << ' ' << program.first;
  std::cerr << '\n';
  return 2;
}
