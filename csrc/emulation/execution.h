// The execution model: a launch runs block after block; the threads of a block are fibers that meet at barriers and,
// within a warp, at collectives. All decisions are the scheduler's: a thread says where it waits and is suspended.
// What CUDA leaves undefined, and a GPU would answer with a hang or a wrong number, becomes an error of `run`.
#pragma once

#include <vector_types.h>

#include <cstdio>
#include <functional>
#include <mutex>
#include <numeric>

#include "accesses.h"
#include "fiber.h"
#include "schedule.h"
#include "shared_memory.h"

// CUDA's variables, those of the thread that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace fgvc_ext::emulation {

enum class Scope { kBlock, kWarp };

// A place in the source where threads wait for each other.
struct Meeting {
  const char* name;
  const char* file;
  int line;
  Scope scope;
  bool orders_memory;  // as __syncthreads and __syncwarp do; shuffles and votes do not
  unsigned mask;       // the lanes that meet, in a warp
  uint64_t value;      // what this thread brings
};

// One thread of the running block.
struct Thread {
  enum State { kReady, kWaiting, kLeft };

  explicit Thread(void (*body)()) : fiber(body) {}

  Fiber fiber;
  uint3 index{};  // its threadIdx
  State state = kReady;
  Meeting meeting{};
  // What the lanes brought to the warp's last collective, and which of them were there. The first of them keeps it
  // until all have gone on.
  const uint64_t* gathered = nullptr;
  unsigned present = 0;
  uint64_t kept[32];
};

class Machine {
 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  // Runs `kernel` once for each thread of the grid. Throws std::runtime_error where it breaks CUDA's rules.
  void run(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Unobserved unobserved;
    check_configuration(grid, block, shared_bytes);
    gridDim = grid;
    blockDim = block;
    kernel_ = std::move(kernel);
    schedule_ = Schedule();
    shared_.allocate(shared_bytes);
    const size_t threads = size_t{block.x} * block.y * block.z;
    while (threads_.size() < threads) threads_.push_back(std::make_unique<Thread>(&Machine::body));
    fibers_.clear();
    for (size_t index = 0; index < threads; ++index) {
      fibers_.push_back(&threads_[index]->fiber);
      threads_[index]->index = coordinates(index, block);
    }
    try {
      run_grid();
    } catch (...) {
      Fiber::order(fibers_, true);
      threads_.clear();  // they are somewhere in the kernel and will not come out
      throw;
    }
  }

  // Called in a thread: waits until all who must have come.
  const Thread& meet(const Meeting& meeting) {
    Thread& self = *threads_[running_];
    self.meeting = meeting;
    self.state = Thread::kWaiting;
    Fiber::suspend();
    return self;
  }

  size_t thread() const { return running_; }  // its number in the block
  int lane() const { return static_cast<int>(running_ % 32); }
  void* dynamic_shared() const { return shared_.dynamic(); }

 private:
  // The limits of all GPUs since compute capability 3.0, without opting in to more.
  static void check_configuration(dim3 grid, dim3 block, size_t shared_bytes) {
    const auto within = [](unsigned value, unsigned limit) { return value >= 1 && value <= limit; };
    if (within(grid.x, 0x7FFFFFFF) && within(grid.y, 65535) && within(grid.z, 65535) && within(block.x, 1024) &&
        within(block.y, 1024) && within(block.z, 64) && size_t{block.x} * block.y * block.z <= 1024 &&
        shared_bytes <= 48 * 1024) {
      return;
    }
    throw std::runtime_error("CUDA emulation: no GPU takes a grid of " + text(grid) + " blocks, a block of " +
                             text(block) + " threads, " + std::to_string(shared_bytes) + " bytes of shared memory");
  }

  static void body() {
    Machine& machine = instance();
    machine.kernel_();
    machine.threads_[machine.running_]->state = Thread::kLeft;
  }

  static uint3 coordinates(size_t index, dim3 extent) {
    return {static_cast<unsigned>(index % extent.x), static_cast<unsigned>(index / extent.x % extent.y),
            static_cast<unsigned>(index / extent.x / extent.y)};
  }

  std::vector<size_t> arranged(size_t count) {
    std::vector<size_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    schedule_.arrange(order);
    return order;
  }

  void run_grid() {
    Fiber::order(fibers_, true);
    Accesses::instance().begin_launch();
    for (const size_t index : arranged(size_t{gridDim.x} * gridDim.y * gridDim.z)) {
      blockIdx = coordinates(index, gridDim);
      shared_.fill(schedule_.poison());
      run_block();
      Fiber::order(fibers_, true);
      Accesses::instance().end_block();
    }
    Accesses::instance().end_launch();
  }

  void run_block() {
    for (size_t index = 0; index < fibers_.size(); ++index) threads_[index]->state = Thread::kReady;
    const size_t warps = (fibers_.size() + 31) / 32;
    std::vector<std::vector<size_t>> lanes;
    for (size_t warp = 0; warp < warps; ++warp)
      lanes.push_back(arranged(std::min<size_t>(32, fibers_.size() - 32 * warp)));
    const std::vector<size_t> order = arranged(warps);
    while (count(Thread::kLeft) < fibers_.size()) {
      for (const size_t warp : order) {
        while (!schedule_.holds_back() && run_warp(32 * warp, lanes[warp])) {
        }
      }
      if (count(Thread::kWaiting) == fibers_.size()) release_block();
      if (count(Thread::kWaiting) > 0 && count(Thread::kReady) == 0) fault(stuck());
    }
  }

