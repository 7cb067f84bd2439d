// Scans: each slice's state carried from row to row, whatever way its cells lie.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

constexpr int64_t n_along = 16;        // cells from which slices are walked as they lie, and not turned
constexpr int64_t n_along_rows = 2048;

// Some rows of some slices: side by side, (rows, lanes), or one after another as they lie in memory, (lanes, rows).
struct ScanTile {
  Window w;
  bool along = false, backwards = false;
  int64_t lane_step() const { return along ? w.rows : 1; }
  int64_t row_step() const { return along ? 1 : w.lanes(); }
};

// begin(tile) for the slices of each tile, then visit(tile) for all of their rows, from the last where `backwards`.
template <class Begin, class Visit>
void each_scan_tile(const Block& block, int64_t most_rows, bool backwards, const Begin& begin, const Visit& visit) {
  ScanTile tile;
  tile.backwards = backwards;
  const auto walk = [&](int64_t rows) {
    begin(tile);
    const int64_t last = (block.n - 1) / rows;
    for (int64_t k = 0; k <= last; ++k) {
      tile.w.i = (backwards ? last - k : k) * rows;
      tile.w.rows = least(rows, block.n - tile.w.i);
      visit(tile);
    }
  };
  if (block.n == 0) return;
  tile.along = block.inner == 1 && block.n >= n_along && block.data.stride_n == 1;
  if (!tile.along) {
    const int64_t rows = least(most_rows, block.leaf);
    return each_window(block, rows, [&](Window& w) {
      tile.w = w;
      walk(rows);
    });
  }
  const int64_t rows = least(least(most_rows, n_along_rows), block.n);
  const int64_t groups = least(n_tile_lanes, n_tile / rows);
  tile.w.columns = 1;
  for (tile.w.o = 0; tile.w.o < block.outer; tile.w.o += groups) {
    tile.w.groups = least(groups, block.outer - tile.w.o);
    walk(rows);
  }
}

// run(window, its place in the tile) for windows whose cells lie in the tile as a window's do.
template <class Run>
ALWAYS_INLINE void each_part(const Operand& operand, const ScanTile& tile, const Run& run) {
  Window w = tile.w;
  if (!tile.along) return run(w, int64_t{0});
  w.groups = 1;
  if (operand.stride_n == 1 && operand.stride_outer == w.rows) {
    w.rows *= tile.w.groups;
    return run(w, int64_t{0});
  }
  for (int64_t g = 0; g < tile.w.groups; ++g) {
    w.o = tile.w.o + g;
    run(w, g * w.rows);
  }
}

inline const unsigned char* scan_mask(const Operand& mask, const ScanTile& tile, unsigned char* copy_ptr) {
  if (!mask.cells_ptr) return nullptr;
  const unsigned char* dense_ptr = copy_ptr;
  each_part(mask, tile, [&](const Window& w, int64_t at) {
    const unsigned char* const from_ptr = gather_mask(mask, w, copy_ptr + at);
    if (from_ptr == copy_ptr + at) return;
    if (w.cells() == tile.w.cells()) {
      dense_ptr = from_ptr;
    } else {
      std::memcpy(copy_ptr + at, from_ptr, static_cast<size_t>(w.cells()));
    }
  });
  return dense_ptr;
}

// Which cells count, as gather_keep() has it.
inline const unsigned char* scan_keep(const Block& block, const ScanTile& tile, unsigned char* copy_ptr) {
  const unsigned char* const mask_ptr = scan_mask(block.mask, tile, copy_ptr);
  if (!block.omits_nan) return mask_ptr;
  alignas(64) unsigned char numbers[n_tile];
  each_part(block.data, tile, [&](const Window& w, int64_t at) {
    gather_numbers(block.dtype, block.data, w, numbers + at);
  });
  combine_keep(mask_ptr, numbers, tile.w.cells(), copy_ptr);
  return copy_ptr;
}

ALWAYS_INLINE const unsigned char* from(const unsigned char* keep_ptr, int64_t at) {
  return keep_ptr ? keep_ptr + at : nullptr;
}

inline void scan_doubles(const Block& block, const ScanTile& tile, const unsigned char* keep_ptr, double hidden,
                         double* out) {
  each_part(block.data, tile, [&](const Window& w, int64_t at) {
    gather_doubles(block.dtype, block.data, w, from(keep_ptr, at), hidden, out + at);
  });
}

