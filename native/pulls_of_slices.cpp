// Gradients by cells of whole slices: those of normalizations need sums along the slice first, those of running sums
// run from its end.

#include "common.hpp"

#include "pull.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "tree.hpp"

#include "halving.hpp"

#include "elementary.hpp"

#include "narrow.hpp"

#include "pulls.hpp"

#include "scan.hpp"

constexpr int n_numbers = 6;  // of a slice: two from its state, two sums along it, and two more

struct Numbers {
  double* of[n_numbers];
};

struct SlicesRoom {
  alignas(64) double cells[n_tile], g[n_tile], sums[n_tile];
  alignas(64) unsigned char ones[n_tile], own[n_tile], gate[n_tile], reached[n_tile];
  alignas(64) double lane[n_numbers][n_lanes], pattern[n_numbers][n_lanes];
  alignas(64) unsigned char lane_pattern[n_lanes];
  LeafTree<PlainState> first, second;
  const unsigned char* own_ptr = nullptr;

  SlicesRoom() {
    std::memset(ones, 1, sizeof ones);
    std::memset(lane, 0, sizeof lane);
  }

  Numbers numbers() { return {{lane[0], lane[1], lane[2], lane[3], lane[4], lane[5]}}; }

  void load_own(const Block& block, const Window& w) {
    own_ptr = gather_mask(block.mask, w, own);
    if (!own_ptr) own_ptr = ones;
  }

  // g from `at` on; what has not been reached adds 0. Where it has been.
  const unsigned char* load_g(const Above& above, const Window& w, int64_t at = 0) {
    const unsigned char* gate_ptr = gather_mask(above.gate, w, gate + at);
    if (!gate_ptr) gate_ptr = ones;
    const Operand& from = above.g;
    double* const out = g + at;
    if (from.stride_outer | from.stride_n | from.stride_inner) {
      gather_doubles(above.dtype, from, w, gate_ptr, 0.0, out);
      return gate_ptr;
    }
    Window single;  // the gradient of a sum of the results, expanded
    single.rows = single.columns = 1;
    double one;
    gather_doubles(above.dtype, from, single, nullptr, 0.0, &one);
    const uint64_t bits = bits_as<uint64_t>(one);
    for (int64_t j = 0; j < w.cells(); ++j) out[j] = bits_as<double>(bits & -static_cast<uint64_t>(gate_ptr[j]));
    return gate_ptr;
  }

  // reached = own & any, where `any` is of the lane.
  void reach_slices(const Window& w, const unsigned char* any) {
    const int64_t period = period_of(w.lanes());
    spread(any, w.lanes(), period, lane_pattern);
    const unsigned char *const from = own_ptr, *const of_lane = lane_pattern;
    unsigned char* const to = reached;
    each_cell(w.cells(), period, [=](int64_t p, int64_t j) { to[j] = from[j] & of_lane[p]; });
  }
};

// ---- normalizations: sums along the slice, then each cell -------------------------------------------------------------

// y (g - sum of g y)
template <bool negates>
struct SoftmaxRow {
  static constexpr bool reads_cells = false;
  static constexpr int n_sums = 1;
  void begin(const Above&, const Window&, Numbers) const {}
  static ALWAYS_INLINE double first(double y, double g, double, double) { return g * y; }
  static ALWAYS_INLINE double second(double, double, double, double) { return 0.0; }
  void settle(Numbers, int64_t) const {}
  static ALWAYS_INLINE double gradient(double y, double g, double, double, double sum, double) {
    const double found = y * (g - sum);
    return negates ? -found : found;
  }
};

// g - exp(y) (sum of g)
template <bool is_quick>
struct LogSoftmaxRow {
  static constexpr bool reads_cells = false;
  static constexpr int n_sums = 1;
  void begin(const Above&, const Window&, Numbers) const {}
  static ALWAYS_INLINE double first(double, double g, double, double) { return g; }
  static ALWAYS_INLINE double second(double, double, double, double) { return 0.0; }
  void settle(Numbers, int64_t) const {}
  static ALWAYS_INLINE double gradient(double y, double g, double, double, double sum, double) {
    if constexpr (is_quick) return g - (y < -700.0 ? 0.0 : quick_exponential(y)) * sum;
    return g - exponential(y) * sum;
  }
};

