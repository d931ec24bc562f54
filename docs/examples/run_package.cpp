// Runs an AOTInductor package that contains operators of fgvc_ext, without Python:
//   run_package MODEL.pt2 INPUTS.pt OUTPUTS.pt libfgvc_ext_cpu.so
// INPUTS.pt holds a tuple of tensors as torch.save writes it; OUTPUTS.pt gets one that torch.load reads.
#include <ATen/core/ivalue.h>
#include <c10/util/Exception.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <dlfcn.h>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// The library registers its operators with torch as soon as it is loaded; it is never unloaded.
static void load_operators(const char* library) {
  if (dlopen(library, RTLD_NOW) == nullptr) {
    throw std::runtime_error(dlerror());
  }
}

static std::vector<at::Tensor> read_tensors(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  if (bytes.empty()) {
    throw std::runtime_error(std::string("cannot read ") + path);
  }
  c10::IValue tuple = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : tuple.toTupleRef().elements()) {
    tensors.push_back(value.toTensor());
  }
  return tensors;
}

static void write_tensors(const char* path, const std::vector<at::Tensor>& tensors) {
  std::vector<c10::IValue> values(tensors.begin(), tensors.end());
  std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(values)));
  std::ofstream file(path, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size())).flush()) {
    throw std::runtime_error(std::string("cannot write ") + path);
  }
}

int main(int count, char** arguments) {
  if (count < 4) {
    std::fprintf(stderr, "usage: %s MODEL.pt2 INPUTS.pt OUTPUTS.pt [LIBRARY.so ...]\n", arguments[0]);
    return 2;
  }
  try {
    for (int library = 4; library < count; ++library) {
      load_operators(arguments[library]);  // before the package, which looks its operators up by name
    }
    torch::inductor::AOTIModelPackageLoader model(arguments[1]);
    std::vector<at::Tensor> outputs = model.run(read_tensors(arguments[2]));
    for (size_t number = 0; number < outputs.size(); ++number) {
      std::printf("output %zu: %s", number, outputs[number].toString().c_str());
      for (int64_t size : outputs[number].sizes()) {
        std::printf(" %lld", static_cast<long long>(size));
      }
      std::printf("\n");
    }
    write_tensors(arguments[3], outputs);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "run_package: %s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_package: %s\n", error.what());
    return 1;
  }
}
