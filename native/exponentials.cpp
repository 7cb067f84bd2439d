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

// A leaf as it is read: cells of T side by side, lane after lane, row after row, in chunks.
struct Leaf {
  const unsigned char* cells_ptr;
  const unsigned char* keep_ptr;  // dense; null: all count, or what is hidden is -inf already
  int64_t n, lanes;
  int64_t row_step;  // from one row to the next
  int64_t period;  // cells of a chunk but for the last: whole rows, lane values repeated to it are a pattern
  int64_t step, keep_step;  // from one chunk to the next
  int64_t ahead;  // to the cells that are fetched meanwhile

  bool has_mask_in_place() const { return keep_ptr && keep_step != period; }
  int64_t keep_ahead() const { return has_mask_in_place() ? n_ahead_rows * keep_step : n_ahead; }

  // Some of the lanes.
  Leaf part(int64_t first, int64_t some, int64_t bytes) const {
    return {cells_ptr + first * bytes, keep_ptr ? keep_ptr + first : nullptr, n / lanes * some, some, row_step, some,
            row_step, period == lanes ? keep_step : lanes, ahead};
  }
};

struct ExponentialsRoom {
  bool negates = false;
  bool is_narrow = false;  // the cells are gathered as floats
  alignas(64) double gathered[n_tile];
  alignas(64) double raised[n_tile];  // exp(cell - base)
  alignas(64) double sums[n_tile];
  alignas(64) unsigned char keep[n_tile];
  alignas(64) double pattern[n_lanes];
  alignas(64) double second_pattern[n_lanes];
  LeafTree<ExponentialsState> tree;
  LeafTree<PlainState> totals;
  std::unique_ptr<double[]> stored;  // the exponentials of all leaves, where they fit
  std::unique_ptr<double[]> tops;    // and the largest cells they were raised from
  const unsigned char* keep_ptr;

  // The window's cells where they lie, if they are rows of float or double; else gathered. `keep_ptr` is then their
  // mask, unless `walks_mask`: rows of bytes may stay where they lie too.
  Leaf load(const Block& block, const Window& w, bool walks_mask = false) {
    const int64_t lanes = w.lanes(), bytes = is_narrow ? 4 : 8;
    const Operand &data = block.data, &mask = block.mask;
    const bool is_dense = w.groups == 1 && (w.columns == 1 || data.stride_inner == 1) &&
                          (w.rows <= 1 || data.stride_n == w.columns);
    const bool are_rows = !is_dense && w.groups == 1 && data.stride_inner == 1 && w.columns >= 16;
    const bool is_direct = block.dtype == (is_narrow ? Dtype::f32 : Dtype::f64) && (is_dense || are_rows);
    const bool are_bytes = mask.cells_ptr && mask.stride_inner == 1 && !block.omits_nan;
    const bool in_place = walks_mask && is_direct && are_rows && are_bytes;
    if (in_place) {
      keep_ptr = mask.cells_ptr + w.o * mask.stride_outer + w.i * mask.stride_n + w.c;
    } else {
      keep_ptr = gather_keep(block, w, keep);
    }
    if (is_direct) {
      const int64_t first = w.o * data.stride_outer + w.i * data.stride_n + w.c * data.stride_inner;
      const unsigned char* const cells_ptr = data.cells_ptr + first * bytes;
      if (is_dense) {
        const int64_t period = period_of(lanes);
        return {cells_ptr, keep_ptr, w.cells(), lanes, lanes, period, period, period, n_ahead};
      }
      return {cells_ptr, keep_ptr, w.cells(), lanes, data.stride_n, lanes, data.stride_n,
              in_place ? mask.stride_n : lanes, n_ahead_rows * data.stride_n};
    }
    const double hidden = negates ? infinity : -infinity;
    if (is_narrow) {
      gather_floats(block.dtype, data, w, keep_ptr, static_cast<float>(hidden), reinterpret_cast<float*>(gathered));
    } else {
      gather_doubles(block.dtype, data, w, keep_ptr, hidden, gathered);
    }
    const int64_t period = period_of(lanes);
    const auto* const cells_ptr = reinterpret_cast<const unsigned char*>(gathered);
    return {cells_ptr, nullptr, w.cells(), lanes, lanes, period, period, period, 0};
  }
};

template <class T>
struct CellOf {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static constexpr Bits sign = Bits{1} << (8 * sizeof(T) - 1);
  static constexpr Bits hidden = static_cast<Bits>(sizeof(T) == 4 ? 0xff800000u : 0xfff0000000000000u);  // -inf
  Bits flip;  // the sign, where cells are negated