// What is left of g / norm without what turns into a larger norm, of order 2.
struct NormalizeRow {
  static constexpr bool reads_cells = true;
  static constexpr int n_sums = 2;
  double eps;
  bool* refused;

  // A cell whose square has lost digits: none of a shorter dtype has.
  void check(const double* cells, int64_t n, Dtype dtype) const {
    if (dtype != Dtype::f64) return;
    int64_t any = 0;
    for (int64_t j = 0; j < n; ++j) {
      any |= static_cast<int64_t>(cells[j] != 0.0) & static_cast<int64_t>(cells[j] * cells[j] < 0x1p-900);
    }
    *refused |= any != 0;
  }
  void begin(const Above&, const Window&, Numbers) const {}
  static ALWAYS_INLINE double first(double x, double, double, double) { return x * x; }
  static ALWAYS_INLINE double second(double x, double g, double, double) { return g * x; }
  void settle(Numbers to, int64_t lanes) const {
    double *const squares = to.of[2], *const along = to.of[3];
    for (int64_t l = 0; l < lanes; ++l) {
      *refused |= !(squares[l] < infinity && is_finite(along[l]));
      const double length = __builtin_sqrt(squares[l]), divisor = length < eps ? eps : length;
      along[l] = length >= eps && length > 0.0 ? along[l] / divisor / divisor / length : 0.0;
      squares[l] = divisor;
    }
  }
  static ALWAYS_INLINE double gradient(double x, double g, double, double, double divisor, double along) {
    return g / divisor - x * along;
  }
};

// What is left of g without its mean and its part along the result, divided by the standard deviation.
struct StandardizeRow {
  static constexpr bool reads_cells = true;
  static constexpr int n_sums = 2;
  double correction;

  void begin(const Above& above, const Window& w, Numbers to) const {
    double *const mean = to.of[0], *const low = to.of[1], *const count = to.of[4], *const m2 = to.of[5];
    read_lanes(Dtype::f64, above.part[1], w, mean), read_lanes(Dtype::f64, above.part[2], w, low);
    read_lanes(Dtype::i64, above.part[0], w, count), read_lanes(Dtype::f64, above.part[3], w, m2);
    for (int64_t l = 0; l < w.lanes(); ++l) mean[l] = is_finite(mean[l]) ? mean[l] : not_a_number;
  }
  static ALWAYS_INLINE double first(double, double g, double, double) { return g; }
  static ALWAYS_INLINE double second(double x, double g, double mean, double low) { return g * ((x - mean) - low); }
  void settle(Numbers to, int64_t lanes) const {
    double *const total = to.of[2], *const along = to.of[3], *const count = to.of[4], *const m2 = to.of[5];
    for (int64_t l = 0; l < lanes; ++l) {
      const double wanted = count[l] - correction, divisor = wanted > 0.0 ? wanted : 1.0;
      const double size = wanted > 0.0 ? __builtin_sqrt(m2[l] / divisor) : 1.0;
      total[l] = total[l] / (count[l] > 1.0 ? count[l] : 1.0);
      along[l] = along[l] / size / size / divisor;
      count[l] = size;
    }
  }
  static ALWAYS_INLINE double gradient(double x, double g, double mean, double low, double g_mean, double along,
                                       double size) {
    return (g - g_mean - ((x - mean) - low) * along) / size;
  }
};

template <class Row>
constexpr bool divides = std::is_same_v<Row, StandardizeRow>;

// Windows over whole slices, as they are read.
template <class Row>
class SlicesPull {
 public:
  SlicesPull(const Block& given, const Above& from, const Pulled& to, const Row& of)
      : block(given), above(from), pulled(to), row(of), room(new SlicesRoom) {
    const int64_t n_leaves = (block.n + block.leaf - 1) / block.leaf;
    room->first.begin(n_leaves), room->second.begin(n_leaves);
  }

