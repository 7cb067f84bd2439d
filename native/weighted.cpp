// Weighted sums and moments: each valid cell counts for its weight.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "tree.hpp"

#include "halving.hpp"

#include "mantissas.hpp"

ALWAYS_INLINE double nonzero(double weight) { return weight == 0.0 ? 1.0 : weight; }

struct WeightedRoom {
  alignas(64) double cells[n_tile];
  alignas(64) double weights[n_tile];
  alignas(64) double sums[n_tile];
  alignas(64) double lows[n_tile];
  alignas(64) double errors[n_tile];
  alignas(64) unsigned char keep[n_tile];
  alignas(64) double pattern[n_lanes];

  // Cells and weights of a leaf, 0 under the mask.
  const unsigned char* load(const Block& block, const Window& w, int64_t* count) {
    const unsigned char* const keep_ptr = gather_keep(block, w, keep);
    for (int64_t l = 0; l < w.lanes(); ++l) count[l] = 0;
    count_window(keep_ptr, w, count);
    gather_doubles(block.dtype, block.data, w, keep_ptr, 0.0, cells);
    gather_doubles(block.weights_dtype, block.weights, w, keep_ptr, 0.0, weights);
    return keep_ptr;
  }
};

// The sums of `sums` along the rows, as pairs; without `pairs` their low parts are 0.
void sum_rows(WeightedRoom& room, const Window& w, bool pairs, double* total, double* low) {
  const int64_t lanes = w.lanes();
  if (pairs) {
    halve_pairs(room.sums, room.lows, w.rows, lanes);
  } else {
    halve(room.sums, w.rows, lanes);
  }
  for (int64_t l = 0; l < lanes; ++l) {
    total[l] = room.sums[l] + 0.0;
    low[l] = pairs && is_finite(total[l]) ? room.lows[l] + 0.0 : 0.0;
  }
}

// ---- totals ---------------------------------------------------------------------------------------------------------

struct WeightedTotalState {
  alignas(64) int64_t count[n_lanes];
  alignas(64) double weight[n_lanes], weight_low[n_lanes];
  TwofoldState products;

  void clear(int64_t n) {
    for (int64_t j = 0; j < n; ++j) count[j] = 0, weight[j] = weight_low[j] = 0.0;
    products.clear(n);
  }

  void join(const WeightedTotalState& right, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const double sum = weight[j] + right.weight[j];
      const double low = (weight_low[j] + right.weight_low[j]) + rounding_error(weight[j], right.weight[j], sum);
      weight_low[j] = is_finite(sum) ? low : 0.0;
      weight[j] = sum;
      count[j] += right.count[j];
    }
    products.join(right.products, n);
  }
};

// sums = the products of cells and weights, both times `scale`; errors = what these were rounded by, where they are kept.
NEVER_INLINE void multiply_cells(WeightedRoom& room, int64_t n_cells, bool pairs, double scale) {
  const double *const cells = room.cells, *const weights = room.weights;
  double *const sums = room.sums, *const errors = room.errors;
  if (!pairs) {
    for (int64_t j = 0; j < n_cells; ++j) sums[j] = (cells[j] * scale) * (weights[j] * scale);
    return;
  }
#pragma GCC ivdep
  for (int64_t j = 0; j < n_cells; ++j) {
    const double a = cells[j] * scale, b = weights[j] * scale, product = a * b;
    sums[j] = product;
    errors[j] = product_error(a, b, product);
  }
}

NEVER_INLINE void sum_products(WeightedRoom& room, const Window& w, bool pairs, double scale, double* total,
                               double* low) {
  multiply_cells(room, w.cells(), pairs, scale);
  sum_rows(room, w, pairs, total, low);
  if (!pairs) return;
  halve(room.errors, w.rows, w.lanes());
  for (int64_t l = 0; l < w.lanes(); ++l) low[l] = is_finite(total[l]) ? low[l] + (room.errors[l] + 0.0) : 0.0;
}

NEVER_INLINE void leaf_weighted_total(WeightedRoom& room, const Block& block, const Window& w, bool pairs,
                                      WeightedTotalState& state) {
  const int64_t lanes = w.lanes();
  room.load(block, w, state.count);
  copy_lanes(room.weights, w.cells(), room.sums);
  sum_rows(room, w, true, state.weight, state.weight_low);
  TwofoldState& products = state.products;
  sum_products(room, w, pairs, 1.0, products.hi, products.lo);
  int64_t lost = 0;
  for (int64_t l = 0; l < lanes; ++l) products.exponent[l] = 0, lost |= !is_finite(products.hi[l]);
  if (!lost) return;
  alignas(64) double total[n_lanes], low[n_lanes];
  sum_products(room, w, pairs, 0x1p-64, total, low);
  for (int64_t l = 0; l < lanes; ++l) {
    if (is_finite(products.hi[l])) continue;
    products.hi[l] = total[l], products.lo[l] = low[l], products.exponent[l] = scaled_exponent;
  }
}

// ---- moments --------------------------------------------------------------------------------------------------------

struct WeightedMomentsState {
  alignas(64) int64_t count[n_lanes];
  alignas(64) double weight[n_lanes], mean[n_lanes], low[n_lanes], m2[n_lanes];

  void clear(int64_t n) {
    for (int64_t j = 0; j < n; ++j) count[j] = 0, weight[j] = mean[j] = low[j] = m2[j] = 0.0;
  }