template <class Convert>
void scan_cells(const Block& block, const ScanTile& tile, const unsigned char* keep_ptr, const Convert& convert,
                typename Convert::Out* out) {
  each_part(block.data, tile, [&](const Window& w, int64_t at) {
    gather(block.data, w, from(keep_ptr, at), convert, out + at);
  });
}

// Whether a finite cell became inf.
inline bool write_scan(const Filled& filled, const ScanTile& tile, const double* cells, const unsigned char* keep_ptr) {
  bool overflowed = false;
  each_part(filled.values, tile, [&](const Window& w, int64_t at) {
    overflowed |= write_doubles(filled, w, cells + at, from(keep_ptr, at));
  });
  return overflowed;
}

// Cells that need no rounding, and their validity.
template <class To, class Wide>
void write_scan_cells(const Filled& filled, const ScanTile& tile, const Wide* cells, const unsigned char* keep_ptr,
                      const To& to) {
  each_part(filled.values, tile, [&](const Window& w, int64_t at) {
    write_mask(filled, w, from(keep_ptr, at));
    narrow_cells(filled, w, cells + at, from(keep_ptr, at), to);
  });
}

template <int n_chains, class Step>
NEVER_INLINE void run_chains(const Step& given, const ScanTile& tile, int64_t first) {
  const Step step = given;
  const int64_t rows = tile.w.rows, lane_step = tile.lane_step(), row_step = tile.row_step();
  typename Step::State state[n_chains];
  for (int k = 0; k < n_chains; ++k) state[k] = step.load(first + k);
  for (int64_t j = 0; j < rows; ++j) {
    const int64_t r = tile.backwards ? rows - 1 - j : j;
    for (int k = 0; k < n_chains; ++k) step(state[k], (first + k) * lane_step + r * row_step, r);
  }
  for (int k = 0; k < n_chains; ++k) step.store(first + k, state[k]);
}

template <class Step>
NEVER_INLINE void run_lanes(const Step& given, const ScanTile& tile) {
  const Step step = given;
  const int64_t rows = tile.w.rows, lanes = tile.w.lanes();
  for (int64_t j = 0; j < rows; ++j) {
    const int64_t r = tile.backwards ? rows - 1 - j : j;
#pragma GCC ivdep
    for (int64_t l = 0; l < lanes; ++l) {
      typename Step::State state = step.load(l);
      step(state, r * lanes + l, r);
      step.store(l, state);
    }
  }
}

// step(state, cell, row) for every cell, the state of each lane loaded before its first row and stored after its last:
// vectors where lanes stand side by side, else several lanes at once, since each step waits for the one before it.
template <class Step>
void run_scan(const Step& step, const ScanTile& tile) {
  const int64_t lanes = tile.w.lanes();
  if (!tile.along && lanes >= 8) return run_lanes(step, tile);
  int64_t l = 0;
  for (; l + 4 <= lanes; l += 4) run_chains<4>(step, tile, l);
  if (lanes - l == 3) return run_chains<3>(step, tile, l);
  if (lanes - l == 2) return run_chains<2>(step, tile, l);
  if (lanes - l == 1) return run_chains<1>(step, tile, l);
}

// A running sum of doubles, from one array to another or in place.
struct Add {
  using State = double;
  const double* cells;
  double *sums, *sum;
  ALWAYS_INLINE State load(int64_t l) const { return sum[l]; }
  ALWAYS_INLINE void store(int64_t l, State state) const { sum[l] = state; }
  ALWAYS_INLINE void operator()(State& state, int64_t at, int64_t) const { sums[at] = state = state + cells[at]; }
};

// errors[j] = error(what the step began with, its cell, what it made), where the first row began with `before`.
template <class Error>
NEVER_INLINE void step_errors(const ScanTile& tile, const double* before, const double* cells, const double* made,
                              double* given_errors, const Error& error) {
  double* const errors = given_errors;
  const int64_t step = tile.row_step(), n = tile.w.cells();
  for (int64_t j = step; j < n; ++j) errors[j] = error(made[j - step], cells[j], made[j]);
  for (int64_t l = 0; l < tile.w.lanes(); ++l) {
    const int64_t j = l * tile.lane_step();
    errors[j] = error(before[l], cells[j], made[j]);
  }
}