  void operator()() {
    Block laid = block;  // results are read as often as cells are
    if (!Row::reads_cells) laid.data = above.out;
    each_window(laid, block.leaf, [&](Window& w) { slices(w); });
  }

 private:
  const Block& block;
  const Above& above;
  const Pulled& pulled;
  const Row row;
  const std::unique_ptr<SlicesRoom> room;

  template <class Visit>
  void each_leaf(Window& w, const Visit& visit) const {
    for (w.i = 0; w.i < block.n; w.i += block.leaf) {
      w.rows = least(block.leaf, block.n - w.i);
      visit();
    }
  }

  void slices(Window& w) {
    const int64_t lanes = w.lanes(), period = period_of(lanes);
    const Numbers to = room->numbers();
    alignas(64) int64_t n_reached[n_lanes] = {};
    alignas(64) unsigned char any[n_lanes];
    row.begin(above, w, to);
    for (int k = 0; k < 2; ++k) spread(to.of[k], lanes, period, room->pattern[k]);
    each_leaf(w, [&] {
      count_lanes(load(w), w.cells(), lanes, n_reached);
      sum(w, room->first, [](double x, double g, double a, double b) { return Row::first(x, g, a, b); });
      if constexpr (Row::n_sums > 1) {
        sum(w, room->second, [](double x, double g, double a, double b) { return Row::second(x, g, a, b); });
      }
    });
    copy_lanes(room->first.finish(lanes).total, lanes, to.of[2]);
    if constexpr (Row::n_sums > 1) copy_lanes(room->second.finish(lanes).total, lanes, to.of[3]);
    row.settle(to, lanes);
    for (int k = 2; k < n_numbers; ++k) spread(to.of[k], lanes, period, room->pattern[k]);
    for (int64_t l = 0; l < lanes; ++l) any[l] = n_reached[l] > 0;
    each_leaf(w, [&] {
      if (block.n > block.leaf) load(w);
      compute(w, period);
      room->reach_slices(w, any);
      write_pulled(pulled, block.dtype, w, room->cells, room->reached);
    });
  }

  // Cells and g; where results have been reached.
  const unsigned char* load(const Window& w) const {
    room->load_own(block, w);
    if (Row::reads_cells) {
      gather_doubles(block.dtype, block.data, w, room->own_ptr, 0.0, room->cells);
      if constexpr (std::is_same_v<Row, NormalizeRow>) row.check(room->cells, w.cells(), block.dtype);
    } else {
      gather_doubles(above.dtype, above.out, w, room->own_ptr, 0.0, room->cells);
    }
    return room->load_g(above, w);
  }

  // The sums of a leaf's summands join the tree.
  template <class Summand>
  NEVER_INLINE void sum(const Window& w, LeafTree<PlainState>& tree, const Summand& summand) {
    const double *const cells = room->cells, *const g = room->g;
    const double *const a = room->pattern[0], *const b = room->pattern[1];
    double* const sums = room->sums;
    each_cell(w.cells(), period_of(w.lanes()), [=](int64_t p, int64_t j) { sums[j] = summand(cells[j], g[j], a[p], b[p]); });
    halve(sums, w.rows, w.lanes());
    for (int64_t l = 0; l < w.lanes(); ++l) tree.next().total[l] = sums[l] + 0.0;
    tree.push(w.lanes());
  }

  NEVER_INLINE void compute(const Window& w, int64_t period) {
    double* const cells = room->cells;
    const double* const g = room->g;
    const auto& at = room->pattern;
    const double *const a = at[0], *const b = at[1], *const c = at[2], *const d = at[3], *const e = at[4];
    if constexpr (divides<Row>) {
      each_cell(w.cells(), period, [=](int64_t p, int64_t j) {
        cells[j] = Row::gradient(cells[j], g[j], a[p], b[p], c[p], d[p], e[p]);
      });
    } else {
      each_cell(w.cells(), period,
                [=](int64_t p, int64_t j) { cells[j] = Row::gradient(cells[j], g[j], a[p], b[p], c[p], d[p]); });
    }
  }
};

