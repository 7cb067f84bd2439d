// Running products and running sums of exponentials, in float64 that leaves its range at no cell.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "elementary.hpp"

#include "exponents.hpp"

#include "narrow.hpp"

#include "scan.hpp"

// step(lane's value, cell) for every cell.
template <class Step>
ALWAYS_INLINE void each_with(const ScanTile& tile, const double* of_lanes, double* pattern, const Step& given) {
  const Step step = given;
  if (!tile.along) {
    const int64_t lanes = tile.w.lanes(), period = period_of(lanes);
    spread(of_lanes, lanes, period, pattern);
    return each_cell(tile.w.cells(), period, [=](int64_t p, int64_t j) { step(pattern[p], j); });
  }
  for (int64_t l = 0; l < tile.w.lanes(); ++l) {
    const double value = of_lanes[l];
    const int64_t first = l * tile.w.rows;
#pragma GCC ivdep
    for (int64_t r = 0; r < tile.w.rows; ++r) step(value, first + r);
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

constexpr int64_t n_product_rows = 512;  // mantissas of at least 1/2: their product is far from float64's end
constexpr double most = 0x1p900, least_product = 0x1p-900;

struct ProductRoom {
  alignas(64) double cells[n_tile], products[n_tile], exponents[n_tile], errors[n_tile];
  alignas(64) int64_t integers[n_tile];
  alignas(64) unsigned char keep[n_tile];
  // of each lane: the product so far is product * 2^exponent (1 + error)
  alignas(64) double product[n_tile_lanes], exponent[n_tile_lanes], error[n_tile_lanes];
  alignas(64) int64_t wrapped[n_tile_lanes];
};

struct Multiply {
  using State = double;
  const double* cells;
  double *products, *product;
  ALWAYS_INLINE State load(int64_t l) const { return product[l]; }
  ALWAYS_INLINE void store(int64_t l, State state) const { product[l] = state; }
  ALWAYS_INLINE void operator()(State& state, int64_t at, int64_t) const { products[at] = state = state * cells[at]; }
};

struct MultiplyIntegers {
  using State = int64_t;
  int64_t *cells, *product;
  bool* lost_ptr;
  ALWAYS_INLINE State load(int64_t l) const { return product[l]; }
  ALWAYS_INLINE void store(int64_t l, State state) const { product[l] = state; }
  ALWAYS_INLINE void operator()(State& state, int64_t at, int64_t) const {
    *lost_ptr |= __builtin_mul_overflow(state, cells[at], &state);
    cells[at] = state;
  }
};

ALWAYS_INLINE double size_of(double x) { return bits_as<double>(bits_as<uint64_t>(x) & 0x7fffffffffffffffu); }

// The exact error of the rounded product of a and b (Dekker), 0 where it has none.
ALWAYS_INLINE double product_error(double a, double b, double product) {
  constexpr double splitter = 134217729.0;
  const double spread_a = splitter * a, spread_b = splitter * b;
  const double a_top = spread_a - (spread_a - a), b_top = spread_b - (spread_b - b);
  const double a_rest = a - a_top, b_rest = b - b_top;
  const double error = ((a_top * b_top - product) + a_top * b_rest + a_rest * b_top) + a_rest * b_rest;
  return is_finite(error) ? error : 0.0;
}

ALWAYS_INLINE double relative_error(double before, double cell, double product) {
  return product == 0.0 ? 0.0 : product_error(before, cell, product) / product;
}

// Products corrected by the sum of the relative errors of their steps (Ogita and Oishi's product as a scan); `before`
// are the lanes' products before the tile.
NEVER_INLINE void correct_products(ProductRoom& room, const ScanTile& tile, const double* before) {
  double *const errors = room.errors, *const products = room.products;
  step_errors(tile, before, room.cells, products, errors, [](double from, double cell, double product) {
    return relative_error(from, cell, product);
  });
  run_scan(Add{errors, errors, room.error}, tile);
#pragma GCC ivdep
  for (int64_t j = 0; j < tile.w.cells(); ++j) {
    products[j] = is_finite(errors[j]) & is_finite(products[j]) ? products[j] + products[j] * errors[j] : products[j];
  }
}

NEVER_INLINE bool all_in_range(const double* cells, int64_t n, double low, double high) {
  uint64_t out = 0;
  for (int64_t j = 0; j < n; ++j) {
    const double size = size_of(cells[j]);
    out |= static_cast<uint64_t>(!(size >= low) | !(size <= high));
  }
  return !out;
}

NEVER_INLINE void split_cells(double* cells, double* given_exponents, int64_t n) {
  double* const exponents = given_exponents;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) cells[j] = split(cells[j], exponents[j]);
}

NEVER_INLINE void scale_products(double* products, const double* given_exponents, int64_t n) {
  const double* const exponents = given_exponents;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) products[j] = scaled_by(products[j], exponents[j]);
}

