// Which 32-byte sectors of global memory each access of a warp touches, beside the fewest that could hold its bytes.
// Off, and free of cost but for one branch, until sectors.cpp's C functions switch it on.
//
// An access is what the lanes of one warp do at one place in the source, the n-th time that each of them comes by.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <source_location>
#include <string>
#include <tuple>
#include <vector>

namespace fgvc_ext::emulation {

struct Sectors {
  uint64_t touched = 0, least = 0;
};

// What one launch has done.
struct LaunchSectors {
  Sectors loads, stores;
  std::string worst;  // the place that touches most sectors beyond the least
};

class Accesses {
 public:
  static Accesses& instance() {
    static Accesses accesses;
    return accesses;
  }

  bool counts = false;
  std::vector<LaunchSectors> launches;

  void begin_launch() {
    if (counts) launches.emplace_back();
    of_place_.clear();
  }

  void record(size_t thread, const std::source_location& place, const void* address, size_t bytes, bool stores) {
    if (!counts) return;
    const Place at(place.file_name(), place.line(), stores);
    const unsigned time = times_[{thread, at}]++;
    const auto first = reinterpret_cast<uintptr_t>(address);
    accesses_[{at, thread / 32, time}].emplace_back(first, first + bytes);
  }

  void end_block() {
    if (!counts || launches.empty()) return;
    for (auto& [key, ranges] : accesses_) {
      const Sectors sectors = count(ranges);
      const Place& at = std::get<0>(key);
      add(std::get<2>(at) ? launches.back().stores : launches.back().loads, sectors);
      add(of_place_[at], sectors);
    }
    accesses_.clear();
    times_.clear();
  }

  void end_launch() {
    if (!counts || launches.empty()) return;
    uint64_t most = 0;
    for (const auto& [at, sectors] : of_place_) {
      if (sectors.touched - sectors.least <= most) continue;
      most = sectors.touched - sectors.least;
      launches.back().worst = std::string(std::get<0>(at)) + ":" + std::to_string(std::get<1>(at));
    }
  }

 private:
  using Place = std::tuple<const char*, unsigned, bool>;  // file, line, whether it stores
  using Range = std::pair<uintptr_t, uintptr_t>;

  static void add(Sectors& sum, const Sectors& more) {
    sum.touched += more.touched;
    sum.least += more.least;
  }

  // Bytes that several lanes ask for count once.
  static Sectors count(std::vector<Range>& ranges) {
    std::sort(ranges.begin(), ranges.end());
    Sectors sectors;
    uintptr_t bytes = 0, end = 0, next_sector = 0;
    for (const auto& [first, last] : ranges) {
      if (last > end) bytes += last - std::max(first, end);
      end = std::max(end, last);
      for (uintptr_t sector = std::max(first / 32, next_sector); sector <= (last - 1) / 32; ++sector) ++sectors.touched;
      next_sector = std::max(next_sector, (last - 1) / 32 + 1);
    }
    sectors.least = (bytes + 31) / 32;
    return sectors;
  }

  std::map<std::tuple<Place, size_t, unsigned>, std::vector<Range>> accesses_;  // of the running block
  std::map<std::pair<size_t, Place>, unsigned> times_;
  std::map<Place, Sectors> of_place_;  // of the running launch
};

}  // namespace fgvc_ext::emulation
