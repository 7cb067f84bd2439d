// Gradients by cells that need nothing but their own value and a few numbers of their slice: those of reductions.

#include "common.hpp"

#include "pull.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "elementary.hpp"

#include "narrow.hpp"

#include "pulls.hpp"

constexpr int64_t n_strip = 4096;  // cells: a page of f32, and what is made of them stays in L2
constexpr int n_numbers = 3;       // of a slice

struct StripRoom {
  alignas(64) double cells[n_strip];
  alignas(64) double lane[n_numbers][n_strip];
  alignas(64) double pattern[n_numbers][n_strip];
  alignas(64) unsigned char ones[n_strip], own[n_strip], reached[n_strip];
  alignas(64) unsigned char gate[n_strip], gate_pattern[n_strip];

  StripRoom() { std::memset(ones, 1, sizeof ones); }
};

// What a row makes its numbers of, a lane each.
struct SliceReader {
  const Above& above;
  const Window& w;

  void g(double* out) const { read_lanes(above.dtype, above.g, w, out); }
  void result(double* out) const { read_lanes(above.dtype, above.out, w, out); }
  void count(double* out) const { read_lanes(Dtype::i64, above.part[0], w, out); }
  void part(int k, double* out) const { read_lanes(Dtype::f64, above.part[k], w, out); }
};

// ---- rows: number() makes the numbers of each slice, gradient() that of a cell ------------------------------------------

struct Numbers {
  double* of[n_numbers];
};

ALWAYS_INLINE double at_least_one(double count) { return count > 1.0 ? count : 1.0; }

struct TotalRow {
  static constexpr int n = 1;
  static constexpr bool reads_cells = false;
  void number(const SliceReader& slices, int64_t, Numbers to) const { slices.g(to.of[0]); }
};

struct MeanRow {
  static constexpr int n = 1;
  static constexpr bool reads_cells = false;
  void number(const SliceReader& slices, int64_t lanes, Numbers to) const {
    double *const g = to.of[0], *const count = to.of[1];
    slices.g(g), slices.count(count);
    for (int64_t l = 0; l < lanes; ++l) g[l] = g[l] / at_least_one(count[l]);
  }
};

// Moments: count, mean, its low part, the squared deviations. A mean that is inf leaves nothing that means something.
template <bool is_root>
struct SpreadRow {
  static constexpr int n = 3;
  static constexpr bool reads_cells = true;
  double correction;

  void number(const SliceReader& slices, int64_t lanes, Numbers to) const {
    double *const mean = to.of[0], *const low = to.of[1], *const factor = to.of[2];
    slices.count(mean), slices.part(3, low), slices.g(factor);
    for (int64_t l = 0; l < lanes; ++l) {
      const double wanted = mean[l] - correction, divisor = wanted > 0.0 ? wanted : 1.0;
      if (is_root) {
        const double variance = low[l] / divisor;
        factor[l] = variance == 0.0 ? 0.0 : factor[l] / divisor / __builtin_sqrt(variance);
      } else {
        factor[l] = 2.0 * factor[l] / divisor;
      }
    }
    slices.part(1, mean), slices.part(2, low);
    for (int64_t l = 0; l < lanes; ++l) mean[l] = is_finite(mean[l]) ? mean[l] : not_a_number;
  }
  static ALWAYS_INLINE double gradient(double x, double mean, double low, double factor) {
    return ((x - mean) - low) * factor;
  }
};

// Exponentials: count, the largest cell, the total below it. Beside a cell that is inf finite ones have 0.
template <bool is_quick>
struct LogSumExpRow {
  static constexpr int n = 2;
  static constexpr bool reads_cells = true;