  template <bool is_masked>
  ALWAYS_INLINE T get(const unsigned char* cells_ptr, const unsigned char* keep_ptr, int64_t j) const {
    Bits bits;
    std::memcpy(&bits, cells_ptr + j * static_cast<int64_t>(sizeof bits), sizeof bits);
    bits ^= flip;
    if constexpr (is_masked) bits = choose<Bits>(static_cast<Bits>(-static_cast<Bits>(keep_ptr[j])), bits, hidden);
    return bits_as<T>(bits);
  }
};

// Chunks of a leaf: visit(cells, keep, place in the leaf, cells of it).
template <class T, class Visit>
ALWAYS_INLINE void each_chunk(const Leaf& leaf, const Visit& visit) {
  constexpr int64_t bytes = sizeof(T);
  const unsigned char *cells_ptr = leaf.cells_ptr, *keep_ptr = leaf.keep_ptr;
  for (int64_t start = 0; start < leaf.n; start += leaf.period) {
    const int64_t n = least(leaf.period, leaf.n - start);
    if (leaf.ahead) prefetch(cells_ptr + leaf.ahead * bytes, n * bytes);
    visit(cells_ptr, keep_ptr, start, n);
    cells_ptr += leaf.step * bytes;
    if (keep_ptr) keep_ptr += leaf.keep_step;
  }
}

template <class T, bool is_masked>
NEVER_INLINE void largest_of_chunk(const unsigned char* cells_ptr, const unsigned char* keep_ptr, int64_t n,
                                   CellOf<T> given, T* largest) {
  const CellOf<T> cell = given;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    const T value = cell.template get<is_masked>(cells_ptr, keep_ptr, j);
    largest[j] = value > largest[j] ? value : largest[j];
  }
}

// The largest cell of each lane, NaN passed over.
template <class T, bool is_masked>
NEVER_INLINE void largest_of_leaf(const Leaf& leaf, CellOf<T> cell, double* top) {
  alignas(64) T largest[n_lanes];
  for (int64_t j = 0; j < leaf.period; ++j) largest[j] = -std::numeric_limits<T>::infinity();
  each_chunk<T>(leaf, [&](const unsigned char* cells_ptr, const unsigned char* keep_ptr, int64_t, int64_t n) {
    if (is_masked && leaf.ahead) prefetch(keep_ptr + leaf.keep_ahead(), n);
    largest_of_chunk<T, is_masked>(cells_ptr, keep_ptr, n, cell, largest);
  });
  for (int64_t rows = leaf.period / leaf.lanes; rows > 1;) {  // by halves: one lane would wait for each comparison
    const int64_t half = (rows + 1) / 2;
    const T* const rest = largest + half * leaf.lanes;
#pragma GCC ivdep
    for (int64_t j = 0; j < (rows - half) * leaf.lanes; ++j) largest[j] = rest[j] > largest[j] ? rest[j] : largest[j];
    rows = half;
  }
  for (int64_t l = 0; l < leaf.lanes; ++l) top[l] = static_cast<double>(largest[l]);
}

// How exact exp(cell - base) has to be: quick, for what is rounded to float32 or less; below, for the terms of a sum;
// full, down to the subnormals. base is the largest cell. `is_pair`: the rounding error of a difference of f64 is made
// good, exp(d + e) = exp(d) + exp(d) e.
enum class Raising { quick, below, full };

template <Raising raising>
ALWAYS_INLINE double raised_to(double x) {
  if constexpr (raising == Raising::quick) return quick_exponential(x, least_below);
  if constexpr (raising == Raising::below) return exponential_below(x);
  return exponential(x);
}

// raised = exp(cells - base).
template <class T, bool is_masked, Raising raising, bool is_pair>
NEVER_INLINE void raise_leaf(const Leaf& leaf, CellOf<T> given, const double* pattern, double* given_raised) {
  const CellOf<T> cell = given;
  each_chunk<T>(leaf, [=](const unsigned char* cells_ptr, const unsigned char* keep_ptr, int64_t start, int64_t n) {
    double* const raised = given_raised + start;
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      const double value = static_cast<double>(cell.template get<is_masked>(cells_ptr, keep_ptr, j));
      const double difference = value - pattern[j];
      const double plain = raised_to<raising>(difference);
      if constexpr (is_pair) {
        const double error = rounding_error(value, -pattern[j], difference);
        raised[j] = is_finite(difference) ? plain + plain * error : plain;
      } else {
        raised[j] = plain;
      }
    }
  });
}

