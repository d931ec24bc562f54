// fgvc_ext._C: build facts, the instruction-set switch, and the Philox stream as NumPy. No torch header: torch bundles
// another pybind11.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../common/philox.h"
#include "../cpu/instruction_set.h"
#include "build_facts.h"

namespace py = pybind11;

namespace {

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> names;
  while (const char* name = fgvc_ext_supported_instruction_set(static_cast<int>(names.size())))
    names.emplace_back(name);
  return names;
}

void use_instruction_set(const std::string& name) {
  if (fgvc_ext_use_instruction_set(name.c_str())) return;
  std::string supported;
  for (const auto& other : supported_instruction_sets()) supported += (supported.empty() ? "" : ", ") + other;
  throw py::value_error("instruction set must be one of " + supported + ", got '" + name + "'");
}

py::array_t<uint32_t> philox_words(uint64_t seed, uint32_t channel, uint32_t sample, uint32_t stream, uint32_t calls) {
  py::array_t<uint32_t> words({static_cast<py::ssize_t>(calls), static_cast<py::ssize_t>(4)});
  auto out = words.mutable_unchecked<2>();
  for (uint32_t call = 0; call < calls; ++call) {
    const auto four = fgvc_ext::philox<>({{call, channel, sample, stream}}, seed);
    for (int i = 0; i < 4; ++i) out(call, i) = four.word[i];
  }
  return words;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, the choice of instruction set, and the Philox stream.";
  m.def("build_facts", [] {
    py::dict facts;
    facts["torch"] = FGVC_BUILT_WITH_TORCH;
    facts["cuda"] = FGVC_BUILT_WITH_CUDA;
    facts["cuda_architectures"] = FGVC_CUDA_ARCHITECTURES;
    facts["compiler"] = FGVC_COMPILER;
    facts["build_type"] = FGVC_BUILD_TYPE;
    return facts;
  });
  m.def("instruction_set", [] { return std::string(fgvc_ext_instruction_set()); });
  m.def("supported_instruction_sets", &supported_instruction_sets, "Those of this build and processor, widest first.");
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"));
  m.def("philox_words", &philox_words, py::arg("seed"), py::arg("channel"), py::arg("sample"), py::arg("stream"),
        py::arg("calls"), "uint32 [calls, 4]: the words of counters (0 … calls − 1, channel, sample, stream).");
}