// The running products of a tile's cells; with the exponents apart, which changes no digit, where they may leave
// float64's range.
void run_products(ProductRoom& room, const ScanTile& tile, bool is_pair) {
  const int64_t lanes = tile.w.lanes(), n = tile.w.cells();
  alignas(64) double before[n_tile_lanes], before_error[n_tile_lanes];
  copy_lanes(room.product, lanes, before), copy_lanes(room.error, lanes, before_error);
  bool is_plain = true;
  for (int64_t l = 0; l < lanes; ++l) is_plain &= room.exponent[l] == 0.0;
  const Multiply multiply{room.cells, room.products, room.product};
  if (is_plain) {
    run_scan(multiply, tile);
    if (all_in_range(room.products, n, least_product, most) && (!is_pair || all_in_range(room.cells, n, 0.0, most))) {
      if (is_pair) correct_products(room, tile, before);
      return;
    }
    copy_lanes(before, lanes, room.product);
  }
  for (int64_t l = 0; l < lanes; ++l) {  // in normal form
    double shift;
    before[l] = room.product[l] = split(room.product[l], shift);
    room.exponent[l] += shift;
  }
  split_cells(room.cells, room.exponents, n);
  run_scan(multiply, tile);
  run_scan(Add{room.exponents, room.exponents, room.exponent}, tile);
  if (is_pair) correct_products(room, tile, before);
  scale_products(room.products, room.exponents, n);
  for (int64_t l = 0; l < lanes; ++l) {
    double shift;
    const double mantissa = split(room.product[l], shift), exponent = room.exponent[l] + shift;
    const bool is_settled = mantissa == 0.0 || !is_finite(mantissa);
    if (!is_settled && !(size_of(exponent) <= 800.0)) continue;
    room.product[l] = is_settled ? mantissa : scaled_by(mantissa, exponent);
    room.exponent[l] = 0.0;
  }
}

// ---- logs of sums of exponentials -----------------------------------------------------------------------------------

constexpr double most_above = 64.0;  // beyond which a cell becomes the base, and what was summed is almost nothing

struct LogRoom {
  alignas(64) double cells[n_tile], raised[n_tile], bases[n_tile], rescalings[n_tile];
  alignas(64) unsigned char keep[n_tile];
  alignas(64) double pattern[n_tile_lanes];
  // of each lane: the sum of exp(cell - base)
  alignas(64) double base[n_tile_lanes], limit[n_tile_lanes], sum[n_tile_lanes], low[n_tile_lanes];
};

// The base of each cell: the first finite valid one, then one that is `most_above` larger. What came before is
// multiplied by exp(rescaling).
struct Rebase {
  using State = double;
  const double* cells;
  double *bases, *rescalings, *base;
  ALWAYS_INLINE State load(int64_t l) const { return base[l]; }
  ALWAYS_INLINE void store(int64_t l, State state) const { base[l] = state; }
  ALWAYS_INLINE void operator()(State& state, int64_t at, int64_t) const {
    const double cell = cells[at];
    const bool is_next = (cell > state + most_above) & (cell < infinity);
    const double fall = state - cell;
    rescalings[at] = is_next & (state > -infinity) ? fall > -700.0 ? fall : -700.0 : 0.0;
    bases[at] = state = is_next ? cell : state;
  }
};

template <bool is_pair, bool rescales>
struct SumRaised {
  struct State {
    double sum, low;
  };
  double* raised;
  const double* factors;
  double *sum, *low;
  ALWAYS_INLINE State load(int64_t l) const { return {sum[l], is_pair ? low[l] : 0.0}; }
  ALWAYS_INLINE void store(int64_t l, State state) const {
    sum[l] = state.sum;
    if (is_pair) low[l] = state.low;
  }
  ALWAYS_INLINE void operator()(State& state, int64_t at, int64_t) const {
    const double before = rescales ? state.sum * factors[at] : state.sum;
    const double next = before + raised[at];
    if (is_pair) {
      const double low = rescales ? state.low * factors[at] : state.low;
      state.low = low + rounding_error(before, raised[at], next);
    }
    state.sum = next;
    raised[at] = is_pair && is_finite(next) ? next + state.low : next;
  }
};

// exp(cell - base), for base 0 where there is none yet: quick, or with the rounding error of the difference made good.
template <bool is_pair>
ALWAYS_INLINE double raised_above(double cell, double given_base) {
  const double base = given_base == -infinity ? 0.0 : given_base;
  const double difference = cell - base;
  if (!is_pair) return difference < -700.0 ? 0.0 : difference > 700.0 ? infinity : quick_exponential(difference);
  const double plain = exponential(difference);
  return is_finite(difference) ? plain + plain * rounding_error(cell, -base, difference) : plain;
}