  void number(const SliceReader& slices, int64_t lanes, Numbers to) const {
    double *const top = to.of[0], *const factor = to.of[1], *const total = to.of[2];
    slices.part(1, top), slices.g(factor), slices.part(2, total);
    for (int64_t l = 0; l < lanes; ++l) {
      const bool nothing = top[l] == -infinity;
      factor[l] = nothing ? 0.0 : top[l] == infinity ? factor[l] : factor[l] / total[l];
      top[l] = nothing ? 0.0 : top[l];
    }
  }
  static ALWAYS_INLINE double gradient(double x, double top, double factor, double) {
    const double below = x - top;
    if constexpr (is_quick) return (below < -700.0 ? 0.0 : quick_exponential(below)) * factor;
    return exponential(below) * factor;
  }
};

ALWAYS_INLINE bool is_same(double x, double found) {
  return static_cast<bool>(static_cast<int>(x == found) | (static_cast<int>(is_nan(x)) & static_cast<int>(is_nan(found))));
}

// Cells that equal the result share g evenly; the count is theirs.
struct ExtremeRow {
  static constexpr int n = 2;
  static constexpr bool reads_cells = true;

  void number(const SliceReader& slices, int64_t lanes, Numbers to) const {
    double *const found = to.of[0], *const share = to.of[1], *const ties = to.of[2];
    slices.result(found), slices.g(share), slices.count(ties);
    for (int64_t l = 0; l < lanes; ++l) share[l] = share[l] / at_least_one(ties[l]);
  }
  static ALWAYS_INLINE double gradient(double x, double found, double share, double) {
    return is_same(x, found) ? share : 0.0;
  }
};

// Moments again: the norm of order 2 is the root of what they deviate and of their mean. Where that leaves the range in
// which its square is exact enough, the slice is refused.
struct NormRow {
  static constexpr int n = 1;
  static constexpr bool reads_cells = true;
  bool* refused;

  void number(const SliceReader& slices, int64_t lanes, Numbers to) const {
    double *const factor = to.of[0], *const count = to.of[1], *const part = to.of[2];
    slices.count(count), slices.part(1, part);
    for (int64_t l = 0; l < lanes; ++l) factor[l] = count[l] * (part[l] * part[l]);
    slices.part(3, part), slices.result(count);
    for (int64_t l = 0; l < lanes; ++l) {
      const double squares = factor[l] + part[l];
      *refused |= !(squares > 0x1p-900 && squares < infinity) && !(squares == 0.0 && count[l] == 0.0);
      factor[l] = squares;
    }
    slices.g(count);
    for (int64_t l = 0; l < lanes; ++l) factor[l] = factor[l] == 0.0 ? 0.0 : count[l] / __builtin_sqrt(factor[l]);
  }
  static ALWAYS_INLINE double gradient(double x, double factor, double, double) { return x * factor; }
};

// ---- strips: rows x columns of one group, or several short groups -------------------------------------------------------

// (groups, columns) as (groups, rows, columns).
template <class T>
NEVER_INLINE void repeat_rows(const T* lanes, int64_t groups, int64_t rows, int64_t columns, T* __restrict out) {
  if (columns == 1 && rows == 3) {
    for (int64_t g = 0; g < groups; ++g) out[3 * g] = out[3 * g + 1] = out[3 * g + 2] = lanes[g];
    return;
  }
  if (columns == 1) {
    for (int64_t g = 0; g < groups; ++g) {
      const T lane = lanes[g];
      for (int64_t r = 0; r < rows; ++r) out[g * rows + r] = lane;
    }
    return;
  }
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) out[(g * rows + r) * columns + c] = lanes[g * columns + c];
    }
  }
}

// A window with the cells in memory's own order, where its groups lie one after another everywhere.
struct Flat {
  Operand data, mask;
  Pulled pulled;
  Window w;

  Flat(const Block& block, const Pulled& to, const Window& from) : data(block.data), mask(block.mask), pulled(to), w(from) {
    data.stride_n = mask.stride_n = pulled.strides.stride_n = 1;
    w.rows = from.cells(), w.columns = 1, w.groups = 1, w.i = 0, w.c = 0;
  }
};