template <class Row>
int pull_slices(const Block& block, const Above& above, const Pulled& pulled, const Row& row) {
  SlicesPull<Row>(block, above, pulled, row)();
  return fill_done;
}

// ---- running sums: from the end of each slice -------------------------------------------------------------------------

constexpr int64_t n_rows_at_once = 8;  // an addition waits for the one before it, of the same slice

struct Running {
  alignas(64) double sum[n_lanes];
  alignas(64) unsigned char any[n_lanes];

  void clear() {
    std::memset(sum, 0, sizeof sum);
    std::memset(any, 0, sizeof any);
  }
};

// (n_rows, n), each row a slice: g becomes the sum from each cell on, `reached` whether any result from there on is.
template <int n_rows>
NEVER_INLINE void run_rows(double* g, unsigned char* reached, int64_t n, double* sum_ptr, unsigned char* any_ptr) {
  double sum[n_rows];
  unsigned char any[n_rows];
  for (int k = 0; k < n_rows; ++k) sum[k] = sum_ptr[k], any[k] = any_ptr[k];
  for (int64_t j = n - 1; j >= 0; --j) {
    for (int k = 0; k < n_rows; ++k) {
      sum[k] += g[k * n + j], any[k] = any[k] | reached[k * n + j];
      g[k * n + j] = sum[k], reached[k * n + j] = any[k];
    }
  }
  for (int k = 0; k < n_rows; ++k) sum_ptr[k] = sum[k], any_ptr[k] = any[k];
}

// (rows, lanes), each lane a slice.
NEVER_INLINE void run_lanes(double* given_g, unsigned char* given_reached, int64_t rows, int64_t lanes, Running& running) {
  for (int64_t r = rows - 1; r >= 0; --r) {
    double* __restrict g = given_g + r * lanes;
    unsigned char* __restrict reached = given_reached + r * lanes;
    for (int64_t l = 0; l < lanes; ++l) g[l] = running.sum[l] += g[l];
    for (int64_t l = 0; l < lanes; ++l) reached[l] = running.any[l] = running.any[l] | reached[l];
  }
}

class RunningPull {
 public:
  RunningPull(const Block& given, const Above& from, const Pulled& to)
      : block(given), above(from), pulled(to), room(new SlicesRoom), n_leaves((given.n + given.leaf - 1) / given.leaf) {}

  void operator()() {
    if (block.inner == 1 && block.n > n_short_group) return long_rows();
    each_window(block, block.leaf, [&](Window& w) {
      running.clear();
      each_leaf_back(w, [&] {
        load(w, 0);
        run_lanes(room->g, room->reached, w.rows, w.lanes(), running);
        write(w, 0);
      });
    });
  }

 private:
  const Block& block;
  const Above& above;
  const Pulled& pulled;
  const std::unique_ptr<SlicesRoom> room;
  const int64_t n_leaves;
  Running running;

  template <class Visit>
  void each_leaf_back(Window& w, const Visit& visit) const {
    for (int64_t leaf = n_leaves - 1; leaf >= 0; --leaf) {
      w.i = leaf * block.leaf, w.rows = least(block.leaf, block.n - w.i);
      visit();
    }
  }

  // Long slices that lie one after the other: nothing is turned.
  void long_rows() {
    const int64_t most = least(n_rows_at_once, n_tile / least(block.leaf, block.n));
    Window w;
    w.columns = 1;
    for (int64_t o = 0; o < block.outer; o += most) {
      const int64_t n_rows = least(most, block.outer - o);
      running.clear();
      each_leaf_back(w, [&] {
        for (int64_t k = 0; k < n_rows; ++k) w.o = o + k, load(w, k * w.rows);
        int64_t k = 0;
        for (; k + 8 <= n_rows; k += 8) run_some<8>(k, w.rows);
        for (; k + 4 <= n_rows; k += 4) run_some<4>(k, w.rows);
        for (; k < n_rows; ++k) run_some<1>(k, w.rows);
        for (k = 0; k < n_rows; ++k) w.o = o + k, write(w, k * w.rows);
      });
    }
  }

