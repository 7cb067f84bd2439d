// Folding one leaf: the halving tree, evaluated eight streams at a time.
// Halving n cells in a power of eight is: cell j absorbs those at j + k * n/8 (k = 1..7) in the order of tree() below,
// which leaves n/8 cells to do the same with. So each level reads eight streams side by side, at the speed of memory.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

constexpr int64_t cache_line = 64;

template <class SumType>
constexpr bool is_of_mask = std::is_same_v<SumType, MaskSum>;  // a mask's own bytes have no mask

template <class CellType, bool is_masked>
struct CellStreams {
  static constexpr bool is_near = is_of_lanes<CellType>;  // their lanes were folded a moment ago

  const unsigned char* cells_ptr;
  const unsigned char* mask_ptr;
  int64_t step_bytes, mask_step;  // from one stream to the next
  int64_t ahead_bytes = 0, mask_ahead = 0;  // from these streams to the ones that are folded after them
  CellType cell = {};

  ALWAYS_INLINE auto get(int64_t k, int64_t j) const {
    const unsigned char* stream_mask_ptr = is_masked ? mask_ptr + k * mask_step : nullptr;
    return load_cell<CellType, is_masked>(of_lane(cell, j), cells_ptr + k * step_bytes, stream_mask_ptr, j);
  }
  CellStreams from(int64_t j) const {
    const int64_t n_bytes = j * static_cast<int64_t>(sizeof(typename CellType::Raw));
    return {cells_ptr + n_bytes, is_masked ? mask_ptr + j : nullptr, step_bytes, mask_step, ahead_bytes, mask_ahead,
            of_lane(cell, j)};
  }
  // Eight streams in as many pages outrun the processor's own prefetcher. It follows these: one stream after another.
  ALWAYS_INLINE void prefetch(int64_t first, int64_t last, int64_t n) const {
    const int64_t n_bytes = n * static_cast<int64_t>(sizeof(typename CellType::Raw));
    for (int64_t k = first; k < last; ++k) {
      const unsigned char* ahead_ptr = cells_ptr + k * step_bytes + ahead_bytes;
      for (int64_t b = 0; b < n_bytes; b += cache_line) __builtin_prefetch(ahead_ptr + b);
      if (!is_masked) continue;
      for (int64_t b = 0; b < n; b += cache_line) __builtin_prefetch(mask_ptr + k * mask_step + mask_ahead + b);
    }
  }
};

// Values of an earlier level, widened to `As` before they are added.
template <class Value, class As = Value>
struct LaneStreams {
  Lanes<Value> lanes;
  int64_t step;
  ALWAYS_INLINE As get(int64_t k, int64_t j) const { return As(lanes.get(k * step + j)); }
};

// Lane j is a run of `step` values, of which k is one.
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
  fold_loop<n_streams>(streams, n, out);
}

constexpr int64_t n_at_once = 64;  // one call a chunk: each is a loop unrolled, and there are hundreds

struct Run {
  unsigned char bytes[n_lanes] = {};
  constexpr explicit Run(unsigned char byte) {
    for (unsigned char& each : bytes) each = byte;
  }
};

constexpr Run ones(1), zeros(0);

// A chunk of streams with and without a mask, of which some may not be there: those have every cell hidden.
template <class CellType, int n_streams>
struct PaddedStreams {
  const unsigned char *cells_ptr[n_streams], *mask_ptr[n_streams];
  CellType cell;

  template <bool is_masked>
  PaddedStreams(const CellStreams<CellType, is_masked>& streams, int64_t count) : cell(streams.cell) {
    for (int64_t k = 0; k < n_streams; ++k) {
      cells_ptr[k] = streams.cells_ptr + (k < count ? k : 0) * streams.step_bytes;
      mask_ptr[k] = k >= count ? zeros.bytes : is_masked ? streams.mask_ptr + k * streams.mask_step : ones.bytes;
    }
  }
  ALWAYS_INLINE auto get(int64_t k, int64_t j) const {
    return load_cell<CellType, true>(of_lane(cell, j), cells_ptr[k], mask_ptr[k], j);
  }
};

