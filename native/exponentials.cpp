// Sums of exponentials below the largest cell, and softmax and log_softmax of whole slices.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "tree.hpp"

#include "halving.hpp"

#include "elementary.hpp"

#include "narrow.hpp"

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

// `top`, or 0 where it is inf or NaN and cannot be subtracted.
ALWAYS_INLINE double subtrahend(double top) { return is_finite(top) ? top : 0.0; }

// The larger one; NaN wins.
ALWAYS_INLINE double larger(double a, double b) { return b > a || b != b ? b : a; }

struct ExponentialsState {
  alignas(64) int64_t count[n_lanes];
  alignas(64) double top[n_lanes], total[n_lanes];

  void clear(int64_t n) {
    for (int64_t j = 0; j < n; ++j) count[j] = 0, top[j] = -infinity, total[j] = 0.0;
  }

  void join(const ExponentialsState& right, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const double both = larger(top[j], right.top[j]), base = subtrahend(both);
      total[j] = total[j] * exponential(top[j] - base) + right.total[j] * exponential(right.top[j] - base);
      top[j] = both;
      count[j] += right.count[j];
    }
  }
};

struct ExponentialsRoom {
  bool negates = false;
  alignas(64) double cells[n_tile];   // as they are, -inf under the mask
  alignas(64) double raised[n_tile];  // exp(cell - top)
  alignas(64) double sums[n_tile];
  alignas(64) unsigned char keep[n_tile];
  alignas(64) double pattern[n_lanes];
  LeafTree<ExponentialsState> tree;
  LeafTree<PlainState> totals;
  std::unique_ptr<double[]> stored;  // the exponentials of all leaves, where they fit
  const unsigned char* keep_ptr;

  void load(const Block& block, const Window& w) {
    keep_ptr = gather_keep(block, w, keep);
    gather_doubles(block.dtype, block.data, w, keep_ptr, negates ? infinity : -infinity, cells);
    if (!negates) return;
    for (int64_t j = 0; j < w.cells(); ++j) cells[j] = -cells[j];
  }
};

NEVER_INLINE void largest_of_lanes(ExponentialsRoom& room, int64_t n_cells, int64_t lanes, double* top) {
  const int64_t period = period_of(lanes);
  double* const pattern = room.pattern;
  const double* const cells = room.cells;
  for (int64_t j = 0; j < period; ++j) pattern[j] = -infinity;
  each_cell(n_cells, period, [=](int64_t p, int64_t j) { pattern[p] = larger(pattern[p], cells[j]); });
  for (int64_t rows = period / lanes; rows > 1;) {  // by halves: a loop over one lane would wait for each comparison
    const int64_t half = (rows + 1) / 2;
    const double* const rest = pattern + half * lanes;
#pragma GCC ivdep
    for (int64_t j = 0; j < (rows - half) * lanes; ++j) pattern[j] = larger(pattern[j], rest[j]);
    rows = half;
  }
  copy_lanes(pattern, lanes, top);
}

// How exact exp(cell - base) has to be: quick, for what is rounded to float32 or less, where base is the largest cell;
// plain; or precise, where the rounding error of a difference of f64 is made good: exp(d + e) = exp(d) + exp(d) e.
enum class Raising { quick, plain, precise };

Raising raising_of(Dtype dtype) { return dtype == Dtype::f64 ? Raising::precise : Raising::plain; }

// raised = exp(cells - base).
NEVER_INLINE void raise(ExponentialsRoom& room, int64_t n_cells, int64_t lanes, const double* base, Raising raising) {
  const int64_t period = period_of(lanes);
  spread(base, lanes, period, room.pattern);
  const double *const pattern = room.pattern, *const cells = room.cells;
  double* const raised = room.raised;
  if (raising == Raising::quick) {
    each_cell(n_cells, period, [=](int64_t p, int64_t j) { raised[j] = quick_exponential(cells[j] - pattern[p]); });
    return;
  }
  if (raising == Raising::plain) {
    each_cell(n_cells, period, [=](int64_t p, int64_t j) { raised[j] = exponential(cells[j] - pattern[p]); });
    return;
  }
  each_cell(n_cells, period, [=](int64_t p, int64_t j) {
    const double difference = cells[j] - pattern[p];
    const double error = rounding_error(cells[j], -pattern[p], difference);
    const double plain = exponential(difference);
    raised[j] = is_finite(difference) ? plain + plain * error : plain;
  });
}

