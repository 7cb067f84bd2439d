// Mean and squared deviations: two passes in a leaf, Chan, Golub and LeVeque's update between leaves.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "tree.hpp"

#include "halving.hpp"

#include "narrow.hpp"

struct MomentsState {
  alignas(64) int64_t count[n_lanes];
  alignas(64) double mean[n_lanes], low[n_lanes], m2[n_lanes];

  void clear(int64_t n) {
    for (int64_t j = 0; j < n; ++j) count[j] = 0, mean[j] = low[j] = m2[j] = 0.0;
  }

  // An empty side is chosen away, never multiplied by 0.
  void join(const MomentsState& right, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t both = count[j] + right.count[j];
      const double weight = static_cast<double>(right.count[j]) / static_cast<double>(both > 1 ? both : 1);
      const double delta = (right.mean[j] - mean[j]) + (right.low[j] - low[j]);
      const double shift = delta * weight;
      const double shifted_low = low[j] + shift;
      const double sum = mean[j] + shifted_low;
      const double error = rounding_error(mean[j], shifted_low, sum);
      const double squares = (m2[j] + right.m2[j]) + delta * shift * static_cast<double>(count[j]);
      const bool left_empty = count[j] == 0, right_empty = right.count[j] == 0;
      low[j] = left_empty ? right.low[j] : right_empty ? low[j] : is_finite(sum) ? error : 0.0;
      mean[j] = left_empty ? right.mean[j] : right_empty ? mean[j] : sum;
      m2[j] = left_empty ? right.m2[j] : right_empty ? m2[j] : squares;
      count[j] = both;
    }
  }
};

ALWAYS_INLINE double at_least_one(int64_t count) { return static_cast<double>(count > 1 ? count : 1); }

struct MomentsRoom {
  alignas(64) double cells[n_tile];
  alignas(64) double sums[n_tile];
  alignas(64) double lows[n_tile];
  alignas(64) unsigned char keep[n_tile];
  alignas(64) double pattern[n_lanes];
  alignas(64) int64_t whole_pattern[n_lanes];
  LeafTree<MomentsState> tree;
};

// sums = the deviations of the valid cells from the mean; 0 under the mask.
NEVER_INLINE void deviations(MomentsRoom& room, const Window& w, const unsigned char* keep_ptr, const double* mean) {
  const int64_t lanes = w.lanes(), period = period_of(lanes);
  spread(mean, lanes, period, room.pattern);
  const double *const pattern = room.pattern, *const cells = room.cells;
  double* const sums = room.sums;
  if (!keep_ptr) {
    each_cell(w.cells(), period, [=](int64_t p, int64_t j) { sums[j] = cells[j] - pattern[p]; });
    return;
  }
  each_cell(w.cells(), period, [=](int64_t p, int64_t j) {
    const uint64_t bits = bits_as<uint64_t>(cells[j] - pattern[p]);
    sums[j] = bits_as<double>(bits & -static_cast<uint64_t>(keep_ptr[j]));
  });
}

// Apart from the conversion to integers: GCC makes one truncation of the two, which keeps the sign of a zero.
NEVER_INLINE void as_doubles(const int64_t* integers, int64_t n, double* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = static_cast<double>(integers[j]);
}

