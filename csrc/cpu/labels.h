// Labels are looked at before a parallel loop, inside which nothing may be thrown.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

namespace fgvc_ext {

// Raises IndexError for the first label outside [0, classes) that is not ignored; returns how many labels count. The
// message is that of fgvc_ext/reference/labels.py.
inline int64_t check_labels(const char* op, const char* argument, const int64_t* labels, int64_t rows, int64_t classes,
                            std::optional<int64_t> ignore_index = std::nullopt) {
  int64_t used = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (ignore_index && labels[row] == *ignore_index) continue;
    if (labels[row] < 0 || labels[row] >= classes)  // std::out_of_range reaches Python as IndexError
      throw std::out_of_range(std::string(op) + ": " + argument + "[" + std::to_string(row) +
                              "] = " + std::to_string(labels[row]) + " is not in [0, " + std::to_string(classes) +
                              "), the range of " + std::to_string(classes) + " classes" +
                              (ignore_index ? ", nor ignore_index = " + std::to_string(*ignore_index) : ""));
    ++used;
  }
  return used;
}

}  // namespace fgvc_ext
