// The cells of a leaf where they lie, if they are rows of float or double; else gathered.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

// A leaf as it is read: cells of T side by side, lane after lane, row after row, in chunks.
struct LeafCells {
  const unsigned char* cells_ptr;
  const unsigned char* keep_ptr;  // dense; null: all count, or what is hidden is -inf already
  int64_t n, lanes;
  int64_t row_step;  // from one row to the next
  int64_t period;  // cells of a chunk but for the last: whole rows, lane values repeated to it are a pattern
  int64_t step, keep_step;  // from one chunk to the next
  int64_t ahead;  // to the cells that are fetched meanwhile

  bool has_mask_in_place() const { return keep_ptr && keep_step != period; }
  int64_t keep_ahead() const { return has_mask_in_place() ? n_ahead_rows * keep_step : n_ahead; }

  // Some of the lanes.
  LeafCells part(int64_t first, int64_t some, int64_t bytes) const {
    return {cells_ptr + first * bytes, keep_ptr ? keep_ptr + first : nullptr, n / lanes * some, some, row_step, some,
            row_step, period == lanes ? keep_step : lanes, ahead};
  }
};

// Chunks of a leaf: visit(cells, keep, place in the leaf, cells of it).
template <class T, class Visit>
ALWAYS_INLINE void each_chunk(const LeafCells& leaf, const Visit& visit) {
  constexpr int64_t bytes = sizeof(T);
  const unsigned char *cells_ptr = leaf.cells_ptr, *keep_ptr = leaf.keep_ptr;
  for (int64_t start = 0; start < leaf.n; start += leaf.period) {
    const int64_t n = least(leaf.period, leaf.n - start);
    if (leaf.ahead) prefetch(cells_ptr + leaf.ahead * bytes, n * bytes);
    visit(cells_ptr, keep_ptr, start, n);
    cells_ptr += leaf.step * bytes;
    if (keep_ptr) keep_ptr += leaf.keep_step;
  }
}

// A cell as it is read: -inf under the mask.
template <class T>
struct CellOf {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static constexpr Bits sign = Bits{1} << (8 * sizeof(T) - 1);
  static constexpr Bits hidden = static_cast<Bits>(sizeof(T) == 4 ? 0xff800000u : 0xfff0000000000000u);  // -inf
  Bits flip;  // the sign, where cells are negated

  template <bool is_masked>
  ALWAYS_INLINE T get(const unsigned char* cells_ptr, const unsigned char* keep_ptr, int64_t j) const {
    Bits bits;
    std::memcpy(&bits, cells_ptr + j * static_cast<int64_t>(sizeof bits), sizeof bits);
    bits ^= flip;
    if constexpr (is_masked) bits = choose<Bits>(static_cast<Bits>(-static_cast<Bits>(keep_ptr[j])), bits, hidden);
    return bits_as<T>(bits);
  }
};

// Room for the cells that are gathered.
struct LeafCellsRoom {
  bool negates = false;
  bool is_narrow = false;  // the cells are gathered as floats
  const unsigned char* keep_ptr;
  alignas(64) double gathered[n_tile];
  alignas(64) unsigned char keep[n_tile];

  // The window's cells; `keep_ptr` is then their mask, unless `walks_mask`: rows of bytes may stay where they lie too.
  LeafCells load(const Block& block, const Window& w, bool walks_mask) {
    const int64_t lanes = w.lanes(), bytes = is_narrow ? 4 : 8, period = period_of(lanes);
    const Operand &data = block.data, &mask = block.mask;
    const bool is_dense = w.groups == 1 && (w.columns == 1 || data.stride_inner == 1) &&
                          (w.rows <= 1 || data.stride_n == w.columns);
    const bool are_rows = !is_dense && w.groups == 1 && data.stride_inner == 1 && w.columns >= 16;
    const bool is_direct = block.dtype == (is_narrow ? Dtype::f32 : Dtype::f64) && (is_dense || are_rows);
    const bool are_bytes = mask.cells_ptr && !mask.compact_ptr && mask.stride_inner == 1 && !block.omits_nan;
    const bool in_place = walks_mask && is_direct && are_rows && are_bytes;
    keep_ptr = in_place ? window_ptr(mask, w, 1) : gather_keep(block, w, keep);
    if (is_direct) {
      const unsigned char* const cells_ptr = window_ptr(data, w, bytes);
      if (is_dense) return {cells_ptr, keep_ptr, w.cells(), lanes, lanes, period, period, period, n_ahead};
      return {cells_ptr, keep_ptr, w.cells(), lanes, data.stride_n, lanes, data.stride_n,
              in_place ? mask.stride_n : lanes, n_ahead_rows * data.stride_n};
    }
    const double hidden = negates ? infinity : -infinity;
    if (is_narrow) {
      gather_floats(block.dtype, data, w, keep_ptr, static_cast<float>(hidden), reinterpret_cast<float*>(gathered));
    } else {
      gather_doubles(block.dtype, data, w, keep_ptr, hidden, gathered);
    }
    const auto* const cells_ptr = reinterpret_cast<const unsigned char*>(gathered);
    return {cells_ptr, nullptr, w.cells(), lanes, lanes, period, period, period, 0};
  }
};
