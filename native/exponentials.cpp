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
  alignas(64) double cells[n_tile];   // as they are, -inf under the mask
  alignas(64) double raised[n_tile];  // exp(cell - top)
  alignas(64) double sums[n_tile];
  alignas(64) unsigned char keep[n_tile];
  alignas(64) double pattern[n_lanes];
  LeafTree<ExponentialsState> tree;
  const unsigned char* keep_ptr;

  void load(const Block& block, const Window& w) {
    keep_ptr = gather_mask(block.mask, w, keep);
    gather_doubles(block.dtype, block.data, w, keep_ptr, -infinity, cells);
  }
};

NEVER_INLINE void largest_of_lanes(ExponentialsRoom& room, int64_t n_cells, int64_t lanes, double* top) {
  const int64_t period = period_of(lanes);
  double* const pattern = room.pattern;
  const double* const cells = room.cells;
  for (int64_t j = 0; j < period; ++j) pattern[j] = -infinity;
  each_cell(n_cells, period, [=](int64_t p, int64_t j) { pattern[p] = larger(pattern[p], cells[j]); });
  for (int64_t l = 0; l < lanes; ++l) top[l] = pattern[l];
  for (int64_t k = lanes; k < period; k += lanes) {
    for (int64_t l = 0; l < lanes; ++l) top[l] = larger(top[l], pattern[k + l]);
  }
}

// raised = exp(cells - base). The rounding error of a difference of f64 is made good: exp(d + e) = exp(d) + exp(d) e.
NEVER_INLINE void raise(ExponentialsRoom& room, int64_t n_cells, int64_t lanes, const double* base, bool precise) {
  const int64_t period = period_of(lanes);
  spread(base, lanes, period, room.pattern);
  const double *const pattern = room.pattern, *const cells = room.cells;
  double* const raised = room.raised;
  if (!precise) {
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
NEVER_INLINE void leaf_exponentials(ExponentialsRoom& room, const Block& block, const Window& w,
                                    ExponentialsState& state) {
  const int64_t lanes = w.lanes();
  room.load(block, w);
  for (int64_t l = 0; l < lanes; ++l) state.count[l] = 0;
  count_window(room.keep_ptr, w, state.count);
  largest_of_lanes(room, w.cells(), lanes, state.top);
  alignas(64) double base[n_lanes];
  for (int64_t l = 0; l < lanes; ++l) base[l] = subtrahend(state.top[l]);
  raise(room, w.cells(), lanes, base, block.dtype == Dtype::f64);
  halve_into(room.raised, w.rows, lanes, room.sums);
  for (int64_t l = 0; l < lanes; ++l) state.total[l] = room.sums[l] + 0.0;
}

const ExponentialsState& slice_exponentials(ExponentialsRoom& room, const Block& block, Window& w) {
  for (w.i = 0; w.i < block.n; w.i += block.leaf) {
    w.rows = least(block.leaf, block.n - w.i);
    leaf_exponentials(room, block, w, room.tree.next());
    room.tree.push(w.lanes());
  }
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
  spread(divisor, lanes, period, room.pattern);
  const double* const pattern = room.pattern;
  double* const raised = room.raised;
  if (exact_quotient) {
    each_cell(w.cells(), period, [=](int64_t p, int64_t j) { raised[j] = raised[j] / pattern[p]; });
    return;
  }
  for (int64_t j = 0; j < period; ++j) room.pattern[j] = 1.0 / room.pattern[j];
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

// A slice that is one leaf is read and raised once.
template <bool is_log>
int normalize(const Block& block, const Filled& filled) {
  const std::unique_ptr<ExponentialsRoom> room = room_for(block);
  const bool is_f64 = block.dtype == Dtype::f64;
  bool overflowed = false;
  each_window(block, block.leaf, [&](Window& w) {
    const int64_t lanes = w.lanes();
    const ExponentialsState& state = slice_exponentials(*room, block, w);
    alignas(64) double base[n_lanes], scale[n_lanes];
    for (int64_t l = 0; l < lanes; ++l) {
      base[l] = is_finite(state.top[l]) ? state.top[l] : not_a_number;
      const double total = is_finite(state.top[l]) ? state.total[l] : not_a_number;
      scale[l] = is_log ? logarithm(total) : total;
    }
    for (w.i = 0; w.i < block.n; w.i += block.leaf) {
      w.rows = least(block.leaf, block.n - w.i);
      if (block.n > block.leaf) {
        room->load(block, w);
        if (!is_log) raise(*room, w.cells(), lanes, base, is_f64);
      }
      if (is_log) {
        subtract_logs(*room, w, base, scale);
      } else {
        scale_cells(*room, w, scale, is_f64);
      }
      overflowed |= write_doubles(filled, w, room->raised, room->keep_ptr);
    }
  });
  return overflowed ? fill_overflowed : fill_done;
}

}  // namespace

bool exponentials(const Block& block, const Parts& parts) {
  const std::unique_ptr<ExponentialsRoom> room = room_for(block);
  each_window(block, block.leaf, [&](Window& w) {
    const ExponentialsState& state = slice_exponentials(*room, block, w);
    const int64_t at = w.o * block.inner + w.c;
    copy_lanes(state.count, w.lanes(), parts.count_ptr + at);
    copy_canonical(state.top, w.lanes(), static_cast<double*>(parts.part_ptr[0]) + at);
    copy_canonical(state.total, w.lanes(), static_cast<double*>(parts.part_ptr[1]) + at);
  });
  return true;
}

int softmax(const Block& block, const Filled& filled) { return normalize<false>(block, filled); }
int log_softmax(const Block& block, const Filled& filled) { return normalize<true>(block, filled); }

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