// The state of a leaf; the room keeps its cells and their exponentials.
NEVER_INLINE void leaf_exponentials(ExponentialsRoom& room, const Block& block, const Window& w, Raising raising,
                                    ExponentialsState& state) {
  const int64_t lanes = w.lanes();
  room.load(block, w);
  largest_of_lanes(room, w.cells(), lanes, state.top);
  alignas(64) double base[n_lanes];
  for (int64_t l = 0; l < lanes; ++l) base[l] = subtrahend(state.top[l]);
  raise(room, w.cells(), lanes, base, raising);
  halve_into(room.raised, w.rows, lanes, room.sums);
  for (int64_t l = 0; l < lanes; ++l) state.total[l] = room.sums[l] + 0.0, state.count[l] = 0;
}

const ExponentialsState& slice_exponentials(ExponentialsRoom& room, const Block& block, Window& w, Raising raising,
                                            bool counts) {
  each_leaf(block, w, [&] {
    leaf_exponentials(room, block, w, raising, room.tree.next());
    if (counts) count_window(room.keep_ptr, w, room.tree.next().count);
    room.tree.push(w.lanes());
  });
  return room.tree.finish(w.lanes());
}

std::unique_ptr<ExponentialsRoom> room_for(const Block& block) {
  std::unique_ptr<ExponentialsRoom> room(new ExponentialsRoom);
  room->tree.begin((block.n + block.leaf - 1) / block.leaf);
  return room;
}

// raised or cells become what is written: exp(cell - top) / total, or cell - top - log(total).
NEVER_INLINE void scale_cells(ExponentialsRoom& room, const Window& w, const double* divisor, bool exact_quotient) {
  const int64_t lanes = w.lanes(), period = period_of(lanes);
  const double* const pattern = room.pattern;
  double* const raised = room.raised;
  if (exact_quotient) {
    spread(divisor, lanes, period, room.pattern);
    each_cell(w.cells(), period, [=](int64_t p, int64_t j) { raised[j] = raised[j] / pattern[p]; });
    return;
  }
  alignas(64) double factor[n_lanes];
  for (int64_t l = 0; l < lanes; ++l) factor[l] = 1.0 / divisor[l];
  spread(factor, lanes, period, room.pattern);
  each_cell(w.cells(), period, [=](int64_t p, int64_t j) { raised[j] = raised[j] * pattern[p]; });
}

NEVER_INLINE void subtract_logs(ExponentialsRoom& room, const Window& w, const double* base, const double* logs) {
  const int64_t lanes = w.lanes(), period = period_of(lanes);
  alignas(64) double log_pattern[n_lanes];
  spread(base, lanes, period, room.pattern);
  spread(logs, lanes, period, log_pattern);
  const double *const pattern = room.pattern, *const log_of = log_pattern, *const cells = room.cells;
  double* const raised = room.raised;
  each_cell(w.cells(), period, [=](int64_t p, int64_t j) { raised[j] = (cells[j] - pattern[p]) - log_of[p]; });
}

constexpr int64_t n_stored = 1 << 17;  // 1 MB, a part of L2

// The largest cells and the totals below them of slices of several leaves; `stored`, their exponentials are kept.
NEVER_INLINE void slice_totals(ExponentialsRoom& room, const Block& block, Window& w, bool is_stored, double* top,
                               double* total) {
  const int64_t lanes = w.lanes();
  alignas(64) double leaf_top[n_lanes], base[n_lanes];
  for (int64_t l = 0; l < lanes; ++l) top[l] = -infinity;
  each_leaf(block, w, [&] {
    room.load(block, w);
    largest_of_lanes(room, w.cells(), lanes, leaf_top);
    for (int64_t l = 0; l < lanes; ++l) top[l] = larger(top[l], leaf_top[l]);
  });
  for (int64_t l = 0; l < lanes; ++l) base[l] = subtrahend(top[l]);
  each_leaf(block, w, [&] {
    room.load(block, w);
    raise(room, w.cells(), lanes, base, raising_of(block.dtype));
    if (is_stored) copy_lanes(room.raised, w.cells(), room.stored.get() + w.i * lanes);
    halve_into(room.raised, w.rows, lanes, room.sums);
    for (int64_t l = 0; l < lanes; ++l) room.totals.next().total[l] = room.sums[l] + 0.0;
    room.totals.push(lanes);
  });
  copy_lanes(room.totals.finish(lanes).total, lanes, total);
}