// (cells - base) - logs
template <class T, bool is_masked>
NEVER_INLINE void subtract_logs(const Leaf& leaf, CellOf<T> given, const double* pattern, const double* logs,
                                double* given_out) {
  const CellOf<T> cell = given;
  each_chunk<T>(leaf, [=](const unsigned char* cells_ptr, const unsigned char* keep_ptr, int64_t start, int64_t n) {
    double* const out = given_out + start;
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      const double value = static_cast<double>(cell.template get<is_masked>(cells_ptr, keep_ptr, j));
      out[j] = (value - pattern[j]) - logs[j];
    }
  });
}

// found[lane] |= whether one of its cells is a NaN.
template <class T, bool is_masked>
NEVER_INLINE void find_nan(const Leaf& leaf, CellOf<T> cell, bool* found) {
  each_chunk<T>(leaf, [&](const unsigned char* cells_ptr, const unsigned char* keep_ptr, int64_t, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const T value = cell.template get<is_masked>(cells_ptr, keep_ptr, j);
      found[j % leaf.lanes] |= value != value;
    }
  });
}

// The largest cells and the totals below them as states; whether one is inf, which hides whether there is a NaN.
inline bool settle(const double* top, int64_t lanes, ExponentialsState& state) {
  int64_t any = 0;
  for (int64_t l = 0; l < lanes; ++l) {
    const double total = state.total[l];  // NaN where a cell is
    state.top[l] = total == total ? top[l] : not_a_number;
    state.total[l] = top[l] == -infinity ? total * 0.0 : total;
    state.count[l] = 0;
    any |= static_cast<int64_t>(top[l] == infinity);
  }
  return any != 0;
}

constexpr int64_t n_part = 64;  // lanes: 64 rows of them stay in L1, raised

// A room with the leaf that was loaded last, of one width of cells.
template <class T>
struct LeafOf {
  ExponentialsRoom& room;
  Leaf leaf;
  CellOf<T> cell;

  LeafOf(ExponentialsRoom& of, const Leaf& cells) : room(of), leaf(cells), cell{of.negates ? CellOf<T>::sign : 0} {}
  LeafOf(ExponentialsRoom& of, const Block& block, const Window& w, bool walks_mask = false)
      : LeafOf(of, of.load(block, w, walks_mask)) {}

  template <class Visit>
  ALWAYS_INLINE void with_mask(const Visit& visit) const {
    if (leaf.keep_ptr) return visit(std::true_type());
    visit(std::false_type());
  }

  void largest(double* top) const {
    with_mask([&](auto masked) { largest_of_leaf<T, decltype(masked)::value>(leaf, cell, top); });
  }

  void raise(const double* base, Raising raising, bool is_pair, double* raised) const {
    spread(base, leaf.lanes, leaf.period, room.pattern);
    with_mask([&](auto masked) {
      constexpr bool is_masked = decltype(masked)::value;
      const auto with = [&](auto how) { how(leaf, cell, room.pattern, raised); };
      if constexpr (sizeof(T) == 4) {
        if (raising == Raising::quick) return with(raise_leaf<T, is_masked, Raising::quick, false>);
      } else if (is_pair) {
        if (raising == Raising::below) return with(raise_leaf<T, is_masked, Raising::below, true>);
        return with(raise_leaf<T, is_masked, Raising::full, true>);
      }
      if (raising == Raising::below) return with(raise_leaf<T, is_masked, Raising::below, false>);
      with(raise_leaf<T, is_masked, Raising::full, false>);
    });
  }

  void subtract_from(const double* base, const double* logs) const {
    spread(base, leaf.lanes, leaf.period, room.pattern);
    spread(logs, leaf.lanes, leaf.period, room.second_pattern);
    with_mask([&](auto masked) {
      subtract_logs<T, decltype(masked)::value>(leaf, cell, room.pattern, room.second_pattern, room.raised);
    });
  }

  NEVER_INLINE void settle_infinities(const double* top, ExponentialsState& state) const {
    bool found[n_lanes] = {};
    with_mask([&](auto masked) { find_nan<T, decltype(masked)::value>(leaf, cell, found); });
    for (int64_t l = 0; l < leaf.lanes; ++l) {
      if (top[l] == infinity) state.top[l] = state.total[l] = found[l] ? not_a_number : infinity;
    }
  }