// The same of int64 cells, exact where doubles would have lost the low bits; the mean is rounded to an integer.
NEVER_INLINE void integer_deviations(MomentsRoom& room, const Block& block, const Window& w,
                                     const unsigned char* keep_ptr, MomentsState& state) {
  const int64_t lanes = w.lanes(), period = period_of(lanes), n_cells = w.cells();
  int64_t* const cells = reinterpret_cast<int64_t*>(room.cells);
  gather_integers(block, w, keep_ptr, 0, cells);
  int64_t* const high = reinterpret_cast<int64_t*>(room.sums);
  int64_t* const low = reinterpret_cast<int64_t*>(room.lows);
  alignas(64) int64_t high_sums[n_lanes], low_sums[n_lanes];
  for (int64_t l = 0; l < lanes; ++l) high_sums[l] = low_sums[l] = 0;
  for (int64_t j = 0; j < n_cells; ++j) high[j] = cells[j] >> 32, low[j] = cells[j] & 0xffffffff;
  for (int64_t start = 0; start < n_cells; start += lanes) {
    for (int64_t l = 0; l < lanes; ++l) high_sums[l] += high[start + l], low_sums[l] += low[start + l];
  }
  alignas(64) int64_t whole[n_lanes] = {};
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t total_high = high_sums[l] + (low_sums[l] >> 32), total_low = low_sums[l] & 0xffffffff;
    const double total = static_cast<double>(total_high) * 0x1p32 + static_cast<double>(total_low);
    double mean = total / at_least_one(state.count[l]);
    mean = mean < -0x1p63 ? -0x1p63 : mean > 0x1p63 - 1024 ? 0x1p63 - 1024 : mean;
    whole[l] = static_cast<int64_t>(mean);
  }
  as_doubles(whole, lanes, state.mean);
  spread(whole, lanes, period, room.whole_pattern);
  const int64_t* const pattern = room.whole_pattern;
  double* const sums = room.sums;
  each_cell(n_cells, period, [=](int64_t p, int64_t j) {
    const int64_t cell = cells[j];
    const double above = static_cast<double>((cell >> 32) - (pattern[p] >> 32)) * 0x1p32;
    const double below = static_cast<double>((cell & 0xffffffff) - (pattern[p] & 0xffffffff));
    const uint64_t keep = keep_ptr ? -static_cast<uint64_t>(keep_ptr[j]) : ~uint64_t{0};
    sums[j] = bits_as<double>(bits_as<uint64_t>(above + below) & keep);
  });
}

// The mean of f64 cells, by the pair and the exponent of a sum.
NEVER_INLINE void pair_means(MomentsRoom& room, const Window& w, MomentsState& state) {
  const int64_t lanes = w.lanes(), n_cells = w.cells();
  std::memcpy(room.sums, room.cells, static_cast<size_t>(n_cells) * sizeof(double));
  halve_pairs(room.sums, room.lows, w.rows, lanes);
  bool all_finite = true;
  for (int64_t l = 0; l < lanes; ++l) {
    const double high = room.sums[l] + 0.0, low = room.lows[l] + 0.0;
    all_finite &= is_finite(high) && is_finite(low);
    state.mean[l] = (high + low) / at_least_one(state.count[l]);
  }
  if (all_finite) return;
  alignas(64) bool lost[n_lanes];
  for (int64_t l = 0; l < lanes; ++l) lost[l] = !(is_finite(room.sums[l]) && is_finite(room.lows[l]));
  for (int64_t j = 0; j < n_cells; ++j) room.sums[j] = room.cells[j] * scale_down;
  halve_pairs(room.sums, room.lows, w.rows, lanes);
  for (int64_t l = 0; l < lanes; ++l) {
    if (!lost[l]) continue;
    const double high = room.sums[l] + 0.0, low = is_finite(high) ? room.lows[l] + 0.0 : 0.0;
    state.mean[l] = (high + low) / at_least_one(state.count[l]) * 0x1p128;
  }
}

NEVER_INLINE void leaf_moments(MomentsRoom& room, const Block& block, const Window& w, MomentsState& state) {
  const int64_t lanes = w.lanes(), n_cells = w.cells();
  const unsigned char* const keep_ptr = gather_keep(block, w, room.keep);
  for (int64_t l = 0; l < lanes; ++l) state.count[l] = 0;
  count_window(keep_ptr, w, state.count);
  if (block.dtype == Dtype::i64) {
    integer_deviations(room, block, w, keep_ptr, state);
  } else {
    gather_doubles(block.dtype, block.data, w, keep_ptr, 0.0, room.cells);
    if (block.dtype == Dtype::f64) {
      pair_means(room, w, state);
    } else {
      halve_into(room.cells, w.rows, lanes, room.sums);
      for (int64_t l = 0; l < lanes; ++l) state.mean[l] = (room.sums[l] + 0.0) / at_least_one(state.count[l]);
    }
    deviations(room, w, keep_ptr, state.mean);
  }
  double *const sums = room.sums, *const squares = room.lows;
  for (int64_t j = 0; j < n_cells; ++j) squares[j] = sums[j] * sums[j];
  halve(sums, w.rows, lanes);
  halve(squares, w.rows, lanes);
  for (int64_t l = 0; l < lanes; ++l) {
    const double error = sums[l] + 0.0;
    state.low[l] = error / at_least_one(state.count[l]);
    const double m2 = (squares[l] + 0.0) - error * state.low[l];
    state.m2[l] = m2 < 0.0 ? 0.0 : m2;
  }
}