bool is_quick(Dtype dtype, Dtype result) {
  const auto is_short = [](Dtype of) { return of == Dtype::f32 || of == Dtype::f16 || of == Dtype::bf16; };
  return is_short(dtype) && is_short(result);
}

// A slice that is one leaf is read and raised once. A longer one is read twice and raised twice where that is quick;
// else its largest cell is found first, and exponentials are kept where the slice is not too long.
template <bool is_log>
int normalize(const Block& block, const Options& options, const Filled& filled) {
  const std::unique_ptr<ExponentialsRoom> room = room_for(block);
  room->negates = options.negates;
  const bool quick = is_quick(block.dtype, filled.dtype), is_one_leaf = block.n <= block.leaf;
  const Raising raising = quick ? Raising::quick : raising_of(block.dtype);
  const bool may_store = !is_one_leaf && !quick && block.n <= n_stored / 16;
  const int64_t most_lanes = may_store ? least(n_tile_lanes, n_stored / block.n) : n_tile_lanes;
  if (!is_one_leaf) room->totals.begin((block.n + block.leaf - 1) / block.leaf);
  bool overflowed = false;
  const auto visit = [&](Window& w) {
    const int64_t lanes = w.lanes();
    const bool is_stored = !is_log && may_store && block.n * lanes <= n_stored;
    if (is_stored && !room->stored) room->stored.reset(new double[n_stored]);
    alignas(64) double top[n_lanes], total[n_lanes], base[n_lanes], scale[n_lanes];
    if (is_one_leaf || quick) {
      const ExponentialsState& state = slice_exponentials(*room, block, w, raising, false);
      copy_lanes(state.top, lanes, top), copy_lanes(state.total, lanes, total);
    } else {
      slice_totals(*room, block, w, is_stored, top, total);
    }
    for (int64_t l = 0; l < lanes; ++l) {
      base[l] = is_finite(top[l]) ? top[l] : not_a_number;
      const double divisor = is_finite(top[l]) ? total[l] : not_a_number;
      scale[l] = is_log ? logarithm(divisor) : divisor;
    }
    each_leaf(block, w, [&] {
      if (is_stored) {
        room->keep_ptr = gather_keep(block, w, room->keep);
        copy_lanes(room->stored.get() + w.i * lanes, w.cells(), room->raised);
      } else if (!is_one_leaf) {
        room->load(block, w);
        if (!is_log) raise(*room, w.cells(), lanes, base, raising);
      }
      if (is_log) {
        subtract_logs(*room, w, base, scale);
      } else {
        scale_cells(*room, w, scale, filled.dtype == Dtype::f64);
      }
      overflowed |= write_doubles(filled, w, room->raised, room->keep_ptr, is_log);
    });
  };
  each_window(block, block.leaf, visit, most_lanes);
  return overflowed ? fill_overflowed : fill_done;
}

}  // namespace

bool exponentials(const Block& block, const Options&, const Parts& parts) {
  const std::unique_ptr<ExponentialsRoom> room = room_for(block);
  each_window(block, block.leaf, [&](Window& w) {
    const ExponentialsState& state = slice_exponentials(*room, block, w, raising_of(block.dtype), true);
    const int64_t at = w.o * block.inner + w.c;
    copy_lanes(state.count, w.lanes(), parts.count_ptr + at);
    copy_canonical(state.top, w.lanes(), static_cast<double*>(parts.part_ptr[0]) + at);
    copy_canonical(state.total, w.lanes(), static_cast<double*>(parts.part_ptr[1]) + at);
  });
  return true;
}

int softmax(const Block& block, const Options& options, const Filled& filled) {
  return normalize<false>(block, options, filled);
}
int log_softmax(const Block& block, const Options& options, const Filled& filled) {
  return normalize<true>(block, options, filled);
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