  // The state of a leaf; its exponentials are left in `raised`, or, part by part, in L1 and lost.
  void reduce(Raising raising, bool is_pair, double* raised, ExponentialsState& state, bool keeps = true) const {
    const int64_t lanes = leaf.lanes, rows = leaf.n / lanes, most = keeps || rows <= 1 ? lanes : n_part;
    alignas(64) double top[n_lanes], base[n_lanes];
    largest(top);
    for (int64_t l = 0; l < lanes; ++l) base[l] = top[l] == -infinity ? 0.0 : top[l];
    for (int64_t l = 0; l < lanes; l += most) {
      const int64_t some = least(most, lanes - l);
      const LeafOf part(room, some < lanes ? leaf.part(l, some, sizeof(T)) : leaf);
      part.raise(base + l, raising, is_pair, raised);
      halve_into(raised, rows, some, room.sums);
      copy_lanes(room.sums, some, state.total + l);
    }
    if (settle(top, lanes, state)) settle_infinities(top, state);
  }
};

std::unique_ptr<ExponentialsRoom> room_for(const Block& block) {
  std::unique_ptr<ExponentialsRoom> room(new ExponentialsRoom);
  room->is_narrow = block.dtype != Dtype::f64 && block.dtype != Dtype::i32 && block.dtype != Dtype::i64;
  room->tree.begin((block.n + block.leaf - 1) / block.leaf);
  return room;
}

// visit(a cell as wide as the room's).
template <class Visit>
void with_width(const ExponentialsRoom& room, const Visit& visit) {
  if (room.is_narrow) return visit(float());
  visit(double());
}

// ---- leaves of 64 rows of few columns, one after another ------------------------------------------------------------
// Turned into lanes they would be read and written three times over. So eight rows of each are folded as they lie,
// which is the tree of halving, and what is left, an eighth of it, is turned.

constexpr int64_t n_group_rows = 64;
constexpr int64_t most_group_columns = 4;

template <class T, bool is_masked, int columns>
NEVER_INLINE void largest_of_groups(const Leaf& leaf, CellOf<T> given, int64_t groups, T* eighths) {
  constexpr int64_t eighth = 8 * columns;
  const CellOf<T> cell = given;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = 8 * eighth * g;
    const unsigned char* const cells_ptr = leaf.cells_ptr + first * static_cast<int64_t>(sizeof(T));
    const unsigned char* const keep_ptr = is_masked ? leaf.keep_ptr + first : nullptr;
    if (leaf.ahead) {
      prefetch(cells_ptr + leaf.ahead * static_cast<int64_t>(sizeof(T)), 8 * eighth * static_cast<int64_t>(sizeof(T)));
      if (is_masked) prefetch(keep_ptr + n_ahead, 8 * eighth);
    }
    T* const out = eighths + g * eighth;
    const auto get = [=](int64_t k, int64_t j) {
      return cell.template get<is_masked>(cells_ptr, keep_ptr, k * eighth + j);
    };
    const auto larger_of = [](T a, T b) { return b > a ? b : a; };
#pragma GCC ivdep
    for (int64_t j = 0; j < eighth; ++j) {
      out[j] = larger_of(larger_of(larger_of(get(0, j), get(1, j)), larger_of(get(2, j), get(3, j))),
                         larger_of(larger_of(get(4, j), get(5, j)), larger_of(get(6, j), get(7, j))));
    }
  }
}

// Ahead of the loop: what was just stored cell by cell cannot be loaded as a vector.
template <int columns>
ALWAYS_INLINE void prepare_patterns(const double* of_lanes, int64_t groups, double* patterns) {
  if constexpr (columns == 1) return;
  constexpr int64_t eighth = 8 * columns;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t j = 0; j < eighth; ++j) patterns[g * eighth + j] = of_lanes[g * columns + j % columns];
  }
}

template <int columns>
ALWAYS_INLINE void spread_group(const double* of_lanes, const double* patterns, int64_t g, double* pattern) {
  constexpr int64_t eighth = 8 * columns;
  if constexpr (columns == 1) {
    for (int64_t j = 0; j < 8 * eighth; ++j) pattern[j] = of_lanes[g];
  } else {
    for (int64_t k = 0; k < 8; ++k) std::memcpy(pattern + k * eighth, patterns + g * eighth, eighth * sizeof(double));
  }
}

