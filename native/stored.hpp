// The cells that a sparse tensor stores, spread out a block at a time in memory that stays in the cache.
#pragma once

#include <cstdint>

#include "block.hpp"

namespace maskserve {

// The stored cells of a tensor (outer, n, inner): ascending positions in it, a cell at each, and bytes of which count.
struct Stored {
  const int64_t* positions_ptr = nullptr;
  const unsigned char* cells_ptr = nullptr;
  const unsigned char* mask_ptr = nullptr;  // null: all count
  int64_t n_stored = 0;
};

// How the tensor is cut: blocks of `height` outer rows, of a `run` of n and of `width` columns, the last ones shorter;
// columns count first, then runs. More than one row only where blocks hold all of n and of the columns.
struct Grid {
  int64_t outer = 0, n = 0, inner = 0;
  int64_t height = 0, run = 0, width = 0;
  int64_t n_runs() const { return (n + run - 1) / run; }
  int64_t n_tiles() const { return (inner + width - 1) / width; }
  int64_t n_blocks() const { return (outer + height - 1) / height * n_runs() * n_tiles(); }
  int64_t block_cells() const { return height * run * width; }
  bool fits() const;
};

// The states of blocks [first, last), to `parts` of (outer, runs, inner) whose cells have as many bytes each as
// `part_bytes` says, the count's first. Of `like` the dtype, the leaf and what is omitted are read. False where the
// kernel has no walk. Positions are read as they come: what lies outside a block is passed over.
bool lift_stored(Lift lift, const Options& options, const Stored& stored, const Grid& grid, const Block& like,
                 int64_t first, int64_t last, const Parts& parts, const int64_t* part_bytes);

}  // namespace maskserve
