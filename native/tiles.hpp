// Tiles: some rows of some results, gathered from any strides into one dense (rows, lanes) array, one lane a result.
// What follows a gather is a plain loop over dense doubles or keys, whatever the dtype and the layout were.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

constexpr int64_t n_tile = 1 << 14;     // cells of a tile: with the arrays beside it, it stays in L2
constexpr int64_t n_tile_lanes = 256;
constexpr int64_t n_short_group = 512;  // cells of a group up to which several of them share a tile

// Windows over all results of a block, each over all rows.
template <class Visit>
void each_window(const Block& block, int64_t most_rows, const Visit& visit, int64_t most_lanes = n_tile_lanes) {
  if (block.outer == 0 || block.inner == 0) return;
  Window window;
  const int64_t columns = least(block.inner, most_lanes);
  const int64_t rows = block.n < most_rows ? (block.n > 0 ? block.n : 1) : most_rows;
  int64_t groups = 1;
  if (columns == block.inner && block.n * columns <= n_short_group) {
    groups = least(n_tile_lanes / columns, n_tile / 2 / (rows * columns));
  } else if (block.inner == 1 && block.data.stride_outer < block.data.stride_n) {  // neighbours in memory, together
    groups = least(most_lanes, n_tile / rows);
  }
  for (window.o = 0; window.o < block.outer; window.o += groups) {
    window.groups = least(groups, block.outer - window.o);
    for (window.c = 0; window.c < block.inner; window.c += columns) {
      window.columns = least(columns, block.inner - window.c);
      visit(window);
    }
  }
}

// The rows of a window, leaf by leaf.
template <class Visit>
void each_leaf(const Block& block, Window& w, const Visit& visit) {
  for (w.i = 0; w.i < block.n; w.i += block.leaf) {
    w.rows = least(block.leaf, block.n - w.i);
    visit();
  }
}

// The runs of a window: first cell + a * .. + b * .., each with its place in the tile.
struct Runs {
  int64_t n_a, step_a, tile_a;  // how many, and from one to the next
  int64_t n_b, step_b, tile_b;
  int64_t n, stride, tile_stride;  // the cells of a run
};

// As long runs as can be.
inline Runs runs_of(const Operand& operand, const Window& w) {
  const bool inner_dense = w.columns == 1 || operand.stride_inner == 1;
  if (w.groups == 1 && inner_dense && (w.rows <= 1 || operand.stride_n == w.columns)) {
    return {1, 0, 0, 1, 0, 0, w.cells(), 1, 1};
  }
  const bool is_transposed = operand.stride_inner != 1 && operand.stride_n == 1;
  if (w.columns < 8 ? w.rows > w.groups : is_transposed && w.rows > 1) {
    return {w.groups, operand.stride_outer, w.columns, w.columns, operand.stride_inner, 1, w.rows, operand.stride_n,
            w.lanes()};
  }
  if (w.columns < 8) {
    return {w.rows, operand.stride_n, w.lanes(), w.columns, operand.stride_inner, 1, w.groups, operand.stride_outer,
            w.columns};
  }
  return {w.rows, operand.stride_n, w.lanes(), w.groups, operand.stride_outer, w.columns, w.columns,
          operand.stride_inner, 1};
}

// Calls run(first cell, its place in the tile, cells, stride, stride in the tile) for the runs of a window.
template <class Run>
ALWAYS_INLINE void each_run(const Operand& operand, const Window& w, const Run& run) {
  const int64_t first = first_cell(operand, w);
  const Runs runs = runs_of(operand, w);
  for (int64_t a = 0; a < runs.n_a; ++a) {
    for (int64_t b = 0; b < runs.n_b; ++b) {
      run(first + a * runs.step_a + b * runs.step_b, a * runs.tile_a + b * runs.tile_b, runs.n, runs.stride,
          runs.tile_stride);
    }
  }
}

// Several groups one after another in memory: read in one run, then turned, in the cache.
inline bool is_run(const Operand& operand, const Window& w) {
  return w.groups > 1 && (w.columns == 1 || operand.stride_inner == 1) &&
         (w.rows <= 1 || operand.stride_n == w.columns) && operand.stride_outer == w.rows * w.columns;
}

