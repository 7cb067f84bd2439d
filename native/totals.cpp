// The sums and the counts of valid cells.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tree.hpp"

#include "fold.hpp"

#include "walk.hpp"

#include "leaves.hpp"

// ---- settle: a leaf's sums become a state --------------------------------------------------------------------------

inline void settle(Lanes<Sum<double>> sums, int64_t n, PlainState& state) {
  for (int64_t j = 0; j < n; ++j) state.total[j] = sums.sum[j] + 0.0;  // -0 becomes +0
}

inline void settle(Lanes<Sum<int64_t>> sums, int64_t n, CountState& state) { copy_lanes(sums.sum, n, state.count); }

inline void settle(Lanes<Sum<int64_t>> sums, int64_t n, LimbState& state) {
  for (int64_t j = 0; j < n; ++j) {
    state.high[j] = sums.sum[j] >> 32;
    state.low[j] = sums.sum[j] & 0xffffffff;
  }
}

inline void settle(Lanes<Halves> sums, int64_t n, LimbState& state) {
  for (int64_t j = 0; j < n; ++j) {
    state.high[j] = sums.high[j] + (sums.low[j] >> 32);
    state.low[j] = sums.low[j] & 0xffffffff;
  }
}

inline void settle(Lanes<Twofold> sums, int64_t n, TwofoldState& state) {
  for (int64_t j = 0; j < n; ++j) {
    state.hi[j] = sums.hi[j] + 0.0;
    state.lo[j] = sums.lo[j] + 0.0;
    state.exponent[j] = 0;
  }
}

// The lanes that overflowed, or met an infinity or a NaN, take the sums of the cells scaled down.
inline void settle_scaled(Lanes<Twofold> sums, int64_t n, TwofoldState& state) {
  for (int64_t j = 0; j < n; ++j) {
    if (is_finite(state.hi[j]) && is_finite(state.lo[j])) continue;
    state.hi[j] = sums.hi[j] + 0.0;
    state.lo[j] = is_finite(state.hi[j]) ? sums.lo[j] + 0.0 : 0.0;
    state.exponent[j] = scaled_exponent;
  }
}

template <class SumType, Dtype of>
struct LeafSum {
  using State = typename SumType::State;
  static constexpr Dtype dtype = of;
  TileFold<SumType> fold_tile;
  Room<typename SumType::Far, n_lanes> sums;

  void operator()(const Leaf& leaf, const int64_t*, State& state) {
    fold_tile(leaf, sums.lanes());
    settle(sums.lanes(), leaf.tile.lanes(), state);
    if constexpr (std::is_same_v<State, TwofoldState>) {
      if (!state.all_finite(leaf.tile.lanes())) again_scaled(leaf, state);
    }
  }

  NEVER_INLINE void again_scaled(const Leaf& leaf, State& state) {
    TileFold<ScaledF64Sum> fold_scaled;
    fold_scaled(leaf, sums.lanes());
    settle_scaled(sums.lanes(), leaf.tile.lanes(), state);
  }
};

// ---- means ---------------------------------------------------------------------------------------------------------

inline void divide(const PlainState& sum, const int64_t* count, int64_t n, double* mean) {
  for (int64_t l = 0; l < n; ++l) mean[l] = sum.total[l] / at_least_one(count[l]);
}

inline void divide(const LimbState& sum, const int64_t* count, int64_t n, double* mean) {
  for (int64_t l = 0; l < n; ++l) {
    const double total = static_cast<double>(sum.high[l]) * 0x1p32 + static_cast<double>(sum.low[l]);
    mean[l] = total / at_least_one(count[l]);
  }
}

inline void divide(const TwofoldState& sum, const int64_t* count, int64_t n, double* mean) {
  for (int64_t l = 0; l < n; ++l) {
    mean[l] = (sum.hi[l] + sum.lo[l]) / at_least_one(count[l]) * (sum.exponent[l] ? 0x1p128 : 1.0);
  }
}