// Streams of cells, and those to come prefetched meanwhile.
template <class Cell, bool is_masked, class Value>
NEVER_INLINE void fold(const CellStreams<Cell, is_masked>& given, int64_t count, int64_t n, Lanes<Value> out) {
  const int64_t n_chunks = n / n_at_once;
  for (int64_t c = 0; c * n_at_once < n; ++c) {
    if (!given.is_near && c < n_chunks) given.prefetch(count * c / n_chunks, count * (c + 1) / n_chunks, n);
    const CellStreams<Cell, is_masked> streams = given.from(c * n_at_once);
    const int64_t some = least(n_at_once, n - c * n_at_once);
    const Lanes<Value> out_c = out.from(c * n_at_once);
    if (count == 8) {
      fold_loop<8>(streams, some, out_c);
    } else if (count > 4) {
      fold_streams<8>(PaddedStreams<Cell, 8>(streams, count), some, out_c);
    } else {
      fold_streams<4>(PaddedStreams<Cell, 4>(streams, count), some, out_c);
    }
  }
}

// The same, by way of `room` where the values are wider than those of the level.
template <class Streams, class Near, class Value>
void fold_few(const Streams& streams, int64_t count, int64_t n, Lanes<Near> room, Lanes<Value> out) {
  if constexpr (std::is_same_v<Near, Value>) return fold(streams, count, n, out);
  fold(streams, count, n, room);
  fold_streams<1>(LaneStreams<Near, Value>{room, 0}, n, out);
}

// ---- cells of lanes: a pattern of their lanes, as the cells lie ----------------------------------------------------

constexpr int64_t n_wide = 2048;

template <class Cell, bool = is_of_lanes<Cell>>
struct Pattern {
  const Cell& of(const Cell& cell, int64_t, int64_t, int64_t) const { return cell; }
};

template <class Cell>
struct Pattern<Cell, true> {
  alignas(64) typename Cell::Lane lanes[n_wide];

  // Each of `groups` times `inner` lanes, `rows` times.
  NEVER_INLINE Cell of(const Cell& cell, int64_t groups, int64_t rows, int64_t inner) {
    if (inner == 1) {
      rows == 3 ? repeat<3>(cell.lanes, groups, rows) : repeat<0>(cell.lanes, groups, rows);
      return Cell(lanes);
    }
    for (int64_t k = 0; k < groups * rows; ++k) {
      std::memcpy(lanes + k * inner, cell.lanes + k / rows * inner, static_cast<size_t>(inner) * sizeof *lanes);
    }
    return Cell(lanes);
  }

  template <int rows_known>
  void repeat(const typename Cell::Lane* from, int64_t groups, int64_t given_rows) {
    const int64_t rows = rows_known ? rows_known : given_rows;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < rows; ++i) lanes[g * rows + i] = from[g];
    }
  }
};

// ---- a dense leaf: rows of `inner` cells one after another --------------------------------------------------------

constexpr int n_dense = 512;  // lanes after the first level: leaf / 8 * inner

// Rows h apart are folded first: as many lanes as h * inner.
inline int64_t first_level_rows(int64_t rows) { return rows <= 8 ? 1 : rows <= 64 ? 8 : rows <= 512 ? 64 : 512; }

// (rows, inner) cells -> inner values. 64 is where Near ends.
template <class SumType>
struct DenseLeaf {
  using Near = typename SumType::Near;
  using Far = typename SumType::Far;
  using Cell = typename SumType::Cell;

  Room<Near, n_dense> near_512;
  Room<Near, n_dense / 8> near_64;
  Room<Far, n_dense / 8> far_8;
  Pattern<Cell> pattern;

  void operator()(const unsigned char* cells_ptr, const unsigned char* mask_ptr, int64_t rows, int64_t inner,
                  Lanes<Far> out, const Cell& given) {
    const int64_t h = first_level_rows(rows);
    const Cell cell = pattern.of(given, 1, h, inner);
    if (is_of_mask<SumType> || !mask_ptr) {
      level<false>(cells_ptr, nullptr, rows, h, inner, out, cell);
    } else {
      level<!is_of_mask<SumType>>(cells_ptr, mask_ptr, rows, h, inner, out, cell);
    }
    if (h == 1) return;
    if (h == 8) return again<Near>(near_512.lanes(), inner, out);
    again<Near>(near_512.lanes(), h / 8 * inner, near_64.lanes());
    if (h == 64) return again<Far>(near_64.lanes(), inner, out);
    again<Far>(near_64.lanes(), 8 * inner, far_8.lanes());
    again<Far>(far_8.lanes(), inner, out);
  }

