// Folding one leaf: the halving tree, evaluated eight streams at a time.
// Halving n cells in a power of eight is: cell j absorbs those at j + k * n/8 (k = 1..7) in the order of tree() below,
// which leaves n/8 cells to do the same with. So each level reads eight streams side by side, at the speed of memory.
// Included by kernels.hpp inside the namespace of one instruction set; see there why nothing here may be shared.

template <class CellType, bool is_masked>
struct CellStreams {
  const unsigned char* cells_ptr;
  const unsigned char* mask_ptr;
  int64_t step_bytes, mask_step;  // from one stream to the next

  ALWAYS_INLINE auto get(int64_t k, int64_t j) const {
    return load_cell<CellType, is_masked>(cells_ptr + k * step_bytes, is_masked ? mask_ptr + k * mask_step : nullptr, j);
  }
  CellStreams from(int64_t j) const {
    const int64_t n_bytes = j * static_cast<int64_t>(sizeof(typename CellType::Raw));
    return {cells_ptr + n_bytes, is_masked ? mask_ptr + j : nullptr, step_bytes, mask_step};
  }
};

template <class Value>
struct LaneStreams {
  Lanes<Value> lanes;
  int64_t step;
  ALWAYS_INLINE Value get(int64_t k, int64_t j) const { return lanes.get(k * step + j); }
};

// Cells k of many short rows: lane j is a row of `step` cells.
template <class Value, int step>
struct RowStreams {
  Lanes<Value> lanes;
  ALWAYS_INLINE Value get(int64_t k, int64_t j) const { return lanes.get(j * step + k); }
};

// Stream k absorbs k + 4, then k + 2, then k + 1; a stream that is not there would add +0 and is left out.
template <int n_streams, int k, int h, class Streams>
ALWAYS_INLINE auto tree(const Streams& streams, int64_t j) {
  if constexpr (h == 8) {
    return streams.get(k, j);
  } else if constexpr (k + h >= n_streams) {
    return tree<n_streams, k, 2 * h>(streams, j);
  } else {
    return absorb(tree<n_streams, k, 2 * h>(streams, j), tree<n_streams, k + h, 2 * h>(streams, j));
  }
}

template <int n_streams, class Streams, class Value>
ALWAYS_INLINE void fold_loop(const Streams& given, int64_t n, Lanes<Value> out) {
  const Streams streams = given;  // a local: a store to `out` cannot change its members, so the loop is a vector
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) out.set(j, Value(tree<n_streams, 0, 1>(streams, j)));
}

template <int n_streams, class Streams, class Value>
NEVER_INLINE void fold_streams(const Streams& streams, int64_t n, Lanes<Value> out) {
  if (n == 8) return fold_loop<n_streams>(streams, 8, out);  // rows of 64 cells: no loop, no left-over lanes
  fold_loop<n_streams>(streams, n, out);
}

template <class Streams, class Value>
void fold(const Streams& streams, int64_t count, int64_t n, Lanes<Value> out) {
  switch (count) {
    case 1: return fold_streams<1>(streams, n, out);
    case 2: return fold_streams<2>(streams, n, out);
    case 3: return fold_streams<3>(streams, n, out);
    case 4: return fold_streams<4>(streams, n, out);
    case 5: return fold_streams<5>(streams, n, out);
    case 6: return fold_streams<6>(streams, n, out);
    case 7: return fold_streams<7>(streams, n, out);
    default: return fold_streams<8>(streams, n, out);
  }
}

// ---- a dense leaf: rows of `inner` cells one after another --------------------------------------------------------

constexpr int n_dense = 512;  // lanes after the first level: leaf / 8 * inner

// (rows, inner) cells -> inner values. 64 is where Near ends.
template <class SumType, bool is_masked>
struct DenseLeaf {
  using Near = typename SumType::Near;
  using Far = typename SumType::Far;
  using Streams = CellStreams<typename SumType::Cell, is_masked>;

  Room<Near, n_dense> near_512;
  Room<Near, n_dense / 8> near_64;
  Room<Far, n_dense / 8> far_8;

  static constexpr int64_t cell_bytes = sizeof(typename SumType::Cell::Raw);

  void operator()(const unsigned char* cells_ptr, const unsigned char* mask_ptr, int64_t rows, int64_t inner,
                  Lanes<Far> out) {
    if (rows <= 8) return level(cells_ptr, mask_ptr, rows, 1, inner, out);
    if (rows <= 64) {
      level(cells_ptr, mask_ptr, rows, 8, inner, near_512.lanes());
      return again(near_512.lanes(), inner, out);
    }
    if (rows <= 512) {
      level(cells_ptr, mask_ptr, rows, 64, inner, near_512.lanes());
      again(near_512.lanes(), 8 * inner, near_64.lanes());
      return again(near_64.lanes(), inner, out);
    }
    level(cells_ptr, mask_ptr, rows, 512, inner, near_512.lanes());
    again(near_512.lanes(), 64 * inner, near_64.lanes());
    again(near_64.lanes(), 8 * inner, far_8.lanes());
    again(far_8.lanes(), inner, out);
  }