// base + log(sum), where the log's large part is added exactly.
ALWAYS_INLINE double log_above(double sum, double given_base) {
  const double base = given_base == -infinity ? 0.0 : given_base;
  double large;
  const double rest = logarithm_rest(sum, large), total = base + large;
  const double value = total + (rounding_error(base, large, total) + rest);
  return sum == 0.0 ? -infinity : sum < infinity ? value : sum;
}

template <bool is_pair>
void run_logs(LogRoom& room, const ScanTile& tile) {
  const int64_t lanes = tile.w.lanes(), n = tile.w.cells();
  const double* const cells = room.cells;
  double *const raised = room.raised, *const bases = room.bases, *const rescalings = room.rescalings;
  for (int64_t l = 0; l < lanes; ++l) room.limit[l] = room.base[l] + most_above;
  uint64_t above = 0;
  each_with(tile, room.limit, room.pattern, [=](double limit, int64_t j) { raised[j] = cells[j] > limit ? 1.0 : 0.0; });
  for (int64_t j = 0; j < n; ++j) above |= bits_as<uint64_t>(raised[j]);
  if (!above) {
    each_with(tile, room.base, room.pattern,
              [=](double base, int64_t j) { raised[j] = raised_above<is_pair>(cells[j], base); });
    run_scan(SumRaised<is_pair, false>{raised, nullptr, room.sum, room.low}, tile);
    return each_with(tile, room.base, room.pattern,
                     [=](double base, int64_t j) { raised[j] = log_above(raised[j], base); });
  }
  run_scan(Rebase{cells, bases, rescalings, room.base}, tile);
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) rescalings[j] = exponential(rescalings[j]);
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) raised[j] = raised_above<is_pair>(cells[j], bases[j]);
  run_scan(SumRaised<is_pair, true>{raised, rescalings, room.sum, room.low}, tile);
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) raised[j] = log_above(raised[j], bases[j]);
}

bool is_short(Dtype dtype) { return dtype == Dtype::f32 || dtype == Dtype::f16 || dtype == Dtype::bf16; }

}  // namespace

int cumulative_product(const Block& block, const Options&, const Filled& filled) {
  const std::unique_ptr<ProductRoom> room(new ProductRoom);
  int status = fill_done;
  const bool is_integral = filled.dtype == Dtype::i64;
  const auto begin = [&](const ScanTile& tile) {
    for (int64_t l = 0; l < tile.w.lanes(); ++l) {
      room->product[l] = 1.0, room->exponent[l] = room->error[l] = 0.0, room->wrapped[l] = 1;
    }
  };
  each_scan_tile(block, n_product_rows, false, begin, [&](const ScanTile& tile) {
    if (status == fill_refused) return;
    const unsigned char* const keep_ptr = scan_keep(block, tile, room->keep);
    if (!is_integral) {
      scan_doubles(block, tile, keep_ptr, 1.0, room->cells);
      run_products(*room, tile, block.dtype == Dtype::f64);
      if (write_scan(filled, tile, room->products, keep_ptr)) status = fill_overflowed;
      return;
    }
    bool lost = false;
    each_part(block.data, tile, [&](const Window& w, int64_t at) {
      gather_integers(block, w, from(keep_ptr, at), 1, room->integers + at);
    });
    run_scan(MultiplyIntegers{room->integers, room->wrapped, &lost}, tile);
    if (lost) {
      status = fill_refused;
    } else {
      write_scan_cells(filled, tile, room->integers, keep_ptr, ToI64());
    }
  });
  return status;
}

int cumulative_logsumexp(const Block& block, const Options&, const Filled& filled) {
  const std::unique_ptr<LogRoom> room(new LogRoom);
  const bool is_quick = is_short(block.dtype) && is_short(filled.dtype);
  bool overflowed = false;
  const auto begin = [&](const ScanTile& tile) {
    for (int64_t l = 0; l < tile.w.lanes(); ++l) room->base[l] = -infinity, room->sum[l] = room->low[l] = 0.0;
  };
  each_scan_tile(block, block.leaf, false, begin, [&](const ScanTile& tile) {
    const unsigned char* const keep_ptr = scan_keep(block, tile, room->keep);
    scan_doubles(block, tile, keep_ptr, -infinity, room->cells);
    (is_quick ? run_logs<false> : run_logs<true>)(*room, tile);
    overflowed |= write_scan(filled, tile, room->raised, keep_ptr);
  });
  return overflowed ? fill_overflowed : fill_done;
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
