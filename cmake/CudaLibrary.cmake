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
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

add_library(fgvc_ext_cuda SHARED ${cuda_sources})
target_compile_definitions(fgvc_ext_cuda PRIVATE USE_CUDA)
target_compile_options(fgvc_ext_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-fPIC,-Wall --threads=0>)
get_filename_component(torch_lib_folder ${torch_lib}/libtorch_cuda.so DIRECTORY)
# The runtime is linked statically: torch's own may be another minor version.
set_target_properties(fgvc_ext_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
target_link_libraries(fgvc_ext_cuda PRIVATE torch_stable ${torch_lib_folder}/libtorch_cuda.so)

set(FGVC_CUDA_VERSION ${CUDAToolkit_VERSION})
list(JOIN CMAKE_CUDA_ARCHITECTURES " " FGVC_CUDA_ARCHITECTURES)
