// exp_leaves.hpp, of leaves of 64 rows of few columns, one after another.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.
//
// Turned into lanes, cells would be read and written three times over. So eight rows of each are folded as they lie,
// which is the tree of halving, and what is left, an eighth of it, is turned.

constexpr int64_t n_group_rows = 64;
constexpr int64_t most_group_columns = 4;
constexpr int64_t float_bytes = 4;

template <bool is_masked, int columns>
NEVER_INLINE void largest_of_groups(const LeafCells& leaf, CellOf<float> given, int64_t groups, float* eighths) {
  constexpr int64_t eighth = 8 * columns;
  const CellOf<float> cell = given;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = 8 * eighth * g;
    const unsigned char* const cells_ptr = leaf.cells_ptr + first * float_bytes;
    const unsigned char* const keep_ptr = is_masked ? leaf.keep_ptr + first : nullptr;
    if (leaf.ahead) {
      prefetch(cells_ptr + leaf.ahead * float_bytes, 8 * eighth * float_bytes);
      if (is_masked) prefetch(keep_ptr + n_ahead, 8 * eighth);
    }
    float* const out = eighths + g * eighth;
    const auto get = [=](int64_t k, int64_t j) {
      return cell.get<is_masked>(cells_ptr, keep_ptr, k * eighth + j);
    };
    const auto larger_of = [](float a, float b) { return b > a ? b : a; };
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
template <bool is_masked, int columns, Raising raising, bool keeps>
NEVER_INLINE void raise_groups(const LeafCells& leaf, CellOf<float> given, int64_t groups, const double* base,
                               double* patterns, double* eighths, double* kept) {
  constexpr int64_t eighth = 8 * columns;
  prepare_patterns<columns>(base, groups, patterns);
  const CellOf<float> cell = given;
  alignas(64) double pattern[8 * eighth], lost[8 * eighth];
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = 8 * eighth * g;
    const unsigned char* const cells_ptr = leaf.cells_ptr + first * float_bytes;
    const unsigned char* const keep_ptr = is_masked ? leaf.keep_ptr + first : nullptr;
    double* const raised = keeps ? kept + first : lost;
    spread_group<columns>(base, patterns, g, pattern);
#pragma GCC ivdep
    for (int64_t j = 0; j < 8 * eighth; ++j) {
      const double value = static_cast<double>(cell.get<is_masked>(cells_ptr, keep_ptr, j));
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
void total_groups(const ExpLeaf<float>& of, double* top, double* total) {
  ExponentialsRoom& room = of.room;
  const int64_t groups = of.leaf.n / columns / n_group_rows, lanes = groups * columns;
  double *const eighths = room.sums, *const patterns = eighths + n_scratch, *const turned = patterns + n_scratch;
  float* const largest = reinterpret_cast<float*>(eighths);
  float* const largest_turned = reinterpret_cast<float*>(turned);
  of.with_mask([&](auto masked) {
    largest_of_groups<decltype(masked)::value, columns>(of.leaf, of.cell, groups, largest);
  });
  turn_cells<float, columns>(largest, groups, 8, columns, largest_turned);
  for (int64_t n = 4 * lanes; n >= lanes; n /= 2) {
    const float* const rest = largest_turned + n;
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) largest_turned[j] = rest[j] > largest_turned[j] ? rest[j] : largest_turned[j];
  }
  alignas(64) double base[n_lanes];
  for (int64_t l = 0; l < lanes; ++l) top[l] = static_cast<double>(largest_turned[l]);
  bases_of(top, lanes, base);
  of.with_mask([&](auto masked) {
    raise_groups<decltype(masked)::value, columns, raising, keeps>(of.leaf, of.cell, groups, base, patterns,
                                                                          eighths, room.raised);
  });
  turn_cells<double, columns>(eighths, groups, 8, columns, turned);
  halve(turned, 8, lanes);
  copy_lanes(turned, lanes, total);
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

// Whether a window is several slices of 64 rows, one after another; `flat` is it as one.
bool are_groups(const ExponentialsRoom& room, const Block& block, const Window& w, Window& flat) {
  flat = w;
  flat.groups = 1, flat.rows = w.groups * n_group_rows;
  return room.is_narrow && block.n == n_group_rows && w.groups > 1 && w.columns <= most_group_columns &&
         is_run(block.data, w) && (!block.mask.cells_ptr || is_run(block.mask, w));
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
