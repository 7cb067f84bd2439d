// Mean and squared deviations: two passes in a leaf, Chan, Golub and LeVeque's update between leaves.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "tree.hpp"

#include "narrow.hpp"

#include "fold.hpp"

#include "walk.hpp"

#include "leaves.hpp"

// ---- deviations from the mean of a lane, and their squares --------------------------------------------------------

struct Deviation {
  double value;
};

struct Deviations {
  double sum, squares;
  Deviations() = default;
  Deviations(double of_cells, double of_squares) : sum(of_cells), squares(of_squares) {}
  explicit Deviations(Deviation cell) : sum(cell.value), squares(cell.value * cell.value) {}
};

ALWAYS_INLINE Deviations absorb(Deviations a, Deviations b) { return {a.sum + b.sum, a.squares + b.squares}; }
ALWAYS_INLINE Deviations absorb(Deviation a, Deviation b) { return absorb(Deviations(a), Deviations(b)); }
ALWAYS_INLINE Deviations absorb(Deviations a, Deviation b) { return absorb(a, Deviations(b)); }

template <>
struct Lanes<Deviation> {
  double* value;
  ALWAYS_INLINE Deviation get(int64_t j) const { return {value[j]}; }
  ALWAYS_INLINE void set(int64_t j, Deviation cell) const { value[j] = cell.value; }
  Lanes from(int64_t j) const { return {value + j}; }
};

template <>
struct Lanes<Deviations> {
  double *sum, *squares;
  ALWAYS_INLINE Deviations get(int64_t j) const { return {sum[j], squares[j]}; }
  ALWAYS_INLINE void set(int64_t j, Deviations of) const { sum[j] = of.sum, squares[j] = of.squares; }
  Lanes from(int64_t j) const { return {sum + j, squares + j}; }
};

template <int n>
struct Room<Deviation, n> {
  alignas(64) double value[n];
  Lanes<Deviation> lanes() { return {value}; }
};

template <int n>
struct Room<Deviations, n> {
  alignas(64) double sum[n], squares[n];
  Lanes<Deviations> lanes() { return {sum, squares}; }
};

// Of int64 cells exact where doubles would have lost the low bits; their mean is an integer.
ALWAYS_INLINE double deviation_of(Halves cell, int64_t mean) {
  const double above = static_cast<double>(cell.high - (mean >> 32)) * 0x1p32;
  return above + static_cast<double>(cell.low - (mean & 0xffffffff));
}

template <class Wide>
ALWAYS_INLINE double deviation_of(Wide cell, double mean) {
  return as_double(cell) - mean;
}

template <class Cell>
struct DeviationCell : OfLanes {
  using Raw = typename Cell::Raw;
  using Wide = Deviation;
  using Lane = std::conditional_t<std::is_same_v<Cell, I64Cell>, int64_t, double>;
  const Lane* lanes;
  DeviationCell() = default;
  ALWAYS_INLINE explicit DeviationCell(const Lane* means) : lanes(means) {}

  template <bool is_masked>
  ALWAYS_INLINE Deviation widen(Raw raw, unsigned char keep) const {
    const double deviation = deviation_of(Cell::widen(raw), lanes[0]);
    if constexpr (!is_masked) return {deviation};
    return {bits_as<double>(bits_as<uint64_t>(deviation) & -static_cast<uint64_t>(keep))};
  }
};

template <class CellType>
struct DeviationSum {
  using Cell = DeviationCell<CellType>;
  using Near = Deviations;
  using Far = Deviations;
};

struct MomentsState {
  alignas(64) int64_t count[n_lanes];
  alignas(64) double mean[n_lanes], low[n_lanes], m2[n_lanes];

  void clear(int64_t n) {
    for (int64_t j = 0; j < n; ++j) count[j] = 0, mean[j] = low[j] = m2[j] = 0.0;
  }