// `keeps`: the exponentials are left in `kept`.
template <class T, bool is_masked, int columns, Raising raising, bool keeps>
NEVER_INLINE void raise_groups(const Leaf& leaf, CellOf<T> given, int64_t groups, const double* base, double* patterns,
                               double* eighths, double* kept) {
  constexpr int64_t eighth = 8 * columns;
  prepare_patterns<columns>(base, groups, patterns);
  const CellOf<T> cell = given;
  alignas(64) double pattern[8 * eighth], lost[8 * eighth];
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = 8 * eighth * g;
    const unsigned char* const cells_ptr = leaf.cells_ptr + first * static_cast<int64_t>(sizeof(T));
    const unsigned char* const keep_ptr = is_masked ? leaf.keep_ptr + first : nullptr;
    double* const raised = keeps ? kept + first : lost;
    spread_group<columns>(base, patterns, g, pattern);
#pragma GCC ivdep
    for (int64_t j = 0; j < 8 * eighth; ++j) {
      const double value = static_cast<double>(cell.template get<is_masked>(cells_ptr, keep_ptr, j));
      raised[j] = raised_to<raising>(value - pattern[j]);
    }
    double* const out = eighths + g * eighth;
#pragma GCC ivdep
    for (int64_t j = 0; j < eighth; ++j) {
      const double* const of = raised + j;
      out[j] = ((of[0] + of[4 * eighth]) + (of[2 * eighth] + of[6 * eighth])) +
               ((of[eighth] + of[5 * eighth]) + (of[3 * eighth] + of[7 * eighth]));
    }
  }
}

template <int columns>
NEVER_INLINE void count_groups(const unsigned char* keep_ptr, int64_t groups, int64_t* count) {
  constexpr int64_t eighth = 8 * columns;
  for (int64_t g = 0; g < groups; ++g) {
    const unsigned char* const of_ptr = keep_ptr + 8 * eighth * g;
    uint8_t sums[eighth];
    for (int64_t j = 0; j < eighth; ++j) {
      const unsigned char* const p = of_ptr + j;
      sums[j] = static_cast<uint8_t>(p[0] + p[eighth] + p[2 * eighth] + p[3 * eighth] + p[4 * eighth] + p[5 * eighth] +
                                     p[6 * eighth] + p[7 * eighth]);
    }
    for (int64_t c = 0; c < columns; ++c) {
      int64_t sum = 0;
      for (int64_t r = 0; r < 8; ++r) sum += sums[r * columns + c];
      count[g * columns + c] = sum;
    }
  }
}

constexpr int64_t n_scratch = n_tile / 4;
static_assert(n_scratch >= n_tile / 8, "an eighth of a tile fits");

// The largest cells and the totals below them, side by side as lanes.
template <int columns, Raising raising, bool keeps>
void total_groups(const LeafOf<float>& of, double* top, double* total) {
  ExponentialsRoom& room = of.room;
  const int64_t groups = of.leaf.n / columns / n_group_rows, lanes = groups * columns;
  double *const eighths = room.sums, *const patterns = eighths + n_scratch, *const turned = patterns + n_scratch;
  float* const largest = reinterpret_cast<float*>(eighths);
  float* const largest_turned = reinterpret_cast<float*>(turned);
  of.with_mask([&](auto masked) {
    largest_of_groups<float, decltype(masked)::value, columns>(of.leaf, of.cell, groups, largest);
  });
  turn_cells<float, columns>(largest, groups, 8, columns, largest_turned);
  for (int64_t n = 4 * lanes; n >= lanes; n /= 2) {
    const float* const rest = largest_turned + n;
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) largest_turned[j] = rest[j] > largest_turned[j] ? rest[j] : largest_turned[j];
  }
  alignas(64) double base[n_lanes];
  for (int64_t l = 0; l < lanes; ++l) top[l] = static_cast<double>(largest_turned[l]);
  for (int64_t l = 0; l < lanes; ++l) base[l] = top[l] == -infinity ? 0.0 : top[l];
  of.with_mask([&](auto masked) {
    raise_groups<float, decltype(masked)::value, columns, raising, keeps>(of.leaf, of.cell, groups, base, patterns,
                                                                          eighths, room.raised);
  });
  turn_cells<double, columns>(eighths, groups, 8, columns, turned);
  halve(turned, 8, lanes);
  copy_lanes(turned, lanes, total);
}

// Their states. False where a cell is inf: another way has to tell whether there is a NaN.
template <int columns>
bool reduce_groups(ExponentialsRoom& room, const Block& block, const Window& flat, ExponentialsState& state) {
  const int64_t groups = flat.rows / n_group_rows, lanes = groups * columns;
  alignas(64) double top[n_lanes];
  total_groups<columns, Raising::below, false>(LeafOf<float>(room, block, flat), top, state.total);
  if (settle(top, lanes, state)) return false;
  if (room.keep_ptr) {
    count_groups<columns>(room.keep_ptr, groups, state.count);
  } else {
    for (int64_t l = 0; l < lanes; ++l) state.count[l] = n_group_rows;
  }
  return true;
}