// To an int64, towards 0.
inline void make_whole(double* mean, int64_t n) {
  for (int64_t l = 0; l < n; ++l) {
    const double within = mean[l] < -0x1p63 ? -0x1p63 : mean[l] > 0x1p63 - 1024 ? 0x1p63 - 1024 : mean[l];
    mean[l] = __builtin_trunc(within) + 0.0;
  }
}

template <class SumType, Dtype dtype>
NEVER_INLINE void means(const Leaf& leaf, const int64_t* count, double* mean) {
  LeafSum<SumType, dtype> sum;
  typename SumType::State state;
  sum(leaf, count, state);
  divide(state, count, leaf.tile.lanes(), mean);
  if (dtype == Dtype::i64) make_whole(mean, leaf.tile.lanes());
}

}  // namespace

void count_leaf(const Leaf& leaf, int64_t* count) {
  TileFold<MaskSum> fold;
  Leaf keep = leaf;
  keep.data = leaf.keep;
  fold(keep, Lanes<Sum<int64_t>>{count});
}

void leaf_means(Dtype dtype, const Leaf& leaf, const int64_t* count, double* mean) {
  switch (dtype) {
    case Dtype::f64: return means<F64Sum, Dtype::f64>(leaf, count, mean);
    case Dtype::i64: return means<I64Sum, Dtype::i64>(leaf, count, mean);
    default: return means<F32Sum, Dtype::f32>(leaf, count, mean);
  }
}

void leaf_means_of_doubles(const Leaf& leaf, const int64_t* count, double* mean) {
  means<DoubleSum, Dtype::f64>(leaf, count, mean);
}

bool total(const Block& given, const Options&, const Parts& parts) {
  Block block = given;
  if (block.dtype == Dtype::boolean) block.dtype = Dtype::u8;
  switch (block.dtype) {
    case Dtype::f64: return walk_route<LeafSum<F64Sum, Dtype::f64>>(block, parts);
    case Dtype::f32:
    case Dtype::f16:
    case Dtype::bf16: return walk_route<LeafSum<F32Sum, Dtype::f32>>(block, parts);
    case Dtype::i8: return walk_route<LeafSum<I8Sum, Dtype::i8>>(block, parts);
    case Dtype::i16: return walk_route<LeafSum<I16Sum, Dtype::i16>>(block, parts);
    case Dtype::i32: return walk_route<LeafSum<I32Sum, Dtype::i32>>(block, parts);
    case Dtype::i64: return walk_route<LeafSum<I64Sum, Dtype::i64>>(block, parts);
    default: return walk_route<LeafSum<U8Sum, Dtype::u8>>(block, parts);
  }
}

namespace {

// The counts of a leaf's mask, and no look at its cells.
struct LeafCount {
  using State = CountState;
  static constexpr Dtype dtype = Dtype::boolean;
  void operator()(const Leaf& leaf, const int64_t* count, State& state) {
    copy_lanes(count, leaf.tile.lanes(), state.count);
  }
};

}  // namespace

// The count is the sum of the mask's own bytes; without a mask it is n.
bool count(const Block& block, const Options&, const Parts& parts) {
  if (block.omits_nan) return count_numbers(block, parts);
  if (block.mask.compact_ptr && block.inner == 1 && block.mask.stride_n == 1) {
    for (int64_t o = 0; o < block.outer; ++o) {
      parts.count_ptr[o] = count_run(block.mask, o * block.mask.stride_outer, block.n);
    }
    return true;
  }
  if (block.mask.compact_ptr) {
    Block mask_alone = block;
    mask_alone.dtype = Dtype::boolean, mask_alone.data = {nullptr, block.n * block.inner, block.inner, 1};
    return walk_route<LeafCount>(mask_alone, parts);
  }
  if (!block.mask.cells_ptr) {
    for (int64_t j = 0; j < block.outer * block.inner; ++j) parts.count_ptr[j] = block.n;
    return true;
  }
  Block mask_block = block;
  mask_block.data = block.mask;
  mask_block.mask = Operand();
  mask_block.dtype = Dtype::boolean;
  return walk_route<LeafSum<MaskSum, Dtype::boolean>>(mask_block, parts);
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