  // Rows i, i + h, i + 2h, ... for each i < h; the last of them may be there for the first rows only.
  template <bool is_masked>
  void level(const unsigned char* cells_ptr, const unsigned char* mask_ptr, int64_t rows, int64_t h, int64_t inner,
             Lanes<Far> out, const Cell& cell) {
    constexpr int64_t cell_bytes = sizeof(typename Cell::Raw);
    // What follows a leaf in memory is the next leaf, of this row or of the next.
    const int64_t step = h * inner, ahead = rows * inner;
    const CellStreams<Cell, is_masked> streams{
        cells_ptr, mask_ptr, step * cell_bytes, step, ahead * cell_bytes, ahead, cell};
    const Lanes<Near> near = near_512.lanes();
    if (h == 1) return fold_few(streams, rows, inner, near, out);
    const int64_t count = (rows + h - 1) / h;
    const int64_t n_last = (rows - (count - 1) * h) * inner;
    fold(streams, count, n_last, near);
    if (n_last < h * inner) fold(streams.from(n_last), count - 1, h * inner - n_last, near.from(n_last));
  }

  template <class As, class From, class Value>
  void again(Lanes<From> from, int64_t n, Lanes<Value> out) {
    fold_streams<8>(LaneStreams<From, As>{from, n}, n, out);
  }
};

// ---- short leaves: the first level would be a loop over a few cells ------------------------------------------------

constexpr int64_t n_short = 64;  // lanes of the first level from which DenseLeaf is a vector loop over wide cells

inline bool is_short(int64_t rows, int64_t inner) { return first_level_rows(rows) * inner < n_short; }

template <int rows, class Value, class Far>
NEVER_INLINE void across(Lanes<Value> lanes, int64_t groups, int64_t inner, Lanes<Far> out) {
  if (inner == 1) return fold_loop<rows>(RowStreams<Value, rows>{lanes}, groups, out);
  for (int64_t g = 0; g < groups; ++g) {
    fold_loop<rows>(LaneStreams<Value>{lanes.from(g * rows * inner), inner}, inner, out.from(g * inner));
  }
}

// Rows 8 apart first, the last of which may be there for some only; then the eight that are left.
template <int n_streams, class Wide, class Near, class Far>
NEVER_INLINE void twice(Lanes<Wide> wide, Lanes<Near> eighths, int64_t groups, int64_t rows, int64_t inner,
                        Lanes<Far> out) {
  const int64_t n_last = (rows - 8 * (n_streams - 1)) * inner;
  for (int64_t g = 0; g < groups; ++g) {
    const LaneStreams<Wide> streams{wide.from(g * rows * inner), 8 * inner};
    const Lanes<Near> eight_rows = eighths.from(g * 8 * inner);
    if (n_last == 8 * inner) {  // eight at a time is a vector, where a loop over so few would not be one
      for (int64_t j = 0; j < n_last; j += 8) {
        fold_loop<n_streams>(LaneStreams<Wide>{streams.lanes.from(j), streams.step}, 8, eight_rows.from(j));
      }
      continue;
    }
    fold_loop<n_streams>(streams, n_last, eight_rows);
    const LaneStreams<Wide> shorter{streams.lanes.from(n_last), streams.step};
    fold_loop<n_streams - 1>(shorter, 8 * inner - n_last, eight_rows.from(n_last));
  }
  across<8>(eighths, groups, inner, out);
}

template <class Wide, class Near, class Far>
void fold_groups(Lanes<Wide> wide, Lanes<Near> eighths, int64_t groups, int64_t rows, int64_t inner, Lanes<Far> out) {
  switch (rows <= 8 ? rows : (rows + 7) / 8 + 7) {
    case 1: return across<1>(wide, groups, inner, out);
    case 2: return across<2>(wide, groups, inner, out);
    case 3: return across<3>(wide, groups, inner, out);
    case 4: return across<4>(wide, groups, inner, out);
    case 5: return across<5>(wide, groups, inner, out);
    case 6: return across<6>(wide, groups, inner, out);
    case 7: return across<7>(wide, groups, inner, out);
    case 8: return across<8>(wide, groups, inner, out);
    case 9: return twice<2>(wide, eighths, groups, rows, inner, out);
    case 10: return twice<3>(wide, eighths, groups, rows, inner, out);
    case 11: return twice<4>(wide, eighths, groups, rows, inner, out);
    case 12: return twice<5>(wide, eighths, groups, rows, inner, out);
    case 13: return twice<6>(wide, eighths, groups, rows, inner, out);
    case 14: return twice<7>(wide, eighths, groups, rows, inner, out);
    default: return twice<8>(wide, eighths, groups, rows, inner, out);
  }
}