  // Runs the lanes that can go on to where they wait next. Returns whether some can go on from there.
  bool run_warp(size_t first, const std::vector<size_t>& lanes) {
    for (const size_t lane : lanes) {
      Thread& thread = *threads_[first + lane];
      if (thread.state != Thread::kReady) continue;
      running_ = first + lane;
      threadIdx = thread.index;
      thread.fiber.resume();
    }
    return release_warp(first, lanes.size());
  }

  size_t count(Thread::State state) const {
    size_t count = 0;
    for (size_t index = 0; index < fibers_.size(); ++index) count += threads_[index]->state == state;
    return count;
  }

  // The block goes on when all of it waits at one barrier.
  void release_block() {
    const Meeting& first = threads_[0]->meeting;
    for (size_t index = 0; index < fibers_.size(); ++index) {
      const Meeting& meeting = threads_[index]->meeting;
      if (meeting.scope != Scope::kBlock || meeting.line != first.line || std::strcmp(meeting.file, first.file)) return;
    }
    for (size_t index = 0; index < fibers_.size(); ++index) threads_[index]->state = Thread::kReady;
    Fiber::order(fibers_, false);
  }

  // Lanes go on when all in their mask wait at the same collective. Lanes that have left, or that the block does not
  // have, are not waited for.
  bool release_warp(size_t first, size_t lanes) {
    bool released = false;
    unsigned live = 0;
    for (size_t lane = 0; lane < lanes; ++lane)
      live |= unsigned{threads_[first + lane]->state != Thread::kLeft} << lane;
    for (size_t lane = 0; lane < lanes; ++lane) {
      const Thread& thread = *threads_[first + lane];
      if (thread.state != Thread::kWaiting || thread.meeting.scope != Scope::kWarp) continue;
      const unsigned members = thread.meeting.mask & live;
      if (!(members >> lane & 1)) fault(describe(first + lane) + ", which leaves out its own lane");
      bool complete = true;
      for (size_t other = 0; other < lanes; ++other) {
        if (members >> other & 1) complete &= meets(first + lane, first + other);
      }
      if (complete) release_lanes(first, members);
      released |= complete;
    }
    return released;
  }

  // Whether `other` has come to the collective at which `index` waits for it.
  bool meets(size_t index, size_t other) const {
    const Meeting &mine = threads_[index]->meeting, &theirs = threads_[other]->meeting;
    if (threads_[other]->state != Thread::kWaiting || theirs.scope != Scope::kWarp) return false;
    if (mine.mask == theirs.mask && (mine.name == theirs.name || std::strcmp(mine.name, theirs.name) == 0)) return true;
    if (theirs.mask >> index % 32 & 1) fault(describe(index) + ", but " + describe(other));
    return false;  // it meets others first
  }

  void release_lanes(size_t first, unsigned members) {
    Thread& leader = *threads_[first + __builtin_ctz(members)];
    std::memset(leader.kept, schedule_.poison(), sizeof leader.kept);
    std::vector<Fiber*> group;
    for (size_t lane = 0; lane < 32; ++lane) {
      if (!(members >> lane & 1)) continue;
      Thread& thread = *threads_[first + lane];
      leader.kept[lane] = thread.meeting.value;
      thread.gathered = leader.kept;
      thread.present = members;
      thread.state = Thread::kReady;
      if (leader.meeting.orders_memory) group.push_back(&thread.fiber);
    }
    Fiber::order(group, false);
  }

  static std::string text(const uint3& at) {
    return "(" + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + ")";
  }

  // What a thread does, without its name.
  std::string activity(size_t index) const {
    const Thread& thread = *threads_[index];
    if (thread.state == Thread::kLeft) return "has left the kernel";
    if (thread.state == Thread::kReady) return "runs";
    char mask[32] = "";
    if (thread.meeting.scope == Scope::kWarp) std::snprintf(mask, sizeof mask, "(0x%08x)", thread.meeting.mask);
    return std::string("waits at ") + thread.meeting.name + mask + " in " + thread.meeting.file + ":" +
           std::to_string(thread.meeting.line);
  }

  std::string describe(size_t index) const { return "thread " + text(threads_[index]->index) + " " + activity(index); }

  // Why no thread can go on: a thread for each of the things that threads do.
  std::string stuck() const {
    std::vector<std::string> seen;
    std::string all = "no thread can go on";
    for (size_t index = 0; index < fibers_.size(); ++index) {
      if (std::find(seen.begin(), seen.end(), activity(index)) != seen.end()) continue;
      all += (seen.empty() ? ": " : "; ") + describe(index);
      seen.push_back(activity(index));
    }
    return all;
  }

  [[noreturn]] void fault(const std::string& what) const {
    throw std::runtime_error("CUDA emulation: block " + text(blockIdx) + ": " + what);
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Thread>> threads_;  // of the largest block so far; they serve one launch after the other
  std::vector<Fiber*> fibers_;                    // of the running launch
  std::function<void()> kernel_;
  Schedule schedule_;
  SharedMemory shared_;
  size_t running_ = 0;
};

}  // namespace fgvc_ext::emulation
