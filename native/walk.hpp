// Walking a block: which of the layouts it has, and its tiles.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

// A block turned so that a walk at full speed exists; results stay in the order of the original.
struct Route {
  bool found = false;
  Walk walk = Walk::dense;
  Block block;
  int64_t repeats = 1;  // the block is walked once for each outer index, as `block` with the data moved on
  int64_t data_repeat = 0, mask_repeat = 0;
};

// Strides of a dim of size 1 (or 0) mean nothing: give them the value of a dense tensor.
inline void densify(const Block& block, Operand& operand) {
  if (block.inner == 1) operand.stride_inner = 1;
  if (block.n == 0) operand.stride_inner = 1;
  if (block.n <= 1) operand.stride_n = block.inner;
  if (block.outer == 1) operand.stride_outer = block.n * block.inner;
}

inline bool is_dense(const Block& block, const Operand& operand) {
  return operand.stride_inner == 1 && operand.stride_n == block.inner;
}

inline void transpose(Operand& operand) {
  operand.stride_inner = operand.stride_outer;
  operand.stride_outer = 0;
}

inline Route find_route(const Block& given) {
  Route route;
  route.found = true;
  Block& block = route.block = given;
  densify(block, block.data), densify(block, block.mask);
  if (is_dense(block, block.data) && block.leaf / 8 * block.inner <= n_dense) return route;
  if (block.inner > 1 && block.data.stride_inner == 1) {
    route.walk = Walk::columns;
    return route;
  }
  if (block.inner == 1 && block.data.stride_outer == 1) {  // rows of a transposed tensor are columns
    block.inner = block.outer, block.outer = 1;
    transpose(block.data), transpose(block.mask);
    route.walk = Walk::columns;
    return route;
  }
  if (block.inner > 1 && block.data.stride_n == 1) {  // columns of a transposed tensor are rows
    route.repeats = block.outer;
    route.data_repeat = block.data.stride_outer, route.mask_repeat = block.mask.stride_outer;
    block.outer = block.inner, block.inner = 1;
    block.data.stride_outer = block.data.stride_inner, block.mask.stride_outer = block.mask.stride_inner;
    densify(block, block.data), densify(block, block.mask);
    return route;
  }
  route.found = false;
  return route;
}

// A tile of doubles, (rows, lanes), as a leaf.
inline Leaf leaf_of_tile(const Window& w, const void* cells, const unsigned char* keep_ptr) {
  const int64_t lanes = w.lanes();
  const Walk walk = first_level_rows(w.rows) * lanes <= n_dense ? Walk::dense : Walk::columns;
  return {walk, w.rows, {0, 1, 0, w.rows, 0, lanes},
          {static_cast<const unsigned char*>(cells), w.cells(), lanes, 1}, {keep_ptr, w.cells(), lanes, 1}};
}

// The bytes of a tile of a compact mask, group by group and row by row.
inline void spread_tile(const Operand& mask, const Window& tile, unsigned char* to_ptr) {
  const bool is_done = each_dense_run(mask, tile, [&](int64_t first, int64_t n) {
    spread_mask(mask, first, n, to_ptr);
    to_ptr += n;
    return true;
  });
  if (is_done) return;
  for (int64_t g = 0; g < tile.groups; ++g) {
    for (int64_t i = 0; i < tile.rows; ++i, to_ptr += tile.columns) {
      const int64_t row = first_cell(mask, tile) + g * mask.stride_outer + i * mask.stride_n;
      for (int64_t c = 0; c < tile.columns; ++c) to_ptr[c] = mask_cell(mask, row + c * mask.stride_inner);
    }
  }
}

// The mask of a tile, walkable as the data are; where its strides differ (a broadcast mask), copied out.
inline Operand tile_mask(const Block& block, Walk walk, const Window& tile, unsigned char* copy_ptr) {
  Operand mask = block.mask;
  if (mask.compact_ptr) {
    spread_tile(mask, tile, copy_ptr);
    return {copy_ptr, tile.rows * tile.columns, tile.columns, 1};
  }
  mask.cells_ptr = window_ptr(mask, tile, 1);
  const bool walkable = walk == Walk::columns ? mask.stride_inner == 1 : is_dense(block, mask);
  if (walkable) return mask;
  unsigned char* to_ptr = copy_ptr;
  for (int64_t g = 0; g < tile.groups; ++g) {
    if (tile.columns == 1 && mask.stride_n == 0) {  // one byte for all cells of a slice
      std::memset(to_ptr, mask.cells_ptr[g * mask.stride_outer], static_cast<size_t>(tile.rows));
      to_ptr += tile.rows;
      continue;
    }
    for (int64_t i = 0; i < tile.rows; ++i, to_ptr += tile.columns) {
      const unsigned char* row_ptr = mask.cells_ptr + g * mask.stride_outer + i * mask.stride_n;
      if (mask.stride_inner == 0) {
        std::memset(to_ptr, *row_ptr, static_cast<size_t>(tile.columns));
      } else {
        for (int64_t c = 0; c < tile.columns; ++c) to_ptr[c] = row_ptr[c * mask.stride_inner];
      }
    }
  }
  return {copy_ptr, tile.rows * tile.columns, tile.columns, 1};
}

