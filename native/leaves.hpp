// One block, leaf by leaf: each leaf's cells become a state, the states a tree's.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

constexpr int64_t n_tile_cells = 1 << 16;  // a tile of many short rows stays in L2
constexpr int64_t n_gathered = 1 << 15;    // and so does one with its cells gathered

// Tiles whose leaves are folded in turns: a row is then read in runs as long as a page, which the processor prefetches.
// Tile by tile over all rows, 8192 x 1024 float32 took twice as long.
constexpr int64_t n_strip_tiles = 8;

// Short rows share a tile; a wide block is cut into columns, 16 of them at least.
inline Window first_tile(const Block& block, int64_t most_cells) {
  const int64_t rows = least(block.n, block.leaf), most = n_lanes * rows <= most_cells ? n_lanes : most_cells / rows;
  const int64_t columns = least(block.inner, most_cells == n_tile_cells ? n_lanes : most < 16 ? 16 : most);
  const int64_t group_cells = block.n * block.inner;
  int64_t groups = columns < block.inner ? 1 : n_lanes / columns;
  if (groups * group_cells > most_cells) groups = group_cells > most_cells ? 1 : most_cells / group_cells;
  return {0, least(groups, block.outer), 0, 0, 0, columns};
}

ALWAYS_INLINE double at_least_one(int64_t count) { return static_cast<double>(count > 1 ? count : 1); }

// LeafKernel(leaf, the counts of its valid cells, state) for each leaf, of cells of its own dtype: others, which it has
// all values of, are gathered.
template <class LeafKernel>
struct BlockWalk {
  using State = typename LeafKernel::State;
  static constexpr Dtype dtype = LeafKernel::dtype;
  static constexpr bool counts_cells = std::is_same_v<State, CountState>;

  const Block& block;
  const Walk walk;
  const Parts& parts;
  LeafTree<State> trees[n_strip_tiles];
  std::unique_ptr<unsigned char[]> keep_copy, gathered;
  LeafKernel kernel;
  CountState counts;

  BlockWalk(const Block& given, Walk how, const Parts& to) : block(given), walk(how), parts(to) {}

  void operator()() {
    const bool gathers = block.dtype != dtype;
    const Window first = first_tile(block, gathers ? n_gathered : n_tile_cells);
    const int64_t n_cells = first.lanes() * least(block.leaf, block.n);
    if (block.is_masked()) keep_copy.reset(new unsigned char[n_cells]);
    if (gathers) gathered.reset(new unsigned char[n_cells * cell_bytes(dtype)]);
    walk_tiles(first);
  }

  void walk_tiles(const Window& first) {
    Window tile = first;
    for (tile.o = 0; tile.o < block.outer; tile.o += first.groups) {
      tile.groups = least(first.groups, block.outer - tile.o);
      for (int64_t c = 0; c < block.inner; c += n_strip_tiles * first.columns) {
        walk_strip(tile, c, least(block.inner, c + n_strip_tiles * first.columns), first.columns);
      }
    }
  }

  // Columns [c_first, c_last), a tile every `columns`.
  void walk_strip(Window& tile, int64_t c_first, int64_t c_last, int64_t columns) {
    const int64_t n_leaves = (block.n + block.leaf - 1) / block.leaf;
    const auto each_tile = [&](auto visit) {
      LeafTree<State>* tree_ptr = trees;
      for (tile.c = c_first; tile.c < c_last; tile.c += columns, ++tree_ptr) {
        tile.columns = least(columns, c_last - tile.c);
        visit(*tree_ptr);
      }
    };
    each_tile([&](LeafTree<State>& tree) { tree.begin(n_leaves); });
    for (tile.i = 0; tile.i < block.n; tile.i += block.leaf) {
      tile.rows = least(block.leaf, block.n - tile.i);
      each_tile([&](LeafTree<State>& tree) { walk_leaf(tile, tree); });
    }
    each_tile([&](LeafTree<State>& tree) { write(tile, tree); });
  }

