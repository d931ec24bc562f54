// Fibers: contexts that one operating-system thread switches between, so that the threads of a CUDA block can wait for
// each other in the middle of a kernel. AddressSanitizer and ThreadSanitizer are told of every switch; to the latter
// each fiber is a thread of its own and a switch orders nothing, so that it finds races without any being lost to luck.
#pragma once

#if !defined(__x86_64__)
#error "The emulation's fibers switch stacks in x86-64 assembly: add the few lines for this processor."
#endif

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif

namespace fgvc_ext::emulation {

// Saves the registers that a callee keeps and the stack pointer (in *from), and goes on where `to` was saved.
__attribute__((naked, noinline, no_sanitize("address", "thread", "undefined")))  //
inline void switch_stack(void** /*from: rdi*/, void* /*to: rsi*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n"
      "ret");
}

// Runs `body` again and again: each run ends in a `suspend`, so that a fiber serves every block of every launch.
class Fiber {
 public:
  explicit Fiber(void (*body)()) : body_(body) {
    memory_ = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, kPage, PROT_NONE);  // an overflow stops here instead of running into the next stack
    static size_t fibers = 0;
    const size_t shift = fibers++ % 61 * 64;  // else the tops of all stacks share one set of the processor's caches
    auto** frame = reinterpret_cast<void**>(stack() + kStack - shift);
    *--frame = nullptr;  // where `enter` would return to; backtraces end here
    *--frame = reinterpret_cast<void*>(&enter);
    for (int saved = 0; saved < 6; ++saved) *--frame = nullptr;
    top_ = frame;
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_create_fiber(0);
#endif
  }

  ~Fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack(), kStack);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(tsan_);
#endif
    munmap(memory_, kPage + kStack);
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Runs the fiber until it suspends itself.
  void resume() {
    running_ = this;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack(), kStack);
#endif
#if defined(__SANITIZE_THREAD__)
    resumer_.tsan = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
#endif
    switch_stack(&resumer_.top, top_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // Called in a fiber: goes back to who resumed it.
  static void suspend() {
    Fiber& self = *running_;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, resumer_.stack, resumer_.stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(resumer_.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    switch_stack(&self.top_, resumer_.top);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, &resumer_.stack, &resumer_.stack_size);
#endif
  }

  // Tells ThreadSanitizer of a barrier: what any of `fibers` did before it is visible to all of them after it.
  static void order([[maybe_unused]] const std::vector<Fiber*>& fibers, [[maybe_unused]] bool with_caller) {
#if defined(__SANITIZE_THREAD__)
    if (fibers.empty()) return;
    void* caller = __tsan_get_current_fiber();
    const auto meeting = std::make_unique<char>();  // fresh, so that it carries nothing of earlier barriers
    for (auto* operation : {&__tsan_release, &__tsan_acquire}) {
      if (with_caller) operation(meeting.get());
      for (const Fiber* fiber : fibers) {
        __tsan_switch_to_fiber(fiber->tsan_, __tsan_switch_to_fiber_no_sync);
        operation(meeting.get());
        __tsan_switch_to_fiber(caller, __tsan_switch_to_fiber_no_sync);
      }
    }
#endif
  }

 private:
  static constexpr size_t kPage = 4096;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  static constexpr size_t kStack = 256 * 1024;
#else
  static constexpr size_t kStack = 64 * 1024;
#endif

  static void enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &resumer_.stack, &resumer_.stack_size);
#endif
    for (;;) {
      running_->body_();
      suspend();
    }
  }

  char* stack() const { return static_cast<char*>(memory_) + kPage; }

  struct Resumer {
    void *top, *tsan;
    const void* stack;
    size_t stack_size;
  };
  static inline Fiber* running_ = nullptr;
  static inline Resumer resumer_{};

  void (*body_)();
  void* memory_;
  void* top_;
  [[maybe_unused]] void* tsan_ = nullptr;
};

// While one lives, ThreadSanitizer does not look at this fiber's reads and writes: the scheduler's are no part of CUDA.
struct Unobserved {
#if defined(__SANITIZE_THREAD__)
  Unobserved() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unobserved() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unobserved() {}
#endif
};

}  // namespace fgvc_ext::emulation
