// Products as a mantissa and a binary exponent: nothing overflows or vanishes on the way (Knuth, TAOCP 2, 4.2).

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "tree.hpp"

#include "halving.hpp"

#include "mantissas.hpp"

constexpr int n_plain_levels = 9;  // mantissas of at least 1/2 multiply this deep before one is near float64's end

struct Pair {
  double high, low;
};

// (a + a_low) * (b + b_low); mantissas are too small to overflow.
ALWAYS_INLINE Pair times(double a, double a_low, double b, double b_low) {
  const double product = a * b;
  const double error = product_error(a, b, product) + (a * b_low + a_low * b);
  const double total = product + error;
  const double rest = error - (total - product);
  return is_finite(product) ? Pair{total, rest} : Pair{product, 0.0};
}

// The pair with its mantissa in [1/2, 1); what was taken out is added to the exponent.
ALWAYS_INLINE void normalize(double& high, double& low, int64_t& exponent) {
  const Mantissa m = mantissa_of<false>(high);
  const bool is_plain = high != 0.0 && is_finite(high);
  low = is_finite(high) ? low * two_to(is_plain ? -m.exponent : 0) : 0.0;
  exponent += is_plain ? m.exponent : 0;
  high = m.mantissa;
}

// Exponent 0 where the mantissa has none.
ALWAYS_INLINE int64_t settled(double high, int64_t exponent) { return high == 0.0 || !is_finite(high) ? 0 : exponent; }

struct ProductState {
  alignas(64) int64_t count[n_lanes], exponent[n_lanes];
  alignas(64) double high[n_lanes], low[n_lanes];
  alignas(64) uint64_t wrapped[n_lanes];  // of integers, modulo 2^64

  void clear(int64_t n) {
    for (int64_t j = 0; j < n; ++j) count[j] = 0, exponent[j] = 1, high[j] = 0.5, low[j] = 0.0, wrapped[j] = 1;
  }

  void join(const ProductState& right, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      Pair product = times(high[j], low[j], right.high[j], right.low[j]);
      int64_t sum = exponent[j] + right.exponent[j];
      normalize(product.high, product.low, sum);
      high[j] = product.high, low[j] = product.low, exponent[j] = settled(product.high, sum);
      wrapped[j] *= right.wrapped[j];
      count[j] += right.count[j];
    }
  }
};

struct ProductRoom {
  alignas(64) double cells[n_tile];
  alignas(64) double lows[n_tile];
  alignas(64) int64_t whole[n_tile];
  alignas(64) unsigned char keep[n_tile];
  alignas(64) int64_t pattern[n_lanes];
  LeafTree<ProductState> tree;
};

// The cells' mantissas, in place; their exponents summed by lane.
template <bool may_be_subnormal>
NEVER_INLINE void split_cells(ProductRoom& room, int64_t n_cells, int64_t lanes, int64_t* exponent) {
  const int64_t period = period_of(lanes);
  int64_t* const pattern = room.pattern;
  double* const cells = room.cells;
  for (int64_t j = 0; j < period; ++j) pattern[j] = 0;
  each_cell(n_cells, period, [=](int64_t p, int64_t j) {
    const Mantissa m = mantissa_of<may_be_subnormal>(cells[j]);
    cells[j] = m.mantissa;
    pattern[p] += m.exponent;
  });
  for (int64_t l = 0; l < lanes; ++l) exponent[l] = 0;
  for (int64_t k = 0; k < period; k += lanes) {
    for (int64_t l = 0; l < lanes; ++l) exponent[l] += pattern[k + l];
  }
}

NEVER_INLINE void absorb_factors(double* to, const double* given, int64_t n) {
  const double* const from = given;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) to[j] *= from[j];
}

NEVER_INLINE void absorb_pairs(double* to, double* to_low, const double* given, const double* given_low, int64_t n) {
  const double *const from = given, *const from_low = given_low;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    const Pair product = times(to[j], to_low[j], from[j], from_low[j]);
    to[j] = product.high, to_low[j] = product.low;
  }
}