// (groups, rows, columns) as (rows, groups, columns).
template <class T, int columns_known>
NEVER_INLINE void turn_cells(const T* from, int64_t groups, int64_t rows, int64_t given_columns, T* __restrict to) {
  constexpr int64_t n_groups = 16;  // their cells stay in L1
  const int64_t columns = columns_known ? columns_known : given_columns, lanes = groups * columns;
  for (int64_t g = 0; g < groups; g += n_groups) {
    const int64_t some = least(n_groups, groups - g);
    for (int64_t r = 0; r < rows; ++r) {
      const T* const row = from + (g * rows + r) * columns;
      T* const turned = to + r * lanes + g * columns;
      for (int64_t k = 0; k < some; ++k) {
        for (int64_t c = 0; c < columns; ++c) turned[k * columns + c] = row[k * rows * columns + c];
      }
    }
  }
}

template <class T>
void turn(const T* from, const Window& w, T* to) {
  switch (w.columns) {
    case 1: return turn_cells<T, 1>(from, w.groups, w.rows, 1, to);
    case 3: return turn_cells<T, 3>(from, w.groups, w.rows, 3, to);
    default: return turn_cells<T, 0>(from, w.groups, w.rows, w.columns, to);
  }
}

constexpr int64_t n_ahead_rows = 4;
constexpr int64_t n_ahead = 1024;  // cells; the processor's own prefetcher stops at the end of a page

// What a run is followed by, in cells: more of the same run, or a row some rows on.
ALWAYS_INLINE int64_t cells_ahead(const Operand& operand, const Window& w, int64_t n) {
  return n == w.cells() ? n_ahead : n_ahead_rows * operand.stride_n;
}

ALWAYS_INLINE void prefetch(const unsigned char* first_ptr, int64_t n_bytes) {
  for (int64_t b = 0; b < n_bytes; b += 64) __builtin_prefetch(first_ptr + b);
}

// Chosen by `keep`, all ones or all zeros: NaN-safe and without a branch.
template <class Bits>
ALWAYS_INLINE Bits choose(Bits keep, Bits a, Bits b) {
  return static_cast<Bits>((a & keep) | (b & ~keep));
}

constexpr int64_t n_chunk = 256;  // cells converted between two bursts of prefetches

// Convert::operator()(raw) for each cell, as Convert::Out; what lies under the mask becomes `hidden`.
template <class Convert, bool is_masked, bool is_dense>
NEVER_INLINE void convert_run(const unsigned char* from_ptr, const unsigned char* keep_ptr, int64_t n, int64_t stride,
                              int64_t tile_stride, Convert given, typename Convert::Out* out) {
  using Out = typename Convert::Out;
  using Bits = typename Convert::Bits;
  const Convert convert = given;
  const Bits hidden = bits_as<Bits>(convert.hidden);
  const int64_t step = is_dense ? 1 : stride, tile_step = is_dense ? 1 : tile_stride;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    typename Convert::Raw raw;
    std::memcpy(&raw, from_ptr + j * step * static_cast<int64_t>(sizeof raw), sizeof raw);
    Out value = convert(raw);
    if constexpr (is_masked) {
      const Bits keep = static_cast<Bits>(-static_cast<Bits>(keep_ptr[j * tile_step]));
      value = bits_as<Out>(choose<Bits>(keep, bits_as<Bits>(value), hidden));
    }
    out[j * tile_step] = value;
  }
}

// The same of one cell that repeats.
template <class Convert>
NEVER_INLINE void repeat_cell(const unsigned char* from_ptr, const unsigned char* keep_ptr, int64_t n,
                              const Convert& convert, typename Convert::Out* out) {
  using Bits = typename Convert::Bits;
  typename Convert::Raw raw;
  std::memcpy(&raw, from_ptr, sizeof raw);
  const typename Convert::Out value = convert(raw);
  const Bits bits = bits_as<Bits>(value), hidden = bits_as<Bits>(convert.hidden);
  if (!keep_ptr) {
    for (int64_t j = 0; j < n; ++j) out[j] = value;
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    const Bits keep = static_cast<Bits>(-static_cast<Bits>(keep_ptr[j]));
    out[j] = bits_as<typename Convert::Out>(choose<Bits>(keep, bits, hidden));
  }
}

