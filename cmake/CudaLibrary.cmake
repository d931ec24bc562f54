# The CUDA library, which holds no schemas: it is loaded after the CPU library, under a torch of the same CUDA major version.
if(FGVC_TORCH_CUDA STREQUAL "")
  message(FATAL_ERROR "FGVC_EXT_CUDA needs a CUDA build of torch; torch ${FGVC_TORCH_VERSION} has none")
endif()
set(CMAKE_CUDA_STANDARD 20)
if(NOT FGVC_EXT_CUDA_ARCHITECTURES STREQUAL "")
  set(CMAKE_CUDA_ARCHITECTURES ${FGVC_EXT_CUDA_ARCHITECTURES})
elseif(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  # Ampere, Ada and Hopper as machine code, and PTX for what comes after.
  set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90)
  set(architectures_by_default ON)
endif()
enable_language(CUDA)
if(NOT cuda_std_20 IN_LIST CMAKE_CUDA_COMPILE_FEATURES)
  message(FATAL_ERROR "CMake ${CMAKE_VERSION} does not know how nvcc ${CMAKE_CUDA_COMPILER_VERSION} compiles C++20, which "
    "the CUDA library is written in. A newer one may: pip install --upgrade cmake")
endif()
find_package(CUDAToolkit REQUIRED)
if(architectures_by_default)  # and Turing, as long as the toolkit has it
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE compilable ERROR_QUIET)
  if(compilable MATCHES "compute_75")
    list(PREPEND CMAKE_CUDA_ARCHITECTURES 75-real)
  endif()
endif()

add_library(fgvc_ext_cuda SHARED ${cuda_sources})
target_compile_definitions(fgvc_ext_cuda PRIVATE USE_CUDA)
target_compile_options(fgvc_ext_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-fPIC,-Wall --threads=0>)
get_filename_component(torch_lib_folder ${torch_lib}/libtorch_cuda.so DIRECTORY)
# The runtime is linked statically: torch's own may be another minor version.
set_target_properties(fgvc_ext_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
target_link_libraries(fgvc_ext_cuda PRIVATE torch_stable ${torch_lib_folder}/libtorch_cuda.so)

set(FGVC_CUDA_VERSION ${CUDAToolkit_VERSION})
list(JOIN CMAKE_CUDA_ARCHITECTURES " " FGVC_CUDA_ARCHITECTURES)
