// The sums and the counts of valid cells.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tree.hpp"

#include "fold.hpp"

#include "walk.hpp"

// ---- settle: a leaf's sums become a state --------------------------------------------------------------------------

inline void settle(Lanes<Sum<double>> sums, int64_t n, PlainState& state) {
  for (int64_t j = 0; j < n; ++j) state.total[j] = sums.sum[j] + 0.0;  // -0 becomes +0
}

inline void settle(Lanes<Sum<int64_t>> sums, int64_t n, CountState& state) { copy_lanes(sums.sum, n, state.count); }

inline void settle(Lanes<Sum<int64_t>> sums, int64_t n, LimbState& state) {
  for (int64_t j = 0; j < n; ++j) {
    state.high[j] = sums.sum[j] >> 32;
    state.low[j] = sums.sum[j] & 0xffffffff;
  }
}

inline void settle(Lanes<Halves> sums, int64_t n, LimbState& state) {
  for (int64_t j = 0; j < n; ++j) {
    state.high[j] = sums.high[j] + (sums.low[j] >> 32);
    state.low[j] = sums.low[j] & 0xffffffff;
  }
}

inline void settle(Lanes<Twofold> sums, int64_t n, TwofoldState& state) {
  for (int64_t j = 0; j < n; ++j) {
    state.hi[j] = sums.hi[j] + 0.0;
    state.lo[j] = sums.lo[j] + 0.0;
    state.exponent[j] = 0;
  }
}

// The lanes that overflowed, or met an infinity or a NaN, take the sums of the cells scaled down.
inline void settle_scaled(Lanes<Twofold> sums, int64_t n, TwofoldState& state) {
  for (int64_t j = 0; j < n; ++j) {
    if (is_finite(state.hi[j]) && is_finite(state.lo[j])) continue;
    state.hi[j] = sums.hi[j] + 0.0;
    state.lo[j] = is_finite(state.hi[j]) ? sums.lo[j] + 0.0 : 0.0;
    state.exponent[j] = scaled_exponent;
  }
}

template <class SumType, bool is_masked>
struct LeafState {
  using State = typename SumType::State;
  TileFold<SumType, is_masked> fold_tile;
  Room<typename SumType::Far, n_lanes> sums;

  void operator()(Walk walk, int64_t leaf, const Tile& tile, const Operand& data, const Operand& mask, State& state) {
    fold_tile(walk, leaf, tile, data, mask, sums.lanes());
    settle(sums.lanes(), tile.lanes(), state);
    if constexpr (std::is_same_v<State, TwofoldState>) {
      if (!state.all_finite(tile.lanes())) again_scaled(walk, leaf, tile, data, mask, state);
    }
  }

  NEVER_INLINE void again_scaled(Walk walk, int64_t leaf, const Tile& tile, const Operand& data, const Operand& mask,
                                 State& state) {
    TileFold<ScaledF64Sum, is_masked> fold_scaled;
    fold_scaled(walk, leaf, tile, data, mask, sums.lanes());
    settle_scaled(sums.lanes(), tile.lanes(), state);
  }
};

// ---- one block -----------------------------------------------------------------------------------------------------

constexpr int64_t n_tile_cells = 1 << 16;  // a tile of many short rows stays in L2

// Tiles whose leaves are folded in turns: a row is then read in runs as long as a page, which the processor prefetches.
// Tile by tile over all rows, 8192 x 1024 float32 took twice as long.
constexpr int64_t n_strip_tiles = 8;

// Short rows share a tile; a wide block is cut into columns.
inline Tile first_tile(const Block& block) {
  const int64_t columns = least(block.inner, n_lanes);
  const int64_t group_cells = block.n * block.inner;
  int64_t groups = columns < block.inner ? 1 : n_lanes / columns;
  if (groups * group_cells > n_tile_cells) groups = group_cells > n_tile_cells ? 1 : n_tile_cells / group_cells;
  return {0, least(groups, block.outer), 0, 0, 0, columns};
}

template <class SumType, bool is_masked>
struct BlockSum {
  using State = typename SumType::State;
  static constexpr bool counts_cells = std::is_same_v<State, CountState>;
  static constexpr int64_t cell_bytes = sizeof(typename SumType::Cell::Raw);

  const Block& block;
  const Walk walk;
  const Parts& parts;
  LeafTree<State> trees[n_strip_tiles];
  std::unique_ptr<unsigned char[]> mask_copy;
  LeafState<SumType, is_masked> leaf_state;
  LeafState<MaskSum, false> leaf_count;
  CountState leaf_counts;

  BlockSum(const Block& given, Walk how, const Parts& to, const Tile& tile) : block(given), walk(how), parts(to) {
    if (is_masked) mask_copy.reset(new unsigned char[tile.lanes() * least(given.leaf, given.n)]);
  }