  template <int n_rows>
  void run_some(int64_t k, int64_t n) {
    run_rows<n_rows>(room->g + k * n, room->reached + k * n, n, running.sum + k, running.any + k);
  }

  void load(const Window& w, int64_t at) const {
    std::memcpy(room->reached + at, room->load_g(above, w, at), static_cast<size_t>(w.cells()));
  }

  void write(const Window& w, int64_t at) const {
    room->load_own(block, w);
    unsigned char* const reached = room->reached + at;
    const unsigned char* const own = room->own_ptr;
    for (int64_t j = 0; j < w.cells(); ++j) reached[j] = reached[j] & own[j];
    write_pulled(pulled, block.dtype, w, room->g + at, reached);
  }
};

// ---- running products and running sums of exponentials: what follows each cell times what stands before it ------------

struct FollowRoom {
  alignas(64) double cells[n_tile], g[n_tile], before[n_tile], follow[n_tile];
  alignas(64) unsigned char ones[n_tile], own[n_tile], gate[n_tile], reached[n_tile];
  alignas(64) double state[n_tile_lanes], next[n_tile_lanes];
  alignas(64) unsigned char any[n_tile_lanes];

  FollowRoom() { std::memset(ones, 1, sizeof ones); }
};

// The product of the cells before each one.
struct Before {
  using State = double;
  const double* cells;
  double *before, *product;
  ALWAYS_INLINE State load(int64_t l) const { return product[l]; }
  ALWAYS_INLINE void store(int64_t l, State state) const { product[l] = state; }
  ALWAYS_INLINE void operator()(State& state, int64_t at, int64_t) const { before[at] = state, state = state * cells[at]; }
};

// g and what follows: the next cell times what follows that.
struct FollowProduct {
  using State = double;
  const double *cells, *g;
  double *follow, *next;
  ALWAYS_INLINE State load(int64_t l) const { return next[l]; }
  ALWAYS_INLINE void store(int64_t l, State state) const { next[l] = state; }
  ALWAYS_INLINE void operator()(State& state, int64_t at, int64_t) const {
    const double sum = g[at] + state;
    follow[at] = sum, state = sum * cells[at];
  }
};

// The valid result after each cell, inf beyond the last; inf stands for what is hidden.
struct NextResult {
  using State = double;
  const double* results;
  double *after, *next;
  ALWAYS_INLINE State load(int64_t l) const { return next[l]; }
  ALWAYS_INLINE void store(int64_t l, State state) const { next[l] = state; }
  ALWAYS_INLINE void operator()(State& state, int64_t at, int64_t) const {
    after[at] = state, state = results[at] < infinity ? results[at] : state;
  }
};

// g and the share of what follows.
struct FollowShares {
  using State = double;
  const double *shares, *g;
  double *follow, *sum;
  ALWAYS_INLINE State load(int64_t l) const { return sum[l]; }
  ALWAYS_INLINE void store(int64_t l, State state) const { sum[l] = state; }
  ALWAYS_INLINE void operator()(State& state, int64_t at, int64_t) const {
    follow[at] = state = g[at] + shares[at] * state;
  }
};

struct ReachBack {
  using State = unsigned char;
  const unsigned char* gate;
  unsigned char *reached, *any;
  ALWAYS_INLINE State load(int64_t l) const { return any[l]; }
  ALWAYS_INLINE void store(int64_t l, State state) const { any[l] = state; }
  ALWAYS_INLINE void operator()(State& state, int64_t at, int64_t) const { reached[at] = state = state | gate[at]; }
};

NEVER_INLINE bool all_finite(const double* cells, int64_t n) {
  int64_t bad = 0;
  for (int64_t j = 0; j < n; ++j) bad |= static_cast<int64_t>(!is_finite(cells[j]));
  return !bad;
}