template <class Row>
class Strips {
 public:
  Strips(const Block& given, const Above& from, const Pulled& to, const Row& of)
      : block(given), above(from), pulled(to), row(of), room(new StripRoom) {}

  void operator()() {
    if (block.outer == 0 || block.n == 0 || block.inner == 0) return;
    const Window shape = window_of();
    Window w;
    for (w.o = 0; w.o < block.outer; w.o += shape.groups) {
      w.groups = least(shape.groups, block.outer - w.o);
      for (w.c = 0; w.c < block.inner; w.c += shape.columns) {
        w.columns = least(shape.columns, block.inner - w.c);
        w.i = 0, w.rows = least(shape.rows, block.n);
        begin(w);
        for (; w.i < block.n; w.i += shape.rows) {
          w.rows = least(shape.rows, block.n - w.i);
          if (is_flat) {
            const Flat flat(block, pulled, w);
            strip(flat.data, flat.mask, flat.pulled, flat.w);
          } else {
            strip(block.data, block.mask, pulled, w);
          }
        }
      }
    }
  }

 private:
  const Block& block;
  const Above& above;
  const Pulled& pulled;
  const Row row;
  const std::unique_ptr<StripRoom> room;
  bool is_flat = false, all_reached = false;
  int64_t period = 0;

  Window window_of() const {
    Window shape;
    const int64_t group_cells = block.n * block.inner;
    shape.rows = block.n, shape.columns = block.inner;
    if (group_cells <= n_short_group) {
      shape.groups = least(block.outer, n_strip / group_cells);
    } else if (block.inner > 1) {
      shape.columns = least(block.inner, block.data.stride_inner == 1 ? n_strip : n_tile_lanes);
      shape.rows = least(block.n, n_strip / shape.columns);
    } else if (block.outer >= 16 && block.data.stride_outer < block.data.stride_n) {  // neighbours in memory, together
      shape.groups = least(block.outer, 64), shape.rows = least(block.n, n_strip / shape.groups);
    } else {
      shape.rows = least(block.n, n_strip);
    }
    return shape;
  }

  // The numbers of the slices, laid out as their cells will be.
  void begin(const Window& w) {
    const int64_t lanes = w.lanes();
    row.number(SliceReader{above, w}, lanes, Numbers{{room->lane[0], room->lane[1], room->lane[2]}});
    const unsigned char* const gate_ptr = above.gate.cells_ptr ? gather_mask(above.gate, first_row(w), room->gate) : room->ones;
    unsigned char every = 1;
    for (int64_t l = 0; l < lanes; ++l) every &= gate_ptr[l];
    all_reached = every;
    is_flat = w.groups > 1 && is_run(block.data, w) && (!block.mask.cells_ptr || is_run(block.mask, w)) &&
              is_run(pulled.strides, w);
    period = is_flat ? w.cells() : period_of(lanes);
    for (int k = 0; k < Row::n; ++k) lay(room->lane[k], w, room->pattern[k]);
    if (!all_reached) lay(gate_ptr, w, room->gate_pattern);
    if (Row::reads_cells) return;
    for (int64_t start = 0; start < w.cells(); start += period) {
      copy_lanes(room->pattern[0], least(period, w.cells() - start), room->cells + start);
    }
  }

  template <class T>
  void lay(const T* lanes, const Window& w, T* pattern) const {
    if (is_flat) return repeat_rows(lanes, w.groups, w.rows, w.columns, pattern);
    spread(lanes, w.lanes(), period, pattern);
  }

  void strip(const Operand& data, const Operand& mask, const Pulled& to, const Window& w) {
    const unsigned char* reached = gather_mask(mask, w, room->own);
    if (!reached) reached = room->ones;
    if (Row::reads_cells) {
      gather_doubles(block.dtype, data, w, nullptr, 0.0, room->cells);
      compute(w.cells());
    }
    if (!all_reached) {
      const unsigned char *const own = reached, *const gate = room->gate_pattern;
      unsigned char* const both = room->reached;
      each_cell(w.cells(), period, [=](int64_t p, int64_t j) { both[j] = own[j] & gate[p]; });
      reached = both;
    }
    write_pulled(to, block.dtype, w, room->cells, reached);
  }

