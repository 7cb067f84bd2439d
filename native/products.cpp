// Products as a mantissa and a binary exponent: nothing overflows or vanishes on the way (Knuth, TAOCP 2, 4.2).

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tree.hpp"

#include "fold.hpp"

#include "walk.hpp"

#include "leaves.hpp"

#include "mantissas.hpp"

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
  alignas(64) int64_t exponent[n_lanes];
  alignas(64) double high[n_lanes], low[n_lanes];
  alignas(64) uint64_t wrapped[n_lanes];  // of integers, modulo 2^64

  void clear(int64_t n) {
    for (int64_t j = 0; j < n; ++j) exponent[j] = 1, high[j] = 0.5, low[j] = 0.0, wrapped[j] = 1;
  }

  void join(const ProductState& right, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      Pair product = times(high[j], low[j], right.high[j], right.low[j]);
      int64_t sum = exponent[j] + right.exponent[j];
      normalize(product.high, product.low, sum);
      high[j] = product.high, low[j] = product.low, exponent[j] = settled(product.high, sum);
      wrapped[j] *= right.wrapped[j];
    }
  }

  void write(const Parts& parts, int64_t at, int64_t n) const {
    copy_canonical(high, n, static_cast<double*>(parts.part_ptr[0]) + at);
    copy_lanes(low, n, static_cast<double*>(parts.part_ptr[1]) + at);
    copy_lanes(exponent, n, static_cast<int64_t*>(parts.part_ptr[2]) + at);
    if (parts.part_ptr[3]) copy_lanes(wrapped, n, static_cast<uint64_t*>(parts.part_ptr[3]) + at);
  }
};

// Factors of at least 1/2 multiply 64 cells deep, and from normal form on 64 times deeper, far from float64's end. A
// `pair` has a low part; a `whole` one its integer too, modulo 2^64.
template <bool is_pair, bool is_whole, bool is_normal>
struct Factor {
  double high, low;
  int64_t exponent;
  uint64_t wrapped;
  Factor() = default;
  explicit Factor(Factor<is_pair, is_whole, !is_normal> other)
      : high(other.high), low(other.low), exponent(other.exponent), wrapped(other.wrapped) {
    normalize(high, low, exponent);
  }
};

template <bool is_pair, bool is_whole, bool is_normal>
ALWAYS_INLINE auto absorb(Factor<is_pair, is_whole, is_normal> a, Factor<is_pair, is_whole, is_normal> b) {
  a.exponent += b.exponent;
  if constexpr (is_whole) a.wrapped *= b.wrapped;
  if constexpr (!is_pair) {
    a.high *= b.high;
    return a;
  } else {
    const Pair product = times(a.high, a.low, b.high, b.low);
    a.high = product.high, a.low = product.low;
    return a;
  }
}

template <bool is_pair, bool is_whole, bool is_normal>
struct Lanes<Factor<is_pair, is_whole, is_normal>> {
  double *high, *low;
  int64_t* exponent;
  uint64_t* wrapped;
  ALWAYS_INLINE auto get(int64_t j) const {
    Factor<is_pair, is_whole, is_normal> factor;
    factor.high = high[j], factor.exponent = exponent[j];
    factor.low = 0.0, factor.wrapped = 1;
    if constexpr (is_pair) factor.low = low[j];
    if constexpr (is_whole) factor.wrapped = wrapped[j];
    return factor;
  }
  ALWAYS_INLINE void set(int64_t j, Factor<is_pair, is_whole, is_normal> factor) const {
    high[j] = factor.high, exponent[j] = factor.exponent;
    if constexpr (is_pair) low[j] = factor.low;
    if constexpr (is_whole) wrapped[j] = factor.wrapped;
  }
  Lanes from(int64_t j) const {
    return {high + j, is_pair ? low + j : nullptr, exponent + j, is_whole ? wrapped + j : nullptr};
  }
};

template <bool is_pair, bool is_whole, bool is_normal, int n>
struct Room<Factor<is_pair, is_whole, is_normal>, n> {
  alignas(64) double high[n];
  alignas(64) double low[is_pair ? n : 1];
  alignas(64) int64_t exponent[n];
  alignas(64) uint64_t wrapped[is_whole ? n : 1];
  Lanes<Factor<is_pair, is_whole, is_normal>> lanes() { return {high, low, exponent, wrapped}; }
};

ALWAYS_INLINE uint64_t choose(uint64_t keep, uint64_t a, uint64_t b) { return (a & keep) | (b & ~keep); }

template <class Cell>
struct FactorCell : Chooses {
  static constexpr bool is_whole = std::is_same_v<Cell, I64Cell>;
  static constexpr bool is_pair = std::is_same_v<Cell, F64Cell>;
  using Raw = typename Cell::Raw;
  using Wide = Factor<is_pair, is_whole, false>;

  // 1 under the mask.
  template <bool is_masked>
  static ALWAYS_INLINE Wide widen(Raw raw, unsigned char keep_byte) {
    const uint64_t keep = -static_cast<uint64_t>(keep_byte);
    double cell = as_double(Cell::widen(raw));
    if constexpr (is_masked) cell = bits_as<double>(choose(keep, bits_as<uint64_t>(cell), bits_as<uint64_t>(1.0)));
    const Mantissa mantissa = mantissa_of<is_pair>(cell);
    Wide factor;
    factor.high = mantissa.mantissa, factor.low = 0.0, factor.exponent = mantissa.exponent, factor.wrapped = 1;
    if constexpr (is_whole) factor.wrapped = is_masked ? choose(keep, raw, 1) : raw;
    return factor;
  }
};

template <class CellType>
struct FactorSum {
  using Cell = FactorCell<CellType>;
  using Near = typename Cell::Wide;
  using Far = Factor<Cell::is_pair, Cell::is_whole, true>;
};

template <class CellType, Dtype of>
struct LeafProduct {
  using State = ProductState;
  static constexpr Dtype dtype = of;
  TileFold<FactorSum<CellType>> fold_tile;
  Room<typename FactorSum<CellType>::Far, n_lanes> products;

  void operator()(const Leaf& leaf, const int64_t*, State& state) {
    fold_tile(leaf, products.lanes());
    const auto lanes = products.lanes();
    for (int64_t l = 0; l < leaf.tile.lanes(); ++l) {
      auto product = lanes.get(l);
      normalize(product.high, product.low, product.exponent);
      state.high[l] = product.high, state.low[l] = product.low;
      state.exponent[l] = settled(product.high, product.exponent);
      state.wrapped[l] = product.wrapped;
    }
  }
};

}  // namespace

bool product(const Block& block, const Options&, const Parts& parts) {
  switch (block.dtype) {
    case Dtype::f64: return walk_route<LeafProduct<F64Cell, Dtype::f64>>(block, parts);
    case Dtype::f32:
    case Dtype::f16:
    case Dtype::bf16: return walk_route<LeafProduct<F32Cell, Dtype::f32>>(block, parts);
    default: return walk_route<LeafProduct<I64Cell, Dtype::i64>>(block, parts);
  }
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