template <bool is_quick>
ALWAYS_INLINE double raised(double below) {
  if constexpr (is_quick) return below < -700.0 ? 0.0 : quick_exponential(below);
  return exponential(below);
}

// Tiles of whole slices, from the last rows to the first. What is not finite is refused.
class FollowPull {
 public:
  FollowPull(const Block& given, const Above& from_above, const Pulled& to)
      : block(given), above(from_above), pulled(to), room(new FollowRoom) {}

  int products() {
    std::unique_ptr<double[]> before(new double[((block.n + 63) / 64 + 1) * most_lanes()]);
    walk([&](const ScanTile& tile) {
      for (int64_t l = 0; l < tile.w.lanes(); ++l) room->state[l] = 1.0, room->next[l] = 0.0;
      ScanTile ahead = tile;
      ahead.backwards = false;
      const int64_t rows = rows_of(tile);
      for (ahead.w.i = 0; ahead.w.i < block.n; ahead.w.i += rows) {
        ahead.w.rows = least(rows, block.n - ahead.w.i);
        copy_lanes(room->state, tile.w.lanes(), before.get() + ahead.w.i / rows * tile.w.lanes());
        if (ahead.w.i + rows >= block.n) break;
        load_cells(ahead, 1.0);
        run_scan(Before{room->cells, room->before, room->state}, ahead);
      }
    }, [&](const ScanTile& tile) {
      load_cells(tile, 1.0);
      load_g(tile);
      hide_unreached(room->cells, tile.w.cells(), 1.0);
      ScanTile ahead = tile;
      ahead.backwards = false;
      copy_lanes(before.get() + tile.w.i / rows_of(tile) * tile.w.lanes(), tile.w.lanes(), room->state);
      run_scan(Before{room->cells, room->before, room->state}, ahead);
      run_scan(FollowProduct{room->cells, room->g, room->follow, room->next}, tile);
      hide_unreached(room->before, tile.w.cells(), 0.0);
      refused |= !all_finite(room->before, tile.w.cells());
      write(tile);
    });
    return refused ? fill_refused : fill_done;
  }