  void walk_leaf(const Window& tile, LeafTree<State>& tree) {
    const bool is_first = tile.i == 0;
    int64_t* const count = is_first ? tree.count.count : counts.count;
    const Kept kept = kept_of(block.mask, tile);
    if (kept == Kept::none) {
      std::memset(count, 0, static_cast<size_t>(tile.lanes()) * sizeof *count);
      tree.next().clear(tile.lanes());
    } else {
      Leaf leaf{walk, block.leaf, tile, block.data, Operand()};
      leaf.data.cells_ptr = window_ptr(block.data, tile, cell_bytes(block.dtype));
      if (gathered) leaf.data = gather_tile(leaf);
      if (block.is_masked()) leaf.keep = tile_keep(block, walk, tile, kept, keep_copy.get());
      count_tile(leaf, count);
      kernel(leaf, count, tree.next());
    }
    if (!is_first) tree.count.join(counts, tile.lanes());
    tree.push(tile.lanes());
  }

  // How many cells of each lane count.
  void count_tile(const Leaf& leaf, int64_t* count) const {
    const Window& tile = leaf.tile;
    const Operand& mask = block.mask;
    if (!leaf.keep.cells_ptr) {
      for (int64_t l = 0; l < tile.lanes(); ++l) count[l] = tile.rows;
    } else if (mask.compact_ptr && !block.omits_nan && tile.columns == 1 && mask.stride_n == 1) {
      for (int64_t g = 0; g < tile.groups; ++g) {
        count[g] = count_run(mask, first_cell(mask, tile) + g * mask.stride_outer, tile.rows);
      }
    } else {
      count_leaf(leaf, count);
    }
  }

  // The cells as the walk goes, group by group, or all at once where they are one run.
  Operand gather_tile(const Leaf& leaf) {
    const int64_t n_group = leaf.tile.rows * leaf.tile.columns;
    Window w{0, 1, 0, leaf.tile.rows, 0, leaf.tile.columns};
    int64_t groups = leaf.tile.groups;
    if (walk == Walk::dense && leaf.data.stride_outer == n_group) w.rows *= groups, groups = 1;
    Block cells = block;
    cells.data = leaf.data;
    unsigned char* to_ptr = gathered.get();
    for (int64_t g = 0; g < groups; ++g, to_ptr += n_group * cell_bytes(dtype)) {
      if constexpr (dtype == Dtype::f32) {
        gather_floats(block.dtype, cells.data, w, nullptr, 0.0f, reinterpret_cast<float*>(to_ptr));
      } else if constexpr (dtype == Dtype::f64) {
        gather_doubles(block.dtype, cells.data, w, nullptr, 0.0, reinterpret_cast<double*>(to_ptr));
      } else {
        gather_integers(cells, w, nullptr, 0, reinterpret_cast<int64_t*>(to_ptr));
      }
      cells.data.cells_ptr += leaf.data.stride_outer * cell_bytes(block.dtype);
    }
    return {gathered.get(), n_group, leaf.tile.columns, 1};
  }

  void write(const Window& tile, LeafTree<State>& tree) {
    const int64_t n = tile.lanes(), at = tile.o * block.inner + tile.c;
    if (block.n == 0) tree.count.clear(n);
    const State& state = tree.finish(n);
    state.write(parts, at, n);
    if constexpr (counts_cells) {
      copy_lanes(state.count, n, parts.count_ptr + at);
    } else {
      copy_lanes(tree.count.count, n, parts.count_ptr + at);
    }
  }
};

template <class LeafKernel>
NEVER_INLINE void walk_block(const Block& block, Walk walk, const Parts& parts) {
  BlockWalk<LeafKernel>(block, walk, parts)();
}

// False, with nothing written, where no route is found.
template <class LeafKernel>
bool walk_route(const Block& given, const Parts& given_parts) {
  if (given.outer == 0 || given.inner == 0) return true;
  Route route = find_route(given);
  if (!route.found) return false;
  Parts parts = given_parts;
  const int64_t n_results = route.block.outer * route.block.inner;
  for (int64_t r = 0; r < route.repeats; ++r) {
    walk_block<LeafKernel>(route.block, route.walk, parts);
    route.block.mask.move_on(route.mask_repeat);
    route.block.data.cells_ptr += route.data_repeat * cell_bytes(given.dtype);
    parts.count_ptr += n_results;
    for (void*& part_ptr : parts.part_ptr) {
      if (part_ptr) part_ptr = static_cast<int64_t*>(part_ptr) + n_results;
    }
  }
  return true;
}
