// Ranges of files as memory, for a moment, where a file that shrinks meanwhile ends no process.

#pragma once

#include <cstdint>

namespace maskserve {

// `ptr` is where the first byte asked for lies; nullptr: the file was not mapped, and is to be read.
struct Mapped {
  const unsigned char* ptr = nullptr;
  int guard = -1;
};

Mapped map_range(int descriptor, int64_t start, int64_t n_bytes);

// Whether all bytes were the file's: false where some were gone, or could not be read, and were seen as 0.
bool unmap_range(const Mapped& mapped, int64_t n_bytes);

}  // namespace maskserve