  // Rows i, i + h, i + 2h, ... for each i < h; the last of them may be there for the first rows only.
  template <class Value>
  void level(const unsigned char* cells_ptr, const unsigned char* mask_ptr, int64_t rows, int64_t h, int64_t inner,
             Lanes<Value> out) {
    const Streams streams{cells_ptr, mask_ptr, h * inner * cell_bytes, h * inner};
    const int64_t count = (rows + h - 1) / h;
    const int64_t n_last = (rows - (count - 1) * h) * inner;
    fold(streams, count, n_last, out);
    if (n_last < h * inner) fold(streams.from(n_last), count - 1, h * inner - n_last, out.from(n_last));
  }

  template <class From, class Value>
  void again(Lanes<From> from, int64_t n, Lanes<Value> out) {
    fold_streams<8>(LaneStreams<From>{from, n}, n, out);
  }
};

// ---- short rows: up to 8 rows of n cells, as many groups of them as there are lanes --------------------------------
// Widened all at once as one run of cells, then folded across: a loop over 3 cells would never be a vector.

template <class SumType, bool is_masked>
struct ShortRows {
  using Wide = typename SumType::Cell::Wide;
  using Far = typename SumType::Far;

  Room<Wide, 8 * n_lanes> wide;

  void operator()(const unsigned char* cells_ptr, const unsigned char* mask_ptr, int64_t groups, int64_t rows,
                  int64_t inner, Lanes<Far> out) {
    const CellStreams<typename SumType::Cell, is_masked> streams{cells_ptr, mask_ptr, 0, 0};
    fold_streams<1>(streams, groups * rows * inner, wide.lanes());
    switch (rows) {
      case 1: return across<1>(groups, inner, out);
      case 2: return across<2>(groups, inner, out);
      case 3: return across<3>(groups, inner, out);
      case 4: return across<4>(groups, inner, out);
      case 5: return across<5>(groups, inner, out);
      case 6: return across<6>(groups, inner, out);
      case 7: return across<7>(groups, inner, out);
      default: return across<8>(groups, inner, out);
    }
  }

  template <int rows>
  NEVER_INLINE void across(int64_t groups, int64_t inner, Lanes<Far> out) {
    if (inner == 1) return fold_loop<rows>(RowStreams<Wide, rows>{wide.lanes()}, groups, out);
    for (int64_t g = 0; g < groups; ++g) {
      const LaneStreams<Wide> streams{wide.lanes().from(g * rows * inner), inner};
      fold_loop<rows>(streams, inner, out.from(g * inner));
    }
  }
};

// ---- columns: rows far apart, a tile of neighbouring columns -------------------------------------------------------

// Rows i, i + s, i + 2s, ... of a leaf, folded to one value for each column; `levels` is log8 of how many there may be.
template <class SumType, bool is_masked, int levels>
struct ColumnLeaf {
  using Value = std::conditional_t<(levels <= 2), typename SumType::Near, typename SumType::Far>;
  using Below = ColumnLeaf<SumType, is_masked, levels - 1>;

  Below below;
  Room<typename Below::Value, 8 * n_lanes> folded;

  template <class Out>
  void operator()(CellStreams<typename SumType::Cell, is_masked> rows, int64_t n_rows, int64_t columns,
                  Lanes<Out> out) {
    if (n_rows <= 8) return fold(rows, n_rows, columns, out);
    for (int64_t g = 0; g < 8; ++g) {
      auto every_eighth = rows;
      every_eighth.cells_ptr += g * rows.step_bytes;
      if (is_masked) every_eighth.mask_ptr += g * rows.mask_step;
      every_eighth.step_bytes *= 8, every_eighth.mask_step *= 8;
      below(every_eighth, (n_rows - g + 7) / 8, columns, folded.lanes().from(g * n_lanes));
    }
    fold_streams<8>(LaneStreams<typename Below::Value>{folded.lanes(), n_lanes}, columns, out);
  }
};

template <class SumType, bool is_masked>
struct ColumnLeaf<SumType, is_masked, 1> {
  using Value = typename SumType::Near;

  template <class Out>
  void operator()(CellStreams<typename SumType::Cell, is_masked> rows, int64_t n_rows, int64_t columns,
                  Lanes<Out> out) {
    fold(rows, n_rows, columns, out);
  }
};