// Groups of (rows, inner) cells, many at once: widened as one run of cells, then folded, where all have one width. (The
// compiler fits a loop over bytes, floats and doubles to the bytes: it is a vector from 64 cells on.)
template <class SumType>
struct ShortLeaves {
  using Cell = typename SumType::Cell;
  using Wide = typename Cell::Wide;
  using Near = typename SumType::Near;
  using Far = typename SumType::Far;

  static_assert(n_wide >= 8 * n_short, "one group fits");

  Room<Wide, n_wide> wide;
  Room<Near, n_wide> eighths;
  Pattern<Cell> pattern;

  template <bool is_masked>
  void operator()(const CellStreams<Cell, is_masked>& group_streams, int64_t groups, int64_t rows, int64_t inner,
                  Lanes<Far> out) {
    const int64_t group_cells = rows * inner, most = n_wide / group_cells;
    auto streams = group_streams;
    for (int64_t g = 0; g < groups; g += most) {
      const int64_t some = least(most, groups - g);
      streams.cell = pattern.of(of_lane(group_streams.cell, g * inner), some, rows, inner);
      widen(streams, some, group_cells);
      fold_groups(wide.lanes(), eighths.lanes(), some, rows, inner, out.from(g * inner));
      streams.cells_ptr += some * streams.step_bytes;
      if (is_masked) streams.mask_ptr += some * streams.mask_step;
    }
  }

  template <bool is_masked>
  void widen(CellStreams<Cell, is_masked> streams, int64_t groups, int64_t group_cells) {
    constexpr int64_t cell_bytes = sizeof(typename Cell::Raw);
    if (streams.step_bytes == group_cells * cell_bytes && (!is_masked || streams.mask_step == group_cells)) {
      return fold_streams<1>(streams, groups * group_cells, wide.lanes());
    }
    for (int64_t g = 0; g < groups; ++g) {
      fold_streams<1>(streams, group_cells, wide.lanes().from(g * group_cells));
      streams.cell = of_lane(streams.cell, group_cells);
      streams.cells_ptr += streams.step_bytes;
      if (is_masked) streams.mask_ptr += streams.mask_step;
    }
  }
};

// ---- columns: rows far apart, a tile of neighbouring columns -------------------------------------------------------

// Rows i, i + s, i + 2s, ... of a leaf, folded to one value for each column; `levels` is log8 of how many there may be.
template <class SumType, int levels>
struct ColumnLeaf {
  using Value = std::conditional_t<(levels <= 2), typename SumType::Near, typename SumType::Far>;
  using Below = ColumnLeaf<SumType, levels - 1>;
  using Streams = typename Below::Streams;

  Below below;
  Room<typename Below::Value, 8 * n_lanes> folded;

  template <class Out>
  void operator()(const Streams& rows, int64_t n_rows, int64_t columns, Lanes<Out> out) {
    if (n_rows <= 8) return below(rows, n_rows, columns, out);
    for (int64_t g = 0; g < 8; ++g) {
      Streams every_eighth = rows;
      every_eighth.cells_ptr += g * rows.step_bytes;
      if (every_eighth.mask_ptr) every_eighth.mask_ptr += g * rows.mask_step;
      every_eighth.step_bytes *= 8, every_eighth.mask_step *= 8;
      const int64_t rows_ahead = g < 7 ? 1 : n_rows - 7;
      every_eighth.ahead_bytes = rows_ahead * rows.step_bytes, every_eighth.mask_ahead = rows_ahead * rows.mask_step;
      below(every_eighth, (n_rows - g + 7) / 8, columns, folded.lanes().from(g * n_lanes));
    }
    fold_streams<8>(LaneStreams<typename Below::Value, Value>{folded.lanes(), n_lanes}, columns, out);
  }
};

template <class SumType>
struct ColumnLeaf<SumType, 1> {
  using Value = typename SumType::Near;
  using Streams = CellStreams<typename SumType::Cell, !is_of_mask<SumType>>;

  Room<Value, n_lanes> few;

  template <class Out>
  void operator()(const Streams& rows, int64_t n_rows, int64_t columns, Lanes<Out> out) {
    fold_few(rows, n_rows, columns, few.lanes(), out);
  }
};
