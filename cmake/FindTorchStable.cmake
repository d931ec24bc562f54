# Torch's headers and libraries, asked of the interpreter that drives the build. `find_package(Torch)` is not used: with a
# CUDA torch it stops unless the whole CUDA toolkit is there, and the stable ABI needs none of what it sets up.
#
# Sets FGVC_TORCH_VERSION, FGVC_TORCH_CUDA (torch.version.cuda, empty for a CPU torch), FGVC_TORCH_CXX11_ABI (0 or 1, for
# programs on the whole of LibTorch), the folders torch_include and torch_lib, and the target torch_stable.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import os, torch; root = os.path.dirname(torch.__file__); print(torch.__version__, torch.version.cuda or '', os.path.join(root, 'include'), os.path.join(root, 'lib'), int(torch.compiled_with_cxx11_abi()), sep=';', end='')"
  OUTPUT_VARIABLE facts RESULT_VARIABLE failed ERROR_VARIABLE error)
if(failed)
  message(FATAL_ERROR "fgvc_ext needs torch in the interpreter that builds it (${Python_EXECUTABLE}): ${error}")
endif()
list(GET facts 0 FGVC_TORCH_VERSION)
list(GET facts 1 FGVC_TORCH_CUDA)
list(GET facts 2 torch_include)
list(GET facts 3 torch_lib)
list(GET facts 4 FGVC_TORCH_CXX11_ABI)

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${torch_include})
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)  # 2.11
# No rpath to torch: `import torch` has loaded these libraries before ours, whichever torch it is.
target_link_libraries(torch_stable INTERFACE ${torch_lib}/libtorch_cpu.so ${torch_lib}/libc10.so)