template <class Convert>
void gather(const Operand& data, const Window& w, const unsigned char* keep_ptr, const Convert& convert,
            typename Convert::Out* out) {
  constexpr int64_t cell_bytes = sizeof(typename Convert::Raw);
  if (is_run(data, w)) {
    using Out = typename Convert::Out;
    using Bits = typename Convert::Bits;
    alignas(64) Out cells[n_tile];
    convert_run<Convert, false, true>(window_ptr(data, w, cell_bytes), nullptr, w.cells(), 1, 1, convert, cells);
    turn(cells, w, out);
    if (!keep_ptr) return;
    const Bits hidden = bits_as<Bits>(convert.hidden);
    for (int64_t j = 0; j < w.cells(); ++j) {
      out[j] = bits_as<Out>(
          choose<Bits>(static_cast<Bits>(-static_cast<Bits>(keep_ptr[j])), bits_as<Bits>(out[j]), hidden));
    }
    return;
  }
  each_run(data, w, [&](int64_t first, int64_t at, int64_t n, int64_t stride, int64_t tile_stride) {
    const unsigned char* from_ptr = data.cells_ptr + first * cell_bytes;
    const unsigned char* const run_keep_ptr = keep_ptr ? keep_ptr + at : nullptr;
    if (stride == 0 && tile_stride == 1) return repeat_cell(from_ptr, run_keep_ptr, n, convert, out + at);
    if (stride != 1 || tile_stride != 1) {
      (keep_ptr ? convert_run<Convert, true, false> : convert_run<Convert, false, false>)(
          from_ptr, run_keep_ptr, n, stride, tile_stride, convert, out + at);
      return;
    }
    const int64_t ahead_bytes = cells_ahead(data, w, n) * cell_bytes;
    for (int64_t j = 0; j < n; j += n_chunk) {
      const int64_t some = least(n_chunk, n - j);
      prefetch(from_ptr + j * cell_bytes + ahead_bytes, some * cell_bytes);
      if (keep_ptr) {
        prefetch(run_keep_ptr + j + n_ahead, some);
        convert_run<Convert, true, true>(from_ptr + j * cell_bytes, run_keep_ptr + j, some, 1, 1, convert,
                                         out + at + j);
      } else {
        convert_run<Convert, false, true>(from_ptr + j * cell_bytes, nullptr, some, 1, 1, convert, out + at + j);
      }
    }
  });
}

// ---- lanes: loops over (rows, lanes) as a run of `period` values again and again ------------------------------------

// A multiple of `lanes`, long enough for vector loops: lane values repeated to it are a pattern.
ALWAYS_INLINE int64_t period_of(int64_t lanes) { return lanes * (lanes < n_tile_lanes ? n_tile_lanes / lanes : 1); }

template <class T>
void spread(const T* values, int64_t lanes, int64_t period, T* pattern) {
  std::memcpy(pattern, values, static_cast<size_t>(lanes) * sizeof(T));
  for (int64_t n = lanes; n < period; n *= 2) {
    std::memcpy(pattern + n, pattern, static_cast<size_t>(least(n, period - n)) * sizeof(T));
  }
}

// pattern[lane] = join of the values of the lane, by halves: one after another, each would wait for the last.
template <class T, class Join>
ALWAYS_INLINE void fold_pattern(T* pattern, int64_t period, int64_t lanes, const Join& join) {
  for (int64_t rows = period / lanes; rows > 1;) {
    const int64_t half = (rows + 1) / 2;
    const T* const rest = pattern + half * lanes;
#pragma GCC ivdep
    for (int64_t j = 0; j < (rows - half) * lanes; ++j) pattern[j] = join(pattern[j], rest[j]);
    rows = half;
  }
}

// step(pattern index, cell index) for every cell of (rows, lanes).
template <class Step>
ALWAYS_INLINE void each_cell(int64_t n_cells, int64_t period, const Step& given) {
  const Step step = given;
  for (int64_t start = 0; start < n_cells; start += period) {
    const int64_t n = least(period, n_cells - start);
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) step(j, start + j);
  }
}

inline void count_window(const unsigned char* keep_ptr, const Window& w, int64_t* count) {
  if (keep_ptr) return count_lanes(keep_ptr, w.cells(), w.lanes(), count);
  for (int64_t l = 0; l < w.lanes(); ++l) count[l] += w.rows;
}

// Part k of the states that a block brings, of the window's lanes: as write_lanes() leaves them.
inline void read_lanes(const Block& block, const Window& w, int k, double* values) {
  copy_lanes(static_cast<const double*>(block.states_ptr->part_ptr[k]) + w.o * block.inner + w.c, w.lanes(), values);
}
inline void read_counts(const Block& block, const Window& w, int64_t* count) {
  copy_lanes(block.states_ptr->count_ptr + w.o * block.inner + w.c, w.lanes(), count);
}

// Where the results of a window's lanes go: lane l of group g, column c is result (o + g) * inner + c.
template <class T>
void write_lanes(const Block& block, const Window& w, const T* values, void* part_ptr) {
  T* const out = static_cast<T*>(part_ptr) + w.o * block.inner + w.c;
  copy_lanes(values, w.lanes(), out);  // groups > 1 only where a window has all columns
}