// visit(how many columns).
template <class Visit>
auto with_columns(int64_t columns, const Visit& visit) {
  switch (columns) {
    case 1: return visit(std::integral_constant<int, 1>());
    case 2: return visit(std::integral_constant<int, 2>());
    case 3: return visit(std::integral_constant<int, 3>());
    default: return visit(std::integral_constant<int, 4>());
  }
}

bool reduce_groups_of(ExponentialsRoom& room, const Block& block, const Window& flat, ExponentialsState& state) {
  return with_columns(flat.columns, [&](auto columns) { return reduce_groups<columns()>(room, block, flat, state); });
}

// Whether a window is several slices of 64 rows, one after another; `flat` is it as one.
bool are_groups(const ExponentialsRoom& room, const Block& block, const Window& w, Window& flat) {
  flat = w;
  flat.groups = 1, flat.rows = w.groups * n_group_rows;
  return room.is_narrow && block.n == n_group_rows && w.groups > 1 && w.columns <= most_group_columns &&
         is_run(block.data, w) && (!block.mask.cells_ptr || is_run(block.mask, w));
}

// Leaves [w.i, w.i + 64 k) of a window become states of the tree; how many rows that were.
int64_t reduce_many(ExponentialsRoom& room, const Block& block, Window& w, ExponentialsState& states) {
  const bool is_dense = block.data.stride_inner == 1 && block.data.stride_n == w.columns;
  const bool are_few = w.groups == 1 && w.columns <= most_group_columns;
  if (!room.is_narrow || !is_dense || !are_few || block.leaf != n_group_rows) return 0;
  const int64_t groups = least((block.n - w.i) / n_group_rows, n_lanes / most_group_columns);
  if (groups < 2) return 0;
  Window flat = w;
  flat.rows = groups * n_group_rows;
  if (!reduce_groups_of(room, block, flat, states)) return 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * w.columns;
    ExponentialsState& state = room.tree.next();
    copy_lanes(states.count + first, w.columns, state.count);
    copy_lanes(states.top + first, w.columns, state.top);
    copy_lanes(states.total + first, w.columns, state.total);
    room.tree.push(w.columns);
  }
  return flat.rows;
}

bool reduce_slices(ExponentialsRoom& room, const Block& block, const Window& w) {
  Window flat;
  if (!are_groups(room, block, w, flat) || !reduce_groups_of(room, block, flat, room.tree.next())) return false;
  room.tree.push(w.lanes());
  return true;
}

NEVER_INLINE void count_rows(const Leaf& leaf, int64_t* count) {
  uint8_t few[n_lanes] = {};  // of 64 rows
  for (int64_t first = 0; first < leaf.n; first += leaf.lanes) {
    const unsigned char* const keep_ptr = leaf.keep_ptr + first / leaf.lanes * leaf.keep_step;
    for (int64_t l = 0; l < leaf.lanes; ++l) few[l] = static_cast<uint8_t>(few[l] + keep_ptr[l]);
  }
  for (int64_t l = 0; l < leaf.lanes; ++l) count[l] = few[l];
}

void count_leaf(const ExponentialsRoom& room, const Leaf& leaf, const Window& w, int64_t* count) {
  if (leaf.has_mask_in_place()) return count_rows(leaf, count);
  count_window(room.keep_ptr, w, count);
}

template <class T>
void lift_exponentials(ExponentialsRoom& room, const Block& block, const Parts& parts) {
  const std::unique_ptr<ExponentialsState> states(new ExponentialsState);
  each_window(block, block.leaf, [&](Window& w) {
    w.i = 0, w.rows = block.n;
    if (reduce_slices(room, block, w)) w.i = block.n;
    while (w.i < block.n) {
      if (const int64_t rows = reduce_many(room, block, w, *states)) {
        w.i += rows;
        continue;
      }
      w.rows = least(block.leaf, block.n - w.i);
      const LeafOf<T> leaf(room, block, w, true);
      leaf.reduce(Raising::below, block.dtype == Dtype::f64, room.raised, room.tree.next(), false);
      count_leaf(room, leaf.leaf, w, room.tree.next().count);
      room.tree.push(w.lanes());
      w.i += block.leaf;
    }
    w.i = 0;
    const ExponentialsState& state = room.tree.finish(w.lanes());
    const int64_t at = w.o * block.inner + w.c;
    copy_lanes(state.count, w.lanes(), parts.count_ptr + at);
    copy_canonical(state.top, w.lanes(), static_cast<double*>(parts.part_ptr[0]) + at);
    copy_canonical(state.total, w.lanes(), static_cast<double*>(parts.part_ptr[1]) + at);
  });
}

// ---- softmax and log_softmax ----------------------------------------------------------------------------------------

