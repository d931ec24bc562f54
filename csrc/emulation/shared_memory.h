// A block's shared memory: the dynamic buffer, a heap block of exactly the size asked for, and the `__shared__` arrays.
// The arrays are thread-local variables because the loader knows where those lie, all together: so they can be filled
// before each block, and a read before the first write shows in the result. AddressSanitizer and ThreadSanitizer watch
// static variables better: under them the arrays are plain static and keep what the block before left.
#pragma once

#include <link.h>

#include <cstdint>
#include <cstring>
#include <memory>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FGVC_EXT_SHARED_STORAGE static
#else
#define FGVC_EXT_SHARED_STORAGE static __thread
#endif

namespace fgvc_ext::emulation {

class SharedMemory {
 public:
  void allocate(size_t bytes) {
    dynamic_ = std::make_unique<unsigned char[]>(bytes);
    bytes_ = bytes;
  }

  void fill(int byte) {
    std::memset(dynamic_.get(), byte, bytes_);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    dl_iterate_phdr(&fill_arrays, &byte);
#endif
  }

  void* dynamic() const { return dynamic_.get(); }

 private:
  // Fills the uninitialized thread-local variables of the library that this function is in; it has no others.
  static int fill_arrays(dl_phdr_info* library, size_t, void* byte) {
    const uintptr_t here = reinterpret_cast<uintptr_t>(&fill_arrays) - library->dlpi_addr;
    const ElfW(Phdr)* storage = nullptr, *end = library->dlpi_phdr + library->dlpi_phnum;
    bool ours = false;
    for (const ElfW(Phdr)* part = library->dlpi_phdr; part != end; ++part) {
      ours |= part->p_type == PT_LOAD && here - part->p_vaddr < part->p_memsz;
      if (part->p_type == PT_TLS) storage = part;
    }
    if (!ours) return 0;
    if (storage && library->dlpi_tls_data) {
      std::memset(static_cast<char*>(library->dlpi_tls_data) + storage->p_filesz, *static_cast<int*>(byte),
                  storage->p_memsz - storage->p_filesz);
    }
    return 1;
  }

  std::unique_ptr<unsigned char[]> dynamic_;
  size_t bytes_ = 0;
};

}  // namespace fgvc_ext::emulation