const MomentsState& slice_moments(MomentsRoom& room, const Block& block, Window& w) {
  each_leaf(block, w, [&] {
    leaf_moments(room, block, w, room.tree.next());
    room.tree.push(w.lanes());
  });
  return room.tree.finish(w.lanes());
}

std::unique_ptr<MomentsRoom> room_for(const Block& block) {
  std::unique_ptr<MomentsRoom> room(new MomentsRoom);
  room->tree.begin((block.n + block.leaf - 1) / block.leaf);
  return room;
}

// The cells that count: none of a slice whose deviation is undefined.
const unsigned char* keep_defined(MomentsRoom& room, const Window& w, const unsigned char* keep_ptr,
                                  const unsigned char* defined) {
  const int64_t lanes = w.lanes();
  for (int64_t start = 0; start < w.cells(); start += lanes) {
    for (int64_t l = 0; l < lanes; ++l) {
      room.keep[start + l] = keep_ptr ? static_cast<unsigned char>(keep_ptr[start + l] & defined[l]) : defined[l];
    }
  }
  return room.keep;
}

}  // namespace

bool moments(const Block& block, const Options&, const Parts& parts) {
  const std::unique_ptr<MomentsRoom> room = room_for(block);
  each_window(block, block.leaf, [&](Window& w) {
    const MomentsState& state = slice_moments(*room, block, w);
    const int64_t at = w.o * block.inner + w.c;
    copy_lanes(state.count, w.lanes(), parts.count_ptr + at);
    copy_canonical(state.mean, w.lanes(), static_cast<double*>(parts.part_ptr[0]) + at);
    copy_canonical(state.low, w.lanes(), static_cast<double*>(parts.part_ptr[1]) + at);
    copy_canonical(state.m2, w.lanes(), static_cast<double*>(parts.part_ptr[2]) + at);
  });
  return true;
}

// (cell - mean) / standard deviation; a slice of one leaf is read once.
int standardize(const Block& block, const Options& options, const Filled& filled) {
  const std::unique_ptr<MomentsRoom> room = room_for(block);
  const bool is_kept = block.n <= block.leaf && block.dtype != Dtype::i64;
  bool overflowed = false;
  each_window(block, block.leaf, [&](Window& w) {
    const int64_t lanes = w.lanes(), period = period_of(lanes);
    const MomentsState& state = slice_moments(*room, block, w);
    alignas(64) double deviation[n_lanes], low_pattern[n_lanes], deviation_pattern[n_lanes];
    unsigned char defined[n_lanes];
    bool all_defined = true;
    for (int64_t l = 0; l < lanes; ++l) {
      const double divisor = static_cast<double>(state.count[l]) - options.correction;
      deviation[l] = __builtin_sqrt(state.m2[l] / (divisor > 0.0 ? divisor : 1.0));
      defined[l] = static_cast<double>(state.count[l]) > options.correction;
      all_defined &= defined[l];
    }
    spread(state.mean, lanes, period, room->pattern);
    spread(state.low, lanes, period, low_pattern);
    spread(deviation, lanes, period, deviation_pattern);
    const double *const mean = room->pattern, *const low = low_pattern, *const deviation_of = deviation_pattern;
    each_leaf(block, w, [&] {
      const unsigned char* keep_ptr = gather_keep(block, w, room->keep);
      if (!is_kept) gather_doubles(block.dtype, block.data, w, keep_ptr, 0.0, room->cells);
      if (!all_defined) keep_ptr = keep_defined(*room, w, keep_ptr, defined);
      double* const cells = room->cells;
      each_cell(w.cells(), period, [=](int64_t p, int64_t j) {
        cells[j] = ((cells[j] - mean[p]) - low[p]) / deviation_of[p];
      });
      overflowed |= write_doubles(filled, w, cells, keep_ptr);
    });
  });
  return overflowed ? fill_overflowed : fill_done;
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
