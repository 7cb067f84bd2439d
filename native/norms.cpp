// Norms as scaled sums of powers: nothing overflows or vanishes on the way (Blue, ACM TOMS 4, 1978).

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "tree.hpp"

#include "halving.hpp"

#include "narrow.hpp"

#include "fold.hpp"

#include "walk.hpp"

#include "leaves.hpp"

#include "powers.hpp"

#include "mantissas.hpp"

// The larger or the smaller one; NaN wins.
template <bool is_larger>
ALWAYS_INLINE double farther(double a, double b) {
  return (is_larger ? b > a : b < a) || b != b ? b : a;
}

// A total that is the same on every scale takes that of the other.
ALWAYS_INLINE bool is_scaleless(double total) { return total == 0.0 || !is_finite(total); }

// What a total counts for on another scale; exactly 1 on its own.
template <Order order>
ALWAYS_INLINE double share_of(double own, double scale) {
  if (own == scale) return 1.0;
  const double ratio = own / scale;  // a power of two
  if constexpr (order == Order::inverse_square) return (1.0 / ratio) * (1.0 / ratio);
  return power<order>(ratio);
}

struct PowersState {
  alignas(64) int64_t count[n_lanes];
  alignas(64) double total[n_lanes], low[n_lanes], scale[n_lanes];
  Order order = Order::two;

  void clear(int64_t n) {
    const double nothing = order == Order::smallest ? infinity : 0.0;
    for (int64_t j = 0; j < n; ++j) count[j] = 0, total[j] = nothing, low[j] = 0.0, scale[j] = 1.0;
  }

  void join(const PowersState& right, int64_t n) {
    for (int64_t j = 0; j < n; ++j) count[j] += right.count[j];
    switch (order) {
      case Order::largest: return join_extremes<true>(right, n);
      case Order::smallest: return join_extremes<false>(right, n);
      case Order::one: return join_totals<Order::one>(right, n);
      case Order::two: return join_totals<Order::two>(right, n);
      case Order::three: return join_totals<Order::three>(right, n);
      case Order::inverse: return join_totals<Order::inverse>(right, n);
      case Order::inverse_square: return join_totals<Order::inverse_square>(right, n);
      default: return join_totals<Order::zero>(right, n);  // on one scale
    }
  }

  template <bool is_larger>
  void join_extremes(const PowersState& right, int64_t n) {
    for (int64_t j = 0; j < n; ++j) total[j] = farther<is_larger>(total[j], right.total[j]);
  }

  template <Order of>
  void join_totals(const PowersState& right, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const double a_scale = is_scaleless(total[j]) ? right.scale[j] : scale[j];
      const double b_scale = is_scaleless(right.total[j]) ? scale[j] : right.scale[j];
      const double both = (a_scale < b_scale) != is_inverse(of) ? b_scale : a_scale;
      const double a_share = share_of<of>(a_scale, both), b_share = share_of<of>(b_scale, both);
      const double a = total[j] * a_share, b = right.total[j] * b_share;
      const double sum = a + b;
      const double error = low[j] * a_share + right.low[j] * b_share + rounding_error(a, b, sum);
      total[j] = sum;
      low[j] = is_finite(sum) ? error : 0.0;
      scale[j] = both;
    }
  }

  void read(const Block& block, const Window& w) {
    read_lanes(block, w, 0, total), read_lanes(block, w, 1, low), read_lanes(block, w, 2, scale);
  }

  void write(const Parts& parts, int64_t at, int64_t n) const {
    copy_canonical(total, n, static_cast<double*>(parts.part_ptr[0]) + at);
    copy_lanes(low, n, static_cast<double*>(parts.part_ptr[1]) + at);
    copy_lanes(scale, n, static_cast<double*>(parts.part_ptr[2]) + at);
  }
};

struct PowersRoom {
  alignas(64) double cells[n_tile];
  alignas(64) double sums[n_tile];
  alignas(64) double lows[n_tile];
  alignas(64) unsigned char keep[n_tile];
  alignas(64) double pattern[n_lanes];
  LeafTree<PowersState> tree;
};

template <bool is_larger>
NEVER_INLINE void farthest_of_lanes(PowersRoom& room, int64_t n_cells, int64_t lanes, double* reach) {
  const int64_t period = period_of(lanes);
  double* const pattern = room.pattern;
  const double* const cells = room.cells;
  for (int64_t j = 0; j < period; ++j) pattern[j] = is_larger ? 0.0 : infinity;
  each_cell(n_cells, period, [=](int64_t p, int64_t j) {
    pattern[p] = farther<is_larger>(pattern[p], size_of(cells[j]));
  });
  fold_pattern(pattern, period, lanes, [](double a, double b) { return farther<is_larger>(a, b); });
  copy_lanes(pattern, lanes, reach);
}