  void operator()(const Tile& first) {
    Tile tile = first;
    for (tile.o = 0; tile.o < block.outer; tile.o += first.groups) {
      tile.groups = least(first.groups, block.outer - tile.o);
      for (int64_t c = 0; c < block.inner; c += n_strip_tiles * first.columns) {
        sum_strip(tile, c, least(block.inner, c + n_strip_tiles * first.columns), first.columns);
      }
    }
  }

  // Columns [c_first, c_last), a tile every `columns`.
  void sum_strip(Tile& tile, int64_t c_first, int64_t c_last, int64_t columns) {
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
      each_tile([&](LeafTree<State>& tree) { sum_leaf(tile, tree); });
    }
    each_tile([&](LeafTree<State>& tree) { write(tile, tree); });
  }

  void sum_leaf(const Tile& tile, LeafTree<State>& tree) {
    Operand data = block.data, mask;
    data.cells_ptr = tile_ptr(data, tile, cell_bytes);
    if constexpr (is_masked) {
      mask = tile_keep(block, walk, tile, mask_copy.get());
      const bool is_first = tile.i == 0;
      leaf_count(walk, block.leaf, tile, mask, Operand(), is_first ? tree.count : leaf_counts);
      if (!is_first) tree.count.join(leaf_counts, tile.lanes());
    }
    leaf_state(walk, block.leaf, tile, data, mask, tree.next());
    tree.push(tile.lanes());
  }

  void write(const Tile& tile, LeafTree<State>& tree) {
    const int64_t n = tile.lanes(), at = tile.o * block.inner + tile.c;
    const State& state = tree.finish(n);
    state.write(parts, at, n);
    if constexpr (counts_cells) {
      copy_lanes(state.count, n, parts.count_ptr + at);
    } else if (is_masked && block.n > 0) {
      copy_lanes(tree.count.count, n, parts.count_ptr + at);
    } else {
      for (int64_t j = 0; j < n; ++j) parts.count_ptr[at + j] = block.n;
    }
  }
};

template <class SumType, bool is_masked>
NEVER_INLINE void sum_block(const Block& block, Walk walk, const Parts& parts) {
  const Tile first = first_tile(block);
  BlockSum<SumType, is_masked>(block, walk, parts, first)(first);
}

template <class SumType>
bool sum_route(const Block& given, const Parts& given_parts) {
  if (given.outer == 0 || given.inner == 0) return true;
  Route route = find_route(given);
  if (!route.found) return false;
  Parts parts = given_parts;
  const int64_t cell_bytes = sizeof(typename SumType::Cell::Raw);
  const int64_t n_results = route.block.outer * route.block.inner;
  for (int64_t r = 0; r < route.repeats; ++r) {
    if (route.block.is_masked()) {
      sum_block<SumType, true>(route.block, route.walk, parts);
      if (route.block.mask.cells_ptr) route.block.mask.cells_ptr += route.mask_repeat;
    } else {
      sum_block<SumType, false>(route.block, route.walk, parts);
    }
    route.block.data.cells_ptr += route.data_repeat * cell_bytes;
    parts.count_ptr += n_results;
    for (void*& part_ptr : parts.part_ptr) {
      if (part_ptr) part_ptr = static_cast<int64_t*>(part_ptr) + n_results;
    }
  }
  return true;
}

}  // namespace

bool total(const Block& block, const Options&, const Parts& parts) {
  switch (block.dtype) {
    case Dtype::f64: return sum_route<F64Sum>(block, parts);
    case Dtype::f32: return sum_route<F32Sum>(block, parts);
    case Dtype::f16: return sum_route<F16Sum>(block, parts);
    case Dtype::bf16: return sum_route<BF16Sum>(block, parts);
    case Dtype::i8: return sum_route<I8Sum>(block, parts);
    case Dtype::i16: return sum_route<I16Sum>(block, parts);
    case Dtype::i32: return sum_route<I32Sum>(block, parts);
    case Dtype::i64: return sum_route<I64Sum>(block, parts);
    case Dtype::u8:
    case Dtype::boolean: return sum_route<U8Sum>(block, parts);
  }
  return false;
}

// The count is the sum of the mask's own bytes; without a mask it is n.
bool count(const Block& block, const Options&, const Parts& parts) {
  if (block.omits_nan) return count_numbers(block, parts);
  if (!block.mask.cells_ptr) {
    for (int64_t j = 0; j < block.outer * block.inner; ++j) parts.count_ptr[j] = block.n;
    return true;
  }
  Block mask_block = block;
  mask_block.data = block.mask;
  mask_block.mask = Operand();
  return sum_route<MaskSum>(mask_block, parts);
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