  // An empty side is chosen away, never multiplied by 0.
  void join(const MomentsState& right, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t both = count[j] + right.count[j];
      const double weight = static_cast<double>(right.count[j]) / static_cast<double>(both > 1 ? both : 1);
      const double delta = (right.mean[j] - mean[j]) + (right.low[j] - low[j]);
      const double shift = delta * weight;
      const double shifted_low = low[j] + shift;
      const double sum = mean[j] + shifted_low;
      const double error = rounding_error(mean[j], shifted_low, sum);
      const double squares = (m2[j] + right.m2[j]) + delta * shift * static_cast<double>(count[j]);
      const bool left_empty = count[j] == 0, right_empty = right.count[j] == 0;
      low[j] = left_empty ? right.low[j] : right_empty ? low[j] : is_finite(sum) ? error : 0.0;
      mean[j] = left_empty ? right.mean[j] : right_empty ? mean[j] : sum;
      m2[j] = left_empty ? right.m2[j] : right_empty ? m2[j] : squares;
      count[j] = both;
    }
  }

  void read(const States& states, int64_t at, int64_t n) {
    copy_lanes(states.count_ptr + at, n, count);
    double* const lanes[] = {mean, low, m2};
    for (int k = 0; k < 3; ++k) copy_lanes(static_cast<const double*>(states.part_ptr[k]) + at, n, lanes[k]);
  }

  void read(const Block& block, const Window& w) {
    read_counts(block, w, count);
    read_lanes(block, w, 0, mean), read_lanes(block, w, 1, low), read_lanes(block, w, 2, m2);
  }

  void write(const Parts& parts, int64_t at, int64_t n) const {
    copy_canonical(mean, n, static_cast<double*>(parts.part_ptr[0]) + at);
    copy_canonical(low, n, static_cast<double*>(parts.part_ptr[1]) + at);
    copy_canonical(m2, n, static_cast<double*>(parts.part_ptr[2]) + at);
  }
};

// Cells of `dtype`; `is_short`: they are no wider in truth, and their sums need no low part.
template <class CellType, Dtype of, bool is_short = false>
struct LeafMoments {
  using State = MomentsState;
  using Cell = DeviationCell<CellType>;
  static constexpr Dtype dtype = of;
  TileFold<DeviationSum<CellType>> fold_tile;
  Room<Deviations, n_lanes> sums;
  alignas(64) int64_t whole[n_lanes];

  void operator()(const Leaf& leaf, const int64_t* count, State& state) {
    const int64_t n = leaf.tile.lanes();
    if constexpr (is_short) {
      leaf_means_of_doubles(leaf, count, state.mean);
    } else {
      leaf_means(dtype, leaf, count, state.mean);
    }
    if constexpr (dtype == Dtype::i64) {
      for (int64_t l = 0; l < n; ++l) whole[l] = static_cast<int64_t>(state.mean[l]);
      fold_tile(leaf, sums.lanes(), Cell(whole));
    } else {
      fold_tile(leaf, sums.lanes(), Cell(state.mean));
    }
    copy_lanes(count, n, state.count);
    for (int64_t l = 0; l < n; ++l) {
      const double error = sums.sum[l] + 0.0;
      state.low[l] = error / at_least_one(count[l]);
      const double m2 = (sums.squares[l] + 0.0) - error * state.low[l];
      state.m2[l] = m2 < 0.0 ? 0.0 : m2;
    }
  }
};

using F32Moments = LeafMoments<F32Cell, Dtype::f32>;
using F64Moments = LeafMoments<F64Cell, Dtype::f64>;
using I64Moments = LeafMoments<I64Cell, Dtype::i64>;
using ShortMoments = LeafMoments<F64Cell, Dtype::f64, true>;

template <class LeafKernel>
NEVER_INLINE void run_leaf(const Leaf& leaf, const int64_t* count, MomentsState& state) {
  LeafKernel kernel;
  kernel(leaf, count, state);
}

struct MomentsRoom {
  alignas(64) double cells[n_tile];
  alignas(64) unsigned char keep[n_tile];
  alignas(64) double pattern[n_lanes];
  alignas(64) int64_t count[n_lanes];
  LeafTree<MomentsState> tree;
};

// Of a leaf in any layout, gathered; the room keeps its cells.
NEVER_INLINE void leaf_moments(MomentsRoom& room, const Block& block, const Window& w, MomentsState& state) {
  const int64_t lanes = w.lanes();
  const unsigned char* const keep_ptr = gather_keep(block, w, room.keep);
  for (int64_t l = 0; l < lanes; ++l) room.count[l] = 0;
  count_window(keep_ptr, w, room.count);
  const Leaf leaf = leaf_of_tile(w, room.cells, keep_ptr);
  if (block.dtype == Dtype::i64) {
    gather_integers(block, w, keep_ptr, 0, reinterpret_cast<int64_t*>(room.cells));
    return run_leaf<I64Moments>(leaf, room.count, state);
  }
  gather_doubles(block.dtype, block.data, w, keep_ptr, 0.0, room.cells);
  if (block.dtype == Dtype::f64) return run_leaf<F64Moments>(leaf, room.count, state);
  run_leaf<ShortMoments>(leaf, room.count, state);
}