  NEVER_INLINE void compute(int64_t n_cells) {
    double* const cells = room->cells;
    const double *const a = room->pattern[0], *const b = room->pattern[1], *const c = room->pattern[2];
    if constexpr (Row::reads_cells) {
      each_cell(n_cells, period, [=](int64_t p, int64_t j) { cells[j] = Row::gradient(cells[j], a[p], b[p], c[p]); });
    }
  }
};

template <class Row>
int pull_strips(const Block& block, const Above& above, const Pulled& pulled, const Row& row) {
  Strips<Row>(block, above, pulled, row)();
  return fill_done;
}

// Whether 2^-34 of an exponential is less than what rounding to the dtype loses.
bool is_short(Dtype dtype) { return dtype != Dtype::f64; }

struct TiesRoom {
  alignas(64) double cells[n_tile];
  alignas(64) double found[n_tile], pattern[n_tile];
  alignas(64) unsigned char ones[n_tile], own[n_tile], same[n_tile];
};

}  // namespace

int pull_total(const Block& block, const Options&, const Above& above, const Pulled& pulled) {
  return pull_strips(block, above, pulled, TotalRow());
}

int pull_mean(const Block& block, const Options&, const Above& above, const Pulled& pulled) {
  return pull_strips(block, above, pulled, MeanRow());
}

int pull_var(const Block& block, const Options& options, const Above& above, const Pulled& pulled) {
  return pull_strips(block, above, pulled, SpreadRow<false>{options.correction});
}

int pull_std(const Block& block, const Options& options, const Above& above, const Pulled& pulled) {
  return pull_strips(block, above, pulled, SpreadRow<true>{options.correction});
}

int pull_logsumexp(const Block& block, const Options&, const Above& above, const Pulled& pulled) {
  if (is_short(block.dtype)) return pull_strips(block, above, pulled, LogSumExpRow<true>());
  return pull_strips(block, above, pulled, LogSumExpRow<false>());
}

int pull_extreme(const Block& block, const Options&, const Above& above, const Pulled& pulled) {
  return pull_strips(block, above, pulled, ExtremeRow());
}

int pull_norm(const Block& block, const Options&, const Above& above, const Pulled& pulled) {
  bool refused = false;
  pull_strips(block, above, pulled, NormRow{&refused});
  return refused ? fill_refused : fill_done;
}

void ties(const Block& block, const Above& above, int64_t* count) {
  const std::unique_ptr<TiesRoom> room(new TiesRoom);
  std::memset(room->ones, 1, sizeof room->ones);
  each_window(block, block.leaf, [&](Window& w) {
    const int64_t lanes = w.lanes(), period = period_of(lanes);
    alignas(64) int64_t found[n_lanes] = {};
    read_lanes(above.dtype, above.out, w, room->found);
    spread(room->found, lanes, period, room->pattern);
    for (w.i = 0; w.i < block.n; w.i += block.leaf) {
      w.rows = least(block.leaf, block.n - w.i);
      const unsigned char* own = gather_mask(block.mask, w, room->own);
      if (!own) own = room->ones;
      gather_doubles(block.dtype, block.data, w, nullptr, 0.0, room->cells);
      const double *const cells = room->cells, *const pattern = room->pattern;
      unsigned char* const same = room->same;
      each_cell(w.cells(), period, [=](int64_t p, int64_t j) {
        same[j] = static_cast<unsigned char>(own[j] & static_cast<unsigned char>(is_same(cells[j], pattern[p])));
      });
      count_lanes(same, w.cells(), lanes, found);
    }
    copy_lanes(found, lanes, count + w.o * block.inner + w.c);
  });
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