// The exponent, a multiple of 64 from -1024 to 960, of a scale next to the cell that counts most.
ALWAYS_INLINE int64_t scale_exponent(double reach) {
  const uint64_t bits = bits_as<uint64_t>(reach);
  const int64_t exponent = static_cast<int64_t>(bits >> 52 & 0x7ff) - 1023;
  const int64_t within = exponent < -1000 ? -1000 : exponent;
  return is_finite(reach) && reach != 0.0 ? (within + 1024) / 64 * 64 - 1024 : 0;
}

// cells = |cells| / scale. By two factors, for 2^-1024 has no inverse; what the first makes subnormal is 0 after both.
NEVER_INLINE void scale_sizes(PowersRoom& room, const Window& w, PowersState& state) {
  const int64_t lanes = w.lanes(), period = period_of(lanes), n_cells = w.cells();
  alignas(64) double reach[n_lanes], factor[n_lanes];
  if (is_inverse(state.order)) {
    farthest_of_lanes<false>(room, n_cells, lanes, reach);
  } else {
    farthest_of_lanes<true>(room, n_cells, lanes, reach);
  }
  bool any = false;
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t exponent = scale_exponent(reach[l]);
    factor[l] = two_to(-exponent / 2);
    state.scale[l] = exponent < -1022 ? 0x1p-1024 : two_to(exponent);
    any |= exponent != 0;
  }
  if (!any) return;
  spread(factor, lanes, period, room.pattern);
  const double* const pattern = room.pattern;
  double* const cells = room.cells;
  each_cell(n_cells, period, [=](int64_t p, int64_t j) { cells[j] = cells[j] * pattern[p] * pattern[p]; });
}

template <Order order>
NEVER_INLINE void raise_sizes(const double* __restrict cells, int64_t n_cells, double* __restrict sums) {
  for (int64_t j = 0; j < n_cells; ++j) sums[j] = power<order>(size_of(cells[j]));
}

void raise_sizes(Order order, const double* cells, int64_t n_cells, double* sums) {
  switch (order) {
    case Order::zero: return raise_sizes<Order::zero>(cells, n_cells, sums);
    case Order::half: return raise_sizes<Order::half>(cells, n_cells, sums);
    case Order::two: return raise_sizes<Order::two>(cells, n_cells, sums);
    case Order::three: return raise_sizes<Order::three>(cells, n_cells, sums);
    case Order::inverse: return raise_sizes<Order::inverse>(cells, n_cells, sums);
    case Order::inverse_square: return raise_sizes<Order::inverse_square>(cells, n_cells, sums);
    default: return raise_sizes<Order::one>(cells, n_cells, sums);
  }
}

// The room keeps the leaf's cells, but for those of f64, which are scaled.
NEVER_INLINE const unsigned char* leaf_powers(PowersRoom& room, const Block& block, const Window& w,
                                              PowersState& state) {
  const int64_t lanes = w.lanes(), n_cells = w.cells();
  const Order order = state.order;
  const unsigned char* const keep_ptr = gather_keep(block, w, room.keep);
  const bool is_wide = block.dtype == Dtype::f64;
  gather_doubles(block.dtype, block.data, w, keep_ptr, is_inverse(order) ? infinity : 0.0, room.cells);
  for (int64_t l = 0; l < lanes; ++l) state.count[l] = 0, state.low[l] = 0.0, state.scale[l] = 1.0;
  count_window(keep_ptr, w, state.count);
  if (is_extreme(order)) {
    (order == Order::largest ? farthest_of_lanes<true> : farthest_of_lanes<false>)(room, n_cells, lanes, state.total);
    return keep_ptr;
  }
  if (is_wide && order != Order::zero && order != Order::half) scale_sizes(room, w, state);
  raise_sizes(order, room.cells, n_cells, room.sums);
  if (!is_wide || order == Order::zero) {
    halve(room.sums, w.rows, lanes);
    for (int64_t l = 0; l < lanes; ++l) state.total[l] = room.sums[l] + 0.0;
    return keep_ptr;
  }
  halve_pairs(room.sums, room.lows, w.rows, lanes);
  for (int64_t l = 0; l < lanes; ++l) {
    state.total[l] = room.sums[l] + 0.0;
    state.low[l] = is_finite(state.total[l]) ? room.lows[l] + 0.0 : 0.0;
  }
  return keep_ptr;
}

