// Running sums: one cell after the other in a leaf, one leaf after the other.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "narrow.hpp"

#include "scan.hpp"

struct SumRoom {
  alignas(64) double cells[n_tile], sums[n_tile], errors[n_tile];
  alignas(64) int64_t integers[n_tile];
  alignas(64) unsigned char keep[n_tile];
  // of each lane: inside the leaf, and of the leaves before it
  alignas(64) double inside[n_tile_lanes], inside_error[n_tile_lanes];
  alignas(64) double before[n_tile_lanes], before_error[n_tile_lanes], leaf_errors[n_tile_lanes];
  alignas(64) int64_t running[n_tile_lanes];
};

// The sum inside the leaf, plus that of the leaves before it.
struct AddInLeaf {
  struct State {
    double inside, before;
  };
  double *cells, *inside;
  const double* before;
  ALWAYS_INLINE State load(int64_t l) const { return {inside[l], before[l]}; }
  ALWAYS_INLINE void store(int64_t l, State state) const { inside[l] = state.inside; }
  ALWAYS_INLINE void operator()(State& state, int64_t at, int64_t) const {
    state.inside = state.inside + cells[at];
    cells[at] = state.inside + state.before;
  }
};

// The same of pairs, the rounding errors summed alongside and added last (Sum2 as a scan).
struct AddPairsInLeaf {
  struct State {
    double inside, error, before, carried;
  };
  double *cells, *inside, *inside_error;
  const double *before, *carried;
  ALWAYS_INLINE State load(int64_t l) const { return {inside[l], inside_error[l], before[l], carried[l]}; }
  ALWAYS_INLINE void store(int64_t l, State state) const { inside[l] = state.inside, inside_error[l] = state.error; }
  ALWAYS_INLINE void operator()(State& state, int64_t at, int64_t) const {
    const double sum = state.inside + cells[at];
    state.error += rounding_error(state.inside, cells[at], sum);
    state.inside = sum;
    cells[at] = with_errors(state.before, sum, state.carried, state.error);
  }
  static ALWAYS_INLINE double with_errors(double before, double inside, double carried, double error) {
    const double total = before + inside;
    return total + (rounding_error(before, inside, total) + (carried + error));
  }
};

template <bool may_overflow>
struct AddIntegers {
  using State = int64_t;
  int64_t *cells, *sum;
  bool* lost_ptr;
  ALWAYS_INLINE State load(int64_t l) const { return sum[l]; }
  ALWAYS_INLINE void store(int64_t l, State state) const { sum[l] = state; }
  ALWAYS_INLINE void operator()(State& state, int64_t at, int64_t) const {
    if (may_overflow) {
      *lost_ptr |= __builtin_add_overflow(state, cells[at], &state);
    } else {
      state += cells[at];
    }
    cells[at] = state;
  }
};

// The leaf of a tile's first row begins with it.
void begin_leaf(SumRoom& room, int64_t lanes) {
  for (int64_t l = 0; l < lanes; ++l) {
    const double sum = room.before[l] + room.inside[l];
    room.before_error[l] += rounding_error(room.before[l], room.inside[l], sum);
    room.before[l] = sum;
    room.leaf_errors[l] += room.inside_error[l];
    room.inside[l] = room.inside_error[l] = 0.0;
  }
}

// False where a sum is inf or NaN. Slices that lie along are walked twice, for the sums and for their errors, with all
// else in vectors between; so each addition waits for one other.
NEVER_INLINE bool run_pairs(SumRoom& room, const ScanTile& tile) {
  const int64_t lanes = tile.w.lanes();
  alignas(64) double first[n_tile_lanes], carried[n_tile_lanes];
  copy_lanes(room.inside, lanes, first);
  for (int64_t l = 0; l < lanes; ++l) carried[l] = room.before_error[l] + room.leaf_errors[l];
  double *const cells = room.cells, *const sums = room.sums, *const errors = room.errors;
  if (tile.along) {
    run_scan(Add{cells, sums, room.inside}, tile);
    step_errors(tile, first, cells, sums, errors,
                [](double from, double cell, double sum) { return rounding_error(from, cell, sum); });
    run_scan(Add{errors, errors, room.inside_error}, tile);
    for (int64_t l = 0; l < lanes; ++l) {
      const double before = room.before[l], carry = carried[l];
      const int64_t start = l * tile.w.rows;
#pragma GCC ivdep
      for (int64_t j = start; j < start + tile.w.rows; ++j) {
        cells[j] = AddPairsInLeaf::with_errors(before, sums[j], carry, errors[j]);
      }
    }
  } else {
    run_scan(AddPairsInLeaf{cells, room.inside, room.inside_error, room.before, carried}, tile);
  }
  uint64_t lost = 0;
  for (int64_t j = 0; j < tile.w.cells(); ++j) lost |= static_cast<uint64_t>(!is_finite(cells[j]));
  return !lost;
}

// False where a sum leaves int64.
bool scan_integers(SumRoom& room, const Block& block, const Filled& filled, const ScanTile& tile,
                   const unsigned char* keep_ptr) {
  each_part(block.data, tile, [&](const Window& w, int64_t at) {
    gather_integers(block, w, from(keep_ptr, at), 0, room.integers + at);
  });
  bool lost = false;
  if (block.dtype == Dtype::i64 || block.n >> 31) {
    run_scan(AddIntegers<true>{room.integers, room.running, &lost}, tile);
    if (lost) return false;
  } else {
    run_scan(AddIntegers<false>{room.integers, room.running, nullptr}, tile);
  }
  if (filled.dtype == Dtype::i64) {
    write_scan_cells(filled, tile, room.integers, keep_ptr, ToI64());
    return true;
  }
  for (int64_t j = 0; j < tile.w.cells(); ++j) room.cells[j] = static_cast<double>(room.integers[j]);
  return !write_scan(filled, tile, room.cells, keep_ptr);
}

bool is_integer(Dtype dtype) { return dtype > Dtype::bf16; }

}  // namespace

int cumulative_sum(const Block& block, const Options&, const Filled& filled) {
  const std::unique_ptr<SumRoom> room(new SumRoom);
  int status = fill_done;
  const auto begin = [&](const ScanTile& tile) {
    for (int64_t l = 0; l < tile.w.lanes(); ++l) {
      room->inside[l] = room->inside_error[l] = room->before[l] = room->before_error[l] = room->leaf_errors[l] = 0.0;
      room->running[l] = 0;
    }
  };
  each_scan_tile(block, block.leaf, false, begin, [&](const ScanTile& tile) {
    if (status == fill_refused) return;
    const unsigned char* const keep_ptr = scan_keep(block, tile, room->keep);
    if (is_integer(block.dtype)) {
      if (!scan_integers(*room, block, filled, tile, keep_ptr)) status = fill_refused;
      return;
    }
    if (tile.w.i && tile.w.i % block.leaf == 0) begin_leaf(*room, tile.w.lanes());
    scan_doubles(block, tile, keep_ptr, 0.0, room->cells);
    if (block.dtype != Dtype::f64) {
      run_scan(AddInLeaf{room->cells, room->inside, room->before}, tile);
    } else if (!run_pairs(*room, tile)) {
      status = fill_refused;
      return;
    }
    if (write_scan(filled, tile, room->cells, keep_ptr)) status = fill_overflowed;
  });
  return status;
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
