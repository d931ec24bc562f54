// In which order blocks and threads run: FGVC_EXT_EMULATION_SCHEDULE = forward (the default), reverse or random:SEED,
// read at every launch. A kernel that leaves nothing to chance gives the same bits under each.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace fgvc_ext::emulation {

class Schedule {
 public:
  Schedule() {
    const char* value = std::getenv("FGVC_EXT_EMULATION_SCHEDULE");
    const std::string text = value ? value : "forward";
    if (text.rfind("random:", 0) == 0) {
      random_ = true;
      generator_.seed(std::strtoull(text.c_str() + 7, nullptr, 10));
      poison_ = static_cast<int>(generator_() & 0xFF) | 0x40;  // never small
    } else if (text == "reverse") {
      reverse_ = true;
      poison_ = 0x7F;
    } else if (text != "forward") {
      throw std::invalid_argument("FGVC_EXT_EMULATION_SCHEDULE: expected forward, reverse or random:SEED, got " + text);
    }
  }

  void arrange(std::vector<size_t>& order) {
    if (reverse_) std::reverse(order.begin(), order.end());
    if (random_) std::shuffle(order.begin(), order.end(), generator_);
  }

  // A random schedule holds warps back now and then, so that others run ahead of them, past what does not stop them.
  // The other schedules run each warp as far as it can go.
  bool holds_back() { return random_ && (generator_() & 1); }

  // The byte that memory holds before it is written: 0xFF makes NaN and -1; 0x7F makes the largest numbers, which a
  // maximum that skips NaN cannot hide.
  int poison() const { return poison_; }

 private:
  bool random_ = false, reverse_ = false;
  int poison_ = 0xFF;
  std::mt19937_64 generator_;
};

}  // namespace fgvc_ext::emulation