// out = raised / divisor.
NEVER_INLINE void divide_cells(ExponentialsRoom& room, const double* raised, const Window& w, const double* divisor,
                               bool exact_quotient) {
  const int64_t lanes = w.lanes(), period = period_of(lanes);
  const double* const pattern = room.pattern;
  double* const out = room.raised;
  if (exact_quotient) {
    spread(divisor, lanes, period, room.pattern);
    each_cell(w.cells(), period, [=](int64_t p, int64_t j) { out[j] = raised[j] / pattern[p]; });
    return;
  }
  alignas(64) double factor[n_lanes];
  for (int64_t l = 0; l < lanes; ++l) factor[l] = 1.0 / divisor[l];
  spread(factor, lanes, period, room.pattern);
  each_cell(w.cells(), period, [=](int64_t p, int64_t j) { out[j] = raised[j] * pattern[p]; });
}

NEVER_INLINE void logarithms(double* values, int64_t n) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) values[j] = logarithm(values[j]);
}

constexpr int64_t n_rows_cells = 4096;
constexpr int64_t n_stored = 1 << 17;  // 1 MB, a part of L2

// How a block is normalised. A slice that is one leaf is read and raised once. In a longer one either each leaf is
// raised from its own largest cell, and scaled by what that lies below the slice's (quick); or the slice's is found
// first. What was raised is kept where the slice is not too long; else the cells are read and raised again.
struct Way {
  bool is_log, quick, is_one_leaf, stores, is_pair;
  Raising raising;
};

bool is_quick(Dtype dtype, Dtype result) {
  const auto is_short = [](Dtype of) { return of == Dtype::f32 || of == Dtype::f16 || of == Dtype::bf16; };
  return is_short(dtype) && is_short(result);
}

// raised *= factor of the lane.
template <int columns>
NEVER_INLINE void scale_groups(int64_t groups, const double* factor, double* patterns, double* given_raised) {
  constexpr int64_t n = n_group_rows * columns;
  alignas(64) double pattern[n];
  prepare_patterns<columns>(factor, groups, patterns);
  for (int64_t g = 0; g < groups; ++g) {
    double* const raised = given_raised + g * n;
    spread_group<columns>(factor, patterns, g, pattern);
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) raised[j] *= pattern[j];
  }
}

// softmax of a window of such slices.
template <int columns>
bool normalize_groups(ExponentialsRoom& room, const Block& block, const Filled& filled, const Window& flat) {
  const int64_t groups = flat.rows / n_group_rows, lanes = groups * columns;
  alignas(64) double top[n_lanes], total[n_lanes], factor[n_lanes];
  const LeafOf<float> of(room, block, flat);
  total_groups<columns, Raising::quick, true>(of, top, total);
  for (int64_t l = 0; l < lanes; ++l) factor[l] = is_finite(top[l]) ? 1.0 / total[l] : not_a_number;
  scale_groups<columns>(groups, factor, room.sums, room.raised);
  return write_doubles(filled, flat, room.raised, room.keep_ptr, false);
}

template <class T>
struct Normalizing {
  ExponentialsRoom& room;
  const Block& block;
  const Filled& filled;
  const Way way;
  alignas(64) double top[n_lanes], total[n_lanes], base[n_lanes], scale[n_lanes];

  Normalizing(ExponentialsRoom& in, const Block& of, const Filled& to, const Way& by)
      : room(in), block(of), filled(to), way(by) {}

  double* kept(const Window& w) { return way.stores ? room.stored.get() + w.i * w.lanes() : room.raised; }
  double* leaf_top(const Window& w) { return room.tops.get() + w.i / block.leaf * w.lanes(); }

  void reduce_quickly(Window& w) {
    const int64_t lanes = w.lanes();
    each_leaf(block, w, [&] {
      const LeafOf<T> leaf(room, block, w, !way.is_one_leaf);
      leaf.reduce(way.raising, way.is_pair, kept(w), room.tree.next());
      if (way.stores) copy_lanes(room.tree.next().top, lanes, leaf_top(w));
      room.tree.push(lanes);
    });
    const ExponentialsState& state = room.tree.finish(lanes);
    copy_lanes(state.top, lanes, top), copy_lanes(state.total, lanes, total);
  }