  template <bool is_quick>
  int exponentials() {
    walk([&](const ScanTile& tile) {
      for (int64_t l = 0; l < tile.w.lanes(); ++l) room->state[l] = 0.0, room->next[l] = infinity;
    }, [&](const ScanTile& tile) {
      const int64_t n = tile.w.cells();
      double *const results = room->before, *const after = room->follow, *const cells = room->cells;
      load_cells(tile, 0.0);
      each_part(above.out, tile, [&](const Window& w, int64_t at) {
        gather_doubles(above.dtype, above.out, w, own_ptr + at, infinity, results + at);
      });
      load_g(tile);
      hide_unreached(results, n, infinity);
      run_scan(NextResult{results, after, room->next}, tile);
      const unsigned char *const own = own_ptr, *const reached = room->reached;
      int64_t bad = 0;
      for (int64_t j = 0; j < n; ++j) {
        bad |= static_cast<int64_t>(own[j] & reached[j]) & static_cast<int64_t>(!is_finite(results[j]));
      }
      refused |= bad != 0;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const bool is_hidden = results[j] == infinity;
        const double fall = is_hidden ? 0.0 : results[j] - after[j], below = is_hidden ? 0.0 : cells[j] - results[j];
        cells[j] = raised<is_quick>(fall), results[j] = raised<is_quick>(below);
      }
      run_scan(FollowShares{cells, room->g, room->follow, room->state}, tile);
      write(tile);
    });
    return refused ? fill_refused : fill_done;
  }

 private:
  const Block& block;
  const Above& above;
  const Pulled& pulled;
  const std::unique_ptr<FollowRoom> room;
  const unsigned char* own_ptr = nullptr;
  bool refused = false;

  static constexpr int64_t most_rows = 512;

  int64_t most_lanes() const { return least(n_tile_lanes, block.outer * block.inner); }

  int64_t rows_of(const ScanTile& tile) const {
    return tile.along ? least(most_rows, block.n) : least(most_rows, block.leaf);
  }

  template <class Begin, class Visit>
  void walk(const Begin& begin, const Visit& visit) const {
    each_scan_tile(block, most_rows, true, [&](const ScanTile& tile) {
      for (int64_t l = 0; l < tile.w.lanes(); ++l) room->any[l] = 0;
      begin(tile);
    }, visit);
  }

  void load_cells(const ScanTile& tile, double hidden) {
    own_ptr = scan_mask(block.mask, tile, room->own);
    if (!own_ptr) own_ptr = room->ones;
    scan_doubles(block, tile, own_ptr, hidden, room->cells);
  }

  // g, 0 where it has not been reached, and where it has from there on.
  void load_g(const ScanTile& tile) const {
    const unsigned char* gate_ptr = scan_mask(above.gate, tile, room->gate);
    if (!gate_ptr) gate_ptr = room->ones;
    each_part(above.g, tile, [&](const Window& w, int64_t at) {
      gather_doubles(above.dtype, above.g, w, gate_ptr + at, 0.0, room->g + at);
    });
    run_scan(ReachBack{gate_ptr, room->reached, room->any}, tile);
  }

  // Nothing that has been reached depends on cells behind it.
  void hide_unreached(double* given, int64_t n, double hidden) const {
    double* const cells = given;
    const unsigned char* const reached = room->reached;
    const uint64_t bits = bits_as<uint64_t>(hidden);
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      cells[j] = bits_as<double>(choose<uint64_t>(-static_cast<uint64_t>(reached[j]), bits_as<uint64_t>(cells[j]), bits));
    }
  }

  void write(const ScanTile& tile) {
    const int64_t n = tile.w.cells();
    double *const before = room->before, *const follow = room->follow;
    unsigned char* const reached = room->reached;
    const unsigned char* const own = own_ptr;
    refused |= !all_finite(follow, n);
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) before[j] = before[j] * follow[j];
    for (int64_t j = 0; j < n; ++j) reached[j] = reached[j] & own[j];
    each_part(pulled.strides, tile, [&](const Window& w, int64_t at) {
      write_pulled(pulled, block.dtype, w, before + at, reached + at);
    });
  }
};

// Whether 2^-34 of an exponential is less than what rounding to the dtype loses.
bool is_short(Dtype dtype) { return dtype != Dtype::f64; }

}  // namespace

int pull_softmax(const Block& block, const Options&, const Above& above, const Pulled& pulled) {
  return pull_slices(block, above, pulled, SoftmaxRow<false>());
}

int pull_softmin(const Block& block, const Options&, const Above& above, const Pulled& pulled) {
  return pull_slices(block, above, pulled, SoftmaxRow<true>());
}

int pull_log_softmax(const Block& block, const Options&, const Above& above, const Pulled& pulled) {
  if (is_short(above.dtype) && is_short(block.dtype)) return pull_slices(block, above, pulled, LogSoftmaxRow<true>());
  return pull_slices(block, above, pulled, LogSoftmaxRow<false>());
}

int pull_normalize(const Block& block, const Options& options, const Above& above, const Pulled& pulled) {
  bool refused = false;
  pull_slices(block, above, pulled, NormalizeRow{options.eps, &refused});
  return refused ? fill_refused : fill_done;
}

int pull_standardize(const Block& block, const Options& options, const Above& above, const Pulled& pulled) {
  return pull_slices(block, above, pulled, StandardizeRow{options.correction});
}

int pull_cumprod(const Block& block, const Options&, const Above& above, const Pulled& pulled) {
  return FollowPull(block, above, pulled).products();
}

int pull_logcumsumexp(const Block& block, const Options&, const Above& above, const Pulled& pulled) {
  FollowPull pull(block, above, pulled);
  return is_short(above.dtype) && is_short(block.dtype) ? pull.exponentials<true>() : pull.exponentials<false>();
}

int pull_cumsum(const Block& block, const Options&, const Above& above, const Pulled& pulled) {
  RunningPull(block, above, pulled)();
  return fill_done;
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
