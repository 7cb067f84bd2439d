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

#include "powers.hpp"

#include "mantissas.hpp"

#include "exponents.hpp"

constexpr int64_t n_strip = 4096;  // cells: a page of f32, and what is made of them stays in L2
constexpr int n_numbers = 4;       // of a slice

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
  void part(int k, double* out) const { part(Dtype::f64, k, out); }
  void part(Dtype dtype, int k, double* out) const { read_lanes(dtype, above.part[k], w, out); }
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

// The largest or the smallest |cell|: those that have it share g evenly, each with its sign.
struct FarthestRow : ExtremeRow {
  static ALWAYS_INLINE double gradient(double x, double found, double share, double) {
    const double size = size_of(x), signed_share = x < 0.0 ? -share : share;
    return size == found && size != 0.0 ? signed_share : 0.0;
  }
};

struct AbsoluteRow {
  static constexpr int n = 1;
  static constexpr bool reads_cells = true;
  void number(const SliceReader& slices, int64_t, Numbers to) const { slices.g(to.of[0]); }
  static ALWAYS_INLINE double gradient(double x, double g, double, double) { return x > 0.0 ? g : x < 0.0 ? -g : 0.0; }
};

// Powers: count, total, its low part, scale. The sign times (|cell| / norm)^(ord - 1).
template <Order order>
struct PowerRow {
  static constexpr int n = 2;
  static constexpr bool reads_cells = true;

  void number(const SliceReader& slices, int64_t lanes, Numbers to) const {
    double *const norm = to.of[0], *const g = to.of[1], *const scale = to.of[2];
    slices.part(1, norm), slices.part(2, g), slices.part(3, scale);
    for (int64_t l = 0; l < lanes; ++l) norm[l] = norm_of(order, norm[l], g[l], scale[l]);
    slices.g(g);
    for (int64_t l = 0; l < lanes; ++l) {
      const bool is_flat = norm[l] == 0.0 || (is_inverse(order) && norm[l] == infinity);
      g[l] = is_flat ? 0.0 : g[l];
      norm[l] = is_flat ? 1.0 : norm[l];
    }
  }
  static ALWAYS_INLINE double gradient(double x, double norm, double g, double) {
    const double size = size_of(x), with_sign = x < 0.0 ? -g : g;
    const double ratio = order == Order::three ? size / norm : norm / size;
    const double share = order == Order::half             ? __builtin_sqrt(ratio)
                         : order == Order::inverse_square ? ratio * ratio * ratio
                                                          : ratio * ratio;
    return size == 0.0 ? 0.0 : with_sign * share;
  }
};

// Extents: low, high, how many cells equal each.
struct ExtentRow {
  static constexpr int n = 4;
  static constexpr bool reads_cells = true;
  Dtype dtype;  // of the data

  void number(const SliceReader& slices, int64_t lanes, Numbers to) const {
    double *const g = to.of[0], *const low_share = to.of[2], *const high_share = to.of[3];
    slices.g(g), slices.part(Dtype::i64, 2, low_share), slices.part(Dtype::i64, 3, high_share);
    for (int64_t l = 0; l < lanes; ++l) {
      low_share[l] = g[l] / at_least_one(low_share[l]), high_share[l] = g[l] / at_least_one(high_share[l]);
    }
    slices.part(dtype, 0, to.of[0]), slices.part(dtype, 1, to.of[1]);
  }
  static ALWAYS_INLINE double gradient(double x, double low, double high, double low_share, double high_share) {
    return (is_same(x, high) ? high_share : 0.0) - (is_same(x, low) ? low_share : 0.0);
  }
};

// The product of the cells that are not 0, over the cell; its state has the count of those that are in place of its own.
// A lone 0 takes the product, and the others nothing; beside another 0 none takes any. Slices with inf or NaN are refused.
template <bool is_short>
struct ProductRow {
  static constexpr int n = is_short ? 2 : 3;
  static constexpr bool reads_cells = true;
  bool* refused;

  void number(const SliceReader& slices, int64_t lanes, Numbers to) const {
    double *const factor = to.of[0], *const lone = to.of[1], *const exponent = to.of[2], *const zeros = to.of[3];
    slices.g(factor), slices.part(1, lone), slices.part(Dtype::i64, 3, exponent), slices.count(zeros);
    for (int64_t l = 0; l < lanes; ++l) {
      *refused |= !is_finite(lone[l]);
      double taken = 0.0;
      const double g = split(factor[l], taken), product = g * lone[l];
      exponent[l] += taken;
      // beyond float64 nothing is left that a shorter dtype holds
      const double found = is_short ? scaled_by(product, exponent[l]) : product;
      factor[l] = zeros[l] == 0.0 ? found : 0.0;
      lone[l] = zeros[l] == 1.0 ? found : 0.0;
    }
  }
  static ALWAYS_INLINE double gradient(double x, double factor, double lone, double exponent) {
    const double product = x == 0.0 ? lone : factor, divisor = x == 0.0 ? 1.0 : x;
    if constexpr (is_short) return product / divisor;
    double taken;
    const double mantissa = split(divisor, taken);
    return scaled_by(product / mantissa, exponent - taken);
  }
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
    row.number(SliceReader{above, w}, lanes, Numbers{{room->lane[0], room->lane[1], room->lane[2], room->lane[3]}});
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
    const auto& at = room->pattern;
    const double *const a = at[0], *const b = at[1], *const c = at[2], *const d = at[3];
    if constexpr (Row::n == 4) {
      each_cell(n_cells, period, [=](int64_t p, int64_t j) { cells[j] = Row::gradient(cells[j], a[p], b[p], c[p], d[p]); });
    } else if constexpr (Row::reads_cells) {
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

int pull_norm_of_order(const Block& block, const Options& options, const Above& above, const Pulled& pulled) {
  switch (order_of(options.ord)) {
    case Order::half: return pull_strips(block, above, pulled, PowerRow<Order::half>());
    case Order::one: return pull_strips(block, above, pulled, AbsoluteRow());
    case Order::three: return pull_strips(block, above, pulled, PowerRow<Order::three>());
    case Order::inverse: return pull_strips(block, above, pulled, PowerRow<Order::inverse>());
    case Order::inverse_square: return pull_strips(block, above, pulled, PowerRow<Order::inverse_square>());
    case Order::largest:
    case Order::smallest: return pull_strips(block, above, pulled, FarthestRow());
    default: return fill_refused;
  }
}

int pull_extent(const Block& block, const Options&, const Above& above, const Pulled& pulled) {
  return pull_strips(block, above, pulled, ExtentRow{block.dtype});
}

int pull_product(const Block& block, const Options&, const Above& above, const Pulled& pulled) {
  bool refused = false;
  if (is_short(block.dtype)) {
    pull_strips(block, above, pulled, ProductRow<true>{&refused});
  } else {
    pull_strips(block, above, pulled, ProductRow<false>{&refused});
  }
  return refused ? fill_refused : fill_done;
}

void ties(const Block& block, const Above& above, bool of_sizes, int64_t* count) {
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
      if (of_sizes) {
        for (int64_t j = 0; j < w.cells(); ++j) room->cells[j] = size_of(room->cells[j]);
      }
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
