// One block, leaf by leaf: each leaf's cells become a state, the states a tree's.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

constexpr int64_t n_tile_cells = 1 << 16;  // a tile of many short rows stays in L2

// Tiles whose leaves are folded in turns: a row is then read in runs as long as a page, which the processor prefetches.
// Tile by tile over all rows, 8192 x 1024 float32 took twice as long.
constexpr int64_t n_strip_tiles = 8;

// Short rows share a tile; a wide block is cut into columns.
inline Window first_tile(const Block& block) {
  const int64_t columns = least(block.inner, n_lanes);
  const int64_t group_cells = block.n * block.inner;
  int64_t groups = columns < block.inner ? 1 : n_lanes / columns;
  if (groups * group_cells > n_tile_cells) groups = group_cells > n_tile_cells ? 1 : n_tile_cells / group_cells;
  return {0, least(groups, block.outer), 0, 0, 0, columns};
}

ALWAYS_INLINE double at_least_one(int64_t count) { return static_cast<double>(count > 1 ? count : 1); }

// LeafKernel(leaf, the counts of its valid cells, state) for each leaf. One that is masked serves a block with no mask
// too, by a mask of ones.
template <class LeafKernel>
struct BlockWalk {
  using State = typename LeafKernel::State;
  static constexpr bool is_masked = LeafKernel::is_masked;
  static constexpr bool counts_cells = std::is_same_v<State, CountState>;

  const Block& block;
  const Walk walk;
  const Parts& parts;
  LeafTree<State> trees[n_strip_tiles];
  std::unique_ptr<unsigned char[]> keep_copy;
  LeafKernel kernel;
  CountState counts;

  BlockWalk(const Block& given, Walk how, const Parts& to, const Window& tile) : block(given), walk(how), parts(to) {
    const int64_t n_cells = tile.lanes() * least(given.leaf, given.n);
    if (is_masked) keep_copy.reset(new unsigned char[n_cells]);
    if (is_masked && !block.is_masked()) std::memset(keep_copy.get(), 1, static_cast<size_t>(n_cells));
  }

  void operator()(const Window& first) {
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
    Leaf leaf{walk, block.leaf, tile, block.data, Operand()};
    leaf.data.cells_ptr = tile_ptr(block.data, tile, cell_bytes(block.dtype));
    const bool is_first = tile.i == 0;
    int64_t* const count = is_first ? tree.count.count : counts.count;
    if (is_masked && !block.is_masked()) {
      leaf.keep = {keep_copy.get(), tile.rows * tile.columns, tile.columns, 1};
    } else if (is_masked) {
      leaf.keep = tile_keep(block, walk, tile, keep_copy.get());
    }
    if (block.is_masked()) {
      count_leaf(leaf, count);
    } else {
      for (int64_t l = 0; l < tile.lanes(); ++l) count[l] = tile.rows;
    }
    kernel(leaf, count, tree.next());
    if (!is_first) tree.count.join(counts, tile.lanes());
    tree.push(tile.lanes());
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
  const Window first = first_tile(block);
  BlockWalk<LeafKernel>(block, walk, parts, first)(first);
}

// False, with nothing written, where no route is found.
template <class MaskedKernel, class Kernel>
bool walk_route(const Block& given, const Parts& given_parts) {
  if (given.outer == 0 || given.inner == 0) return true;
  Route route = find_route(given);
  if (!route.found) return false;
  Parts parts = given_parts;
  const int64_t n_results = route.block.outer * route.block.inner;
  for (int64_t r = 0; r < route.repeats; ++r) {
    (route.block.is_masked() ? walk_block<MaskedKernel> : walk_block<Kernel>)(route.block, route.walk, parts);
    if (route.block.mask.cells_ptr) route.block.mask.cells_ptr += route.mask_repeat;
    route.block.data.cells_ptr += route.data_repeat * cell_bytes(given.dtype);
    parts.count_ptr += n_results;
    for (void*& part_ptr : parts.part_ptr) {
      if (part_ptr) part_ptr = static_cast<int64_t*>(part_ptr) + n_results;
    }
  }
  return true;
}