  // West's update (CACM 22, 1979); what weighs nothing changes nothing, but 0 * NaN is NaN wherever it stands.
  void join(const WeightedMomentsState& right, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const double both = weight[j] + right.weight[j];
      const double share = right.weight[j] / nonzero(both);
      const double delta = (right.mean[j] - mean[j]) + (right.low[j] - low[j]);
      const double shifted_low = low[j] + delta * share;
      const double sum = mean[j] + shifted_low;
      const double error = rounding_error(mean[j], shifted_low, sum);
      const double squares = (m2[j] + right.m2[j]) + delta * delta * share * weight[j];
      const bool left_empty = weight[j] == 0.0 && mean[j] == mean[j];
      const bool right_empty = right.weight[j] == 0.0 && right.mean[j] == right.mean[j];
      low[j] = left_empty ? right.low[j] : right_empty ? low[j] : is_finite(sum) ? error : 0.0;
      mean[j] = left_empty ? right.mean[j] : right_empty ? mean[j] : sum;
      m2[j] = left_empty ? right.m2[j] : right_empty ? m2[j] : squares;
      weight[j] = left_empty ? right.weight[j] : right_empty ? weight[j] : both;
      count[j] += right.count[j];
    }
  }
};

// The sums of `sums`, rounded once where they are summed in pairs.
void settle_rows(WeightedRoom& room, const Window& w, bool pairs, double* total) {
  alignas(64) double low[n_lanes];
  sum_rows(room, w, pairs, total, low);
  for (int64_t l = 0; l < w.lanes(); ++l) total[l] += low[l];
}

// False where a weight is negative.
NEVER_INLINE bool leaf_weighted_moments(WeightedRoom& room, const Block& block, const Window& w, bool pairs,
                                        WeightedMomentsState& state) {
  const int64_t lanes = w.lanes(), n_cells = w.cells(), period = period_of(lanes);
  const unsigned char* const keep_ptr = room.load(block, w, state.count);
  double *const cells = room.cells, *const weights = room.weights, *const sums = room.sums;
  int64_t negative = 0;
  for (int64_t j = 0; j < n_cells; ++j) negative |= weights[j] < 0.0;
  if (negative) return false;
  copy_lanes(weights, n_cells, sums);
  settle_rows(room, w, pairs, state.weight);
  for (int64_t j = 0; j < n_cells; ++j) sums[j] = cells[j] * weights[j];
  settle_rows(room, w, pairs, state.mean);
  for (int64_t l = 0; l < lanes; ++l) state.mean[l] = state.mean[l] / nonzero(state.weight[l]);
  spread(state.mean, lanes, period, room.pattern);
  const double* const pattern = room.pattern;
  each_cell(n_cells, period, [=](int64_t p, int64_t j) {
    const uint64_t keep = keep_ptr ? -static_cast<uint64_t>(keep_ptr[j]) : ~uint64_t{0};
    const double deviation = bits_as<double>(bits_as<uint64_t>(cells[j] - pattern[p]) & keep);
    cells[j] = deviation;
    sums[j] = deviation * weights[j];
  });
  alignas(64) double error[n_lanes];
  settle_rows(room, w, pairs, error);
  for (int64_t j = 0; j < n_cells; ++j) sums[j] = cells[j] * cells[j] * weights[j];
  settle_rows(room, w, pairs, state.m2);
  for (int64_t l = 0; l < lanes; ++l) {
    state.low[l] = error[l] / nonzero(state.weight[l]);
    const double m2 = state.m2[l] - error[l] * state.low[l];
    state.m2[l] = m2 < 0.0 ? 0.0 : m2;
  }
  return true;
}

}  // namespace

bool weighted_total(const Block& block, const Options& options, const Parts& parts) {
  const std::unique_ptr<WeightedRoom> room(new WeightedRoom);
  LeafTree<WeightedTotalState> tree;
  tree.begin((block.n + block.leaf - 1) / block.leaf);
  each_window(block, block.leaf, [&](Window& w) {
    each_leaf(block, w, [&] {
      leaf_weighted_total(*room, block, w, options.wide, tree.next());
      tree.push(w.lanes());
    });
    const WeightedTotalState& state = tree.finish(w.lanes());
    const int64_t at = w.o * block.inner + w.c;
    copy_lanes(state.count, w.lanes(), parts.count_ptr + at);
    copy_canonical(state.weight, w.lanes(), static_cast<double*>(parts.part_ptr[0]) + at);
    copy_canonical(state.weight_low, w.lanes(), static_cast<double*>(parts.part_ptr[1]) + at);
    const TwofoldState& products = state.products;
    copy_canonical(products.hi, w.lanes(), static_cast<double*>(parts.part_ptr[2]) + at);
    copy_canonical(products.lo, w.lanes(), static_cast<double*>(parts.part_ptr[3]) + at);
    copy_lanes(products.exponent, w.lanes(), static_cast<int64_t*>(parts.part_ptr[4]) + at);
  });
  return true;
}

bool weighted_moments(const Block& block, const Options& options, const Parts& parts) {
  const std::unique_ptr<WeightedRoom> room(new WeightedRoom);
  LeafTree<WeightedMomentsState> tree;
  tree.begin((block.n + block.leaf - 1) / block.leaf);
  bool is_served = true;
  each_window(block, block.leaf, [&](Window& w) {
    if (!is_served) return;
    each_leaf(block, w, [&] {
      is_served &= leaf_weighted_moments(*room, block, w, options.wide, tree.next());
      tree.push(w.lanes());
    });
    const WeightedMomentsState& state = tree.finish(w.lanes());
    const int64_t at = w.o * block.inner + w.c;
    copy_lanes(state.count, w.lanes(), parts.count_ptr + at);
    const double* const held[] = {state.weight, state.mean, state.low, state.m2};
    for (int k = 0; k < 4; ++k) copy_canonical(held[k], w.lanes(), static_cast<double*>(parts.part_ptr[k]) + at);
  });
  return is_served;
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