template <class ToNumber>
NEVER_INLINE void keep_numbers(const ToNumber& given, const unsigned char* cells_ptr, int64_t n,
                               unsigned char* keep_ptr) {
  const ToNumber is_number = given;
  for (int64_t j = 0; j < n; ++j) {
    typename ToNumber::Raw raw;
    std::memcpy(&raw, cells_ptr + j * static_cast<int64_t>(sizeof raw), sizeof raw);
    keep_ptr[j] &= is_number(raw);
  }
}

// Which cells of a tile count: its mask, unless `all` do, and no NaN where those are omitted.
inline Operand tile_keep(const Block& block, Walk walk, const Window& tile, Kept kept, unsigned char* copy_ptr) {
  const bool is_masked = block.mask.cells_ptr && kept != Kept::all;
  const Operand mask = is_masked ? tile_mask(block, walk, tile, copy_ptr) : Operand();
  if (!block.omits_nan) return mask;
  const int64_t bytes = cell_bytes(block.dtype), run_rows = walk == Walk::columns ? 1 : tile.rows;
  const int64_t run = run_rows * tile.columns;  // cells that lie side by side
  const unsigned char* const cells_ptr = window_ptr(block.data, tile, bytes);
  unsigned char* to_ptr = copy_ptr;
  for (int64_t g = 0; g < tile.groups; ++g) {
    for (int64_t i = 0; i < tile.rows; i += run_rows, to_ptr += run) {
      if (!mask.cells_ptr) {
        std::memset(to_ptr, 1, static_cast<size_t>(run));
      } else if (mask.cells_ptr != copy_ptr) {
        std::memcpy(to_ptr, mask.cells_ptr + g * mask.stride_outer + i * mask.stride_n, static_cast<size_t>(run));
      }
      const unsigned char* const run_ptr = cells_ptr + (g * block.data.stride_outer + i * block.data.stride_n) * bytes;
      with_numbers(block.dtype, [&](const auto& is_number) { keep_numbers(is_number, run_ptr, run, to_ptr); });
    }
  }
  return {copy_ptr, tile.rows * tile.columns, tile.columns, 1};
}

// Folds a tile's cells to one value a lane; both operands start at the tile.
template <class SumType>
struct TileFold {
  using Cell = typename SumType::Cell;
  using Far = typename SumType::Far;
  static constexpr int64_t cell_bytes = sizeof(typename Cell::Raw);

  // One at a time is used, and none is initialised.
  union {
    DenseLeaf<SumType> dense;
    ShortLeaves<SumType> short_leaves;
    ColumnLeaf<SumType, 2> near_columns;
    ColumnLeaf<SumType, 4> far_columns;
  };
  TileFold() {}

  // The cells of lane l are read as of_lane(cell, l) reads them.
  void operator()(const Leaf& leaf, Lanes<Far> out, const Cell& cell = Cell()) {
    const Window& tile = leaf.tile;
    const Operand &data = leaf.data, &keep = leaf.keep;
    if (leaf.walk == Walk::dense && is_short(tile.rows, tile.columns)) {
      return is_of_mask<SumType> || !keep.cells_ptr ? fold_short<false>(leaf, out, cell)
                                                    : fold_short<!is_of_mask<SumType>>(leaf, out, cell);
    }
    for (int64_t g = 0; g < tile.groups; ++g) {
      const unsigned char* cells_ptr = data.cells_ptr + g * data.stride_outer * cell_bytes;
      const unsigned char* keep_ptr = keep.cells_ptr ? keep.cells_ptr + g * keep.stride_outer : nullptr;
      const Lanes<Far> out_g = out.from(g * tile.columns);
      const Cell cell_g = of_lane(cell, g * tile.columns);
      if (leaf.walk == Walk::dense) {
        dense(cells_ptr, keep_ptr, tile.rows, tile.columns, out_g, cell_g);
        continue;
      }
      const typename ColumnLeaf<SumType, 1>::Streams rows{
          cells_ptr, keep_ptr ? keep_ptr : ones.bytes, data.stride_n * cell_bytes, keep_ptr ? keep.stride_n : 0,
          0, 0, cell_g};
      if (leaf.most_rows <= 64) {
        near_columns(rows, tile.rows, tile.columns, out_g);
      } else {
        far_columns(rows, tile.rows, tile.columns, out_g);
      }
    }
  }

  template <bool is_masked>
  void fold_short(const Leaf& leaf, Lanes<Far> out, const Cell& cell) {
    const CellStreams<Cell, is_masked> groups{
        leaf.data.cells_ptr, leaf.keep.cells_ptr, leaf.data.stride_outer * cell_bytes, leaf.keep.stride_outer, 0, 0,
        cell};
    short_leaves(groups, leaf.tile.groups, leaf.tile.rows, leaf.tile.columns, out);
  }
};