const PowersState& slice_powers(PowersRoom& room, const Block& block, Window& w, Order order,
                                const unsigned char*& keep_ptr) {
  if (block.states_ptr) {
    room.tree.next().read(block, w);
    return room.tree.next();
  }
  room.tree.next().order = order;
  each_leaf(block, w, [&] {
    room.tree.next().order = order;
    keep_ptr = leaf_powers(room, block, w, room.tree.next());
    room.tree.push(w.lanes());
  });
  return room.tree.finish(w.lanes());
}

std::unique_ptr<PowersRoom> room_for(const Block& block) {
  std::unique_ptr<PowersRoom> room(new PowersRoom);
  room->tree.begin((block.n + block.leaf - 1) / block.leaf);
  return room;
}

// ---- squares of cells that need no scale, straight from the cells --------------------------------------------------

template <class CellType>
struct SquareCell {
  using Raw = typename CellType::Raw;
  using Wide = Sum<double>;
  static ALWAYS_INLINE Wide widen(Raw raw) {
    const double cell = as_double(CellType::widen(raw));
    return Wide(cell * cell);
  }
};

template <class CellType>
struct SquareSum : F32Sum {
  using Cell = SquareCell<CellType>;
};

template <class CellType, Dtype of>
struct LeafSquares {
  using State = PowersState;
  static constexpr Dtype dtype = of;
  TileFold<SquareSum<CellType>> fold_tile;

  void operator()(const Leaf& leaf, const int64_t* count, State& state) {
    const int64_t n = leaf.tile.lanes();
    fold_tile(leaf, Lanes<Sum<double>>{state.total});
    copy_lanes(count, n, state.count);
    for (int64_t l = 0; l < n; ++l) state.total[l] += 0.0, state.low[l] = 0.0, state.scale[l] = 1.0;
  }
};

bool squares(const Block& block, const Parts& parts) {
  switch (block.dtype) {
    case Dtype::i32: return walk_route<LeafSquares<I32Cell, Dtype::i32>>(block, parts);
    case Dtype::i64: return walk_route<LeafSquares<DoubleCell, Dtype::f64>>(block, parts);
    default: return walk_route<LeafSquares<F32Cell, Dtype::f32>>(block, parts);
  }
}

}  // namespace

bool powers(const Block& block, const Options& options, const Parts& parts) {
  double* const ord = static_cast<double*>(parts.part_ptr[3]);
  for (int64_t l = 0; l < block.outer * block.inner; ++l) ord[l] = options.ord;
  if (order_of(options.ord) == Order::two && block.dtype != Dtype::f64) return squares(block, parts);
  const std::unique_ptr<PowersRoom> room = room_for(block);
  const Order order = order_of(options.ord);
  const unsigned char* keep_ptr = nullptr;
  each_window(block, block.leaf, [&](Window& w) {
    const PowersState& state = slice_powers(*room, block, w, order, keep_ptr);
    const int64_t at = w.o * block.inner + w.c;
    copy_lanes(state.count, w.lanes(), parts.count_ptr + at);
    state.write(parts, at, w.lanes());
  });
  return true;
}

// cell / max(norm, eps); a slice of one leaf, or whose state is known, is read once.
int normalize(const Block& block, const Options& options, const Filled& filled) {
  const std::unique_ptr<PowersRoom> room = room_for(block);
  const Order order = order_of(options.ord);
  const bool is_kept = !block.states_ptr && block.n <= block.leaf && block.dtype != Dtype::f64;
  const unsigned char* keep_ptr = nullptr;
  bool overflowed = false;
  each_window(block, block.leaf, [&](Window& w) {
    const int64_t lanes = w.lanes(), period = period_of(lanes);
    const PowersState& state = slice_powers(*room, block, w, order, keep_ptr);
    alignas(64) double divisor[n_lanes];
    for (int64_t l = 0; l < lanes; ++l) {
      const double norm = norm_of(order, state.total[l], state.low[l], state.scale[l]);
      divisor[l] = norm < options.eps ? options.eps : norm;
    }
    each_leaf(block, w, [&] {
      if (!is_kept) {
        keep_ptr = gather_keep(block, w, room->keep);
        gather_doubles(block.dtype, block.data, w, keep_ptr, 0.0, room->cells);
      }
      spread(divisor, lanes, period, room->pattern);
      const double* const pattern = room->pattern;
      double* const cells = room->cells;
      each_cell(w.cells(), period, [=](int64_t p, int64_t j) { cells[j] = cells[j] / pattern[p]; });
      overflowed |= write_doubles(filled, w, cells, keep_ptr);
    });
  });
  return overflowed ? fill_overflowed : fill_done;
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