  void reduce_twice(Window& w) {
    const int64_t lanes = w.lanes();
    for (int64_t l = 0; l < lanes; ++l) top[l] = -infinity;
    each_leaf(block, w, [&] {
      LeafOf<T>(room, block, w, true).largest(base);
      for (int64_t l = 0; l < lanes; ++l) top[l] = base[l] > top[l] ? base[l] : top[l];
    });
    for (int64_t l = 0; l < lanes; ++l) base[l] = top[l] == -infinity ? 0.0 : top[l];
    each_leaf(block, w, [&] {
      double* const raised = kept(w);
      LeafOf<T>(room, block, w, true).raise(base, way.raising, way.is_pair, raised);
      halve_into(raised, w.rows, lanes, room.sums);
      copy_lanes(room.sums, lanes, room.totals.next().total);
      room.totals.push(lanes);
    });
    copy_lanes(room.totals.finish(lanes).total, lanes, total);
  }

  // The rows of a window: leaf by leaf where those have divisors of their own; else as many as stay in L1.
  template <class Visit>
  void each_rows(Window& w, const Visit& visit) {
    const int64_t many = n_rows_cells / w.lanes(), most = way.stores || many < block.leaf ? block.leaf : many;
    for (w.i = 0; w.i < block.n; w.i += most) {
      w.rows = least(most, block.n - w.i);
      visit();
    }
  }

  // What `kept` is to be divided by.
  const double* divisor_of(const Window& w) {
    if (!way.stores || !way.quick) return scale;
    const double* const from = leaf_top(w);
    for (int64_t l = 0; l < w.lanes(); ++l) base[l] = scale[l] / exponential(subtrahend(from[l]) - top[l]);
    return base;
  }

  bool operator()(Window& w) {
    const int64_t lanes = w.lanes();
    Window flat;
    w.i = 0, w.rows = block.n;
    if (way.quick && !way.is_log && are_groups(room, block, w, flat) && is_run(filled.values, w)) {
      return with_columns(w.columns,
                          [&](auto columns) { return normalize_groups<columns()>(room, block, filled, flat); });
    }
    if (way.is_one_leaf || way.quick) {
      reduce_quickly(w);
    } else {
      reduce_twice(w);
    }
    for (int64_t l = 0; l < lanes; ++l) {
      base[l] = is_finite(top[l]) ? top[l] : not_a_number;
      scale[l] = is_finite(top[l]) ? total[l] : not_a_number;
    }
    if (way.is_log) logarithms(scale, lanes);
    bool overflowed = false;
    each_rows(w, [&] {
      if (way.is_log) {
        LeafOf<T>(room, block, w).subtract_from(base, scale);
      } else {
        const bool is_kept = way.is_one_leaf || way.stores;
        if (!is_kept) {
          LeafOf<T>(room, block, w).raise(base, way.raising, way.is_pair, room.raised);
        } else if (!way.is_one_leaf) {
          room.keep_ptr = gather_keep(block, w, room.keep);
        }
        divide_cells(room, kept(w), w, divisor_of(w), filled.dtype == Dtype::f64);
      }
      overflowed |= write_doubles(filled, w, room.raised, room.keep_ptr, way.is_log);
    });
    return overflowed;
  }
};

int normalize(const Block& block, const Options& options, const Filled& filled, bool is_log) {
  const std::unique_ptr<ExponentialsRoom> room = room_for(block);
  room->negates = options.negates;
  const bool quick = is_quick(block.dtype, filled.dtype), is_one_leaf = block.n <= block.leaf;
  const bool stores = !is_log && !is_one_leaf && block.n <= n_stored / (block.leaf > 64 ? 1 : 64);
  const Way way{is_log, quick, is_one_leaf, stores, block.dtype == Dtype::f64, quick ? Raising::quick : Raising::full};
  const int64_t n_leaves = (block.n + block.leaf - 1) / block.leaf;
  const int64_t most_lanes = stores ? least(n_tile_lanes, n_stored / block.n) : n_tile_lanes;
  if (!is_one_leaf) room->totals.begin(n_leaves);
  if (stores) room->stored.reset(new double[n_stored]), room->tops.reset(new double[n_leaves * most_lanes]);
  bool overflowed = false;
  with_width(*room, [&](auto of) {
    Normalizing<decltype(of)> normalizing(*room, block, filled, way);
    each_window(block, block.leaf, [&](Window& w) { overflowed |= normalizing(w); }, most_lanes);
  });
  return overflowed ? fill_overflowed : fill_done;
}

}  // namespace

bool exponentials(const Block& block, const Options&, const Parts& parts) {
  const std::unique_ptr<ExponentialsRoom> room = room_for(block);
  with_width(*room, [&](auto of) { lift_exponentials<decltype(of)>(*room, block, parts); });
  return true;
}

int softmax(const Block& block, const Options& options, const Filled& filled) {
  return normalize(block, options, filled, false);
}
int log_softmax(const Block& block, const Options& options, const Filled& filled) {
  return normalize(block, options, filled, true);
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