// Mantissas multiplied by halving; the product is left in the first row, in normal form.
NEVER_INLINE void multiply_rows(ProductRoom& room, int64_t rows, int64_t lanes, bool pairs, int64_t* exponent) {
  double *const cells = room.cells, *const lows = room.lows;
  const auto normalize_rows = [&](int64_t n_rows) {
    for (int64_t start = 0; start < n_rows * lanes; start += lanes) {
      for (int64_t l = 0; l < lanes; ++l) normalize(cells[start + l], lows[start + l], exponent[l]);
    }
  };
  if (pairs) {
    for (int64_t j = 0; j < rows * lanes; ++j) lows[j] = 0.0;
  }
  int level = 1;
  for (int64_t h = rows > 1 ? first_half(rows) : 0; h > 0; rows = h, h /= 2, ++level) {
    if (pairs) {
      absorb_pairs(cells, lows, cells + h * lanes, lows + h * lanes, (rows - h) * lanes);
    } else {
      absorb_factors(cells, cells + h * lanes, (rows - h) * lanes);
    }
    if (level % n_plain_levels == 0) {
      if (!pairs) std::memset(lows, 0, static_cast<size_t>(h * lanes) * sizeof(double));
      normalize_rows(h);
    }
  }
  if (!pairs) std::memset(lows, 0, static_cast<size_t>(lanes) * sizeof(double));
  normalize_rows(1);
}

// The cells as doubles, and their product modulo 2^64.
NEVER_INLINE void whole_product(ProductRoom& room, const Window& w, uint64_t* wrapped) {
  const int64_t lanes = w.lanes(), period = period_of(lanes);
  uint64_t* const pattern = reinterpret_cast<uint64_t*>(room.pattern);
  const int64_t* const whole = room.whole;
  double* const cells = room.cells;
  for (int64_t j = 0; j < w.cells(); ++j) cells[j] = static_cast<double>(whole[j]);
  for (int64_t j = 0; j < period; ++j) pattern[j] = 1;
  each_cell(w.cells(), period, [=](int64_t p, int64_t j) { pattern[p] *= static_cast<uint64_t>(whole[j]); });
  for (int64_t l = 0; l < lanes; ++l) wrapped[l] = 1;
  for (int64_t k = 0; k < period; k += lanes) {
    for (int64_t l = 0; l < lanes; ++l) wrapped[l] *= pattern[k + l];
  }
}

NEVER_INLINE void leaf_product(ProductRoom& room, const Block& block, const Window& w, bool is_whole,
                               ProductState& state) {
  const int64_t lanes = w.lanes();
  const unsigned char* const keep_ptr = gather_keep(block, w, room.keep);
  for (int64_t l = 0; l < lanes; ++l) state.count[l] = 0;
  count_window(keep_ptr, w, state.count);
  if (is_whole) {
    gather_integers(block, w, keep_ptr, 1, room.whole);
    whole_product(room, w, state.wrapped);
  } else {
    gather_doubles(block.dtype, block.data, w, keep_ptr, 1.0, room.cells);
    for (int64_t l = 0; l < lanes; ++l) state.wrapped[l] = 1;
  }
  const bool pairs = block.dtype == Dtype::f64;
  (pairs ? split_cells<true> : split_cells<false>)(room, w.cells(), lanes, state.exponent);
  multiply_rows(room, w.rows, lanes, pairs, state.exponent);
  for (int64_t l = 0; l < lanes; ++l) {
    state.high[l] = room.cells[l], state.low[l] = room.lows[l];
    state.exponent[l] = settled(state.high[l], state.exponent[l]);
  }
}

}  // namespace

bool product(const Block& block, const Options&, const Parts& parts) {
  const std::unique_ptr<ProductRoom> room(new ProductRoom);
  const bool is_float = block.dtype == Dtype::f64 || block.dtype == Dtype::f32 || block.dtype == Dtype::f16 ||
                        block.dtype == Dtype::bf16;
  room->tree.begin((block.n + block.leaf - 1) / block.leaf);
  each_window(block, block.leaf, [&](Window& w) {
    each_leaf(block, w, [&] {
      leaf_product(*room, block, w, !is_float, room->tree.next());
      room->tree.push(w.lanes());
    });
    const ProductState& state = room->tree.finish(w.lanes());
    const int64_t at = w.o * block.inner + w.c;
    copy_lanes(state.count, w.lanes(), parts.count_ptr + at);
    copy_canonical(state.high, w.lanes(), static_cast<double*>(parts.part_ptr[0]) + at);
    copy_lanes(state.low, w.lanes(), static_cast<double*>(parts.part_ptr[1]) + at);
    copy_lanes(state.exponent, w.lanes(), static_cast<int64_t*>(parts.part_ptr[2]) + at);
    if (!is_float) copy_lanes(state.wrapped, w.lanes(), static_cast<uint64_t*>(parts.part_ptr[3]) + at);
  });
  return true;
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