const MomentsState& slice_moments(MomentsRoom& room, const Block& block, Window& w) {
  if (block.states_ptr) {
    room.tree.next().read(block, w);
    return room.tree.next();
  }
  each_leaf(block, w, [&] {
    leaf_moments(room, block, w, room.tree.next());
    room.tree.push(w.lanes());
  });
  return room.tree.finish(w.lanes());
}

std::unique_ptr<MomentsRoom> room_for(const Block& block) {
  std::unique_ptr<MomentsRoom> room(new MomentsRoom);
  room->tree.begin((block.n + block.leaf - 1) / block.leaf);
  return room;
}

// The cells that count: none of a slice whose deviation is undefined.
const unsigned char* keep_defined(MomentsRoom& room, const Window& w, const unsigned char* keep_ptr,
                                  const unsigned char* defined) {
  const int64_t lanes = w.lanes();
  for (int64_t start = 0; start < w.cells(); start += lanes) {
    for (int64_t l = 0; l < lanes; ++l) {
      room.keep[start + l] = keep_ptr ? static_cast<unsigned char>(keep_ptr[start + l] & defined[l]) : defined[l];
    }
  }
  return room.keep;
}

}  // namespace

bool moments(const Block& block, const Options&, const Parts& parts) {
  switch (block.dtype) {
    case Dtype::f64: return walk_route<F64Moments>(block, parts);
    case Dtype::i32: return walk_route<ShortMoments>(block, parts);
    case Dtype::i64: return walk_route<I64Moments>(block, parts);
    default: return walk_route<F32Moments>(block, parts);
  }
}

void merge_moments(const States& left, const States& right, Dtype, const Parts& both) {
  MomentsState joined, state;
  for (int64_t at = 0; at < left.n; at += n_lanes) {
    const int64_t n = least(n_lanes, left.n - at);
    joined.read(left, at, n), state.read(right, at, n);
    joined.join(state, n);
    copy_lanes(joined.count, n, both.count_ptr + at);
    joined.write(both, at, n);
  }
}

// (cell - mean) / standard deviation; a slice of one leaf, or whose state is known, is read once.
int standardize(const Block& block, const Options& options, const Filled& filled) {
  const std::unique_ptr<MomentsRoom> room = room_for(block);
  const bool is_kept = !block.states_ptr && block.n <= block.leaf && block.dtype != Dtype::i64;
  bool overflowed = false;
  each_window(block, block.leaf, [&](Window& w) {
    const int64_t lanes = w.lanes(), period = period_of(lanes);
    const MomentsState& state = slice_moments(*room, block, w);
    alignas(64) double deviation[n_lanes], low_pattern[n_lanes], deviation_pattern[n_lanes];
    unsigned char defined[n_lanes];
    bool all_defined = true;
    for (int64_t l = 0; l < lanes; ++l) {
      const double divisor = static_cast<double>(state.count[l]) - options.correction;
      deviation[l] = __builtin_sqrt(state.m2[l] / (divisor > 0.0 ? divisor : 1.0));
      defined[l] = static_cast<double>(state.count[l]) > options.correction;
      all_defined &= defined[l];
    }
    spread(state.mean, lanes, period, room->pattern);
    spread(state.low, lanes, period, low_pattern);
    spread(deviation, lanes, period, deviation_pattern);
    const double *const mean = room->pattern, *const low = low_pattern, *const deviation_of = deviation_pattern;
    each_leaf(block, w, [&] {
      const unsigned char* keep_ptr = gather_keep(block, w, room->keep);
      if (!is_kept) gather_doubles(block.dtype, block.data, w, keep_ptr, 0.0, room->cells);
      if (!all_defined) keep_ptr = keep_defined(*room, w, keep_ptr, defined);
      double* const cells = room->cells;
      each_cell(w.cells(), period, [=](int64_t p, int64_t j) {
        cells[j] = ((cells[j] - mean[p]) - low[p]) / deviation_of[p];
      });
      overflowed |= write_doubles(filled, w, cells, keep_ptr);
    });
  });
  return overflowed ? fill_overflowed : fill_done;
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
