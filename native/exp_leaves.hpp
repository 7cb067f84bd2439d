// exp(cell - the largest cell) of a leaf, and their sums: what logsumexp and softmax start from.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

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

struct ExponentialsRoom : LeafCellsRoom {
  alignas(64) double raised[n_tile];  // exp(cell - base)
  alignas(64) double sums[n_tile];
  alignas(64) double pattern[n_lanes];
  alignas(64) double second_pattern[n_lanes];
  LeafTree<ExponentialsState> tree;
  LeafTree<PlainState> totals;
  std::unique_ptr<double[]> stored;  // the exponentials of all leaves, where they fit
  std::unique_ptr<double[]> tops;    // and the largest cells they were raised from
};

// What cells are raised from: the largest one, or 0 where no cell counts.
inline void bases_of(const double* top, int64_t lanes, double* base) {
  for (int64_t l = 0; l < lanes; ++l) base[l] = top[l] == -infinity ? 0.0 : top[l];
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
NEVER_INLINE void largest_of_leaf(const LeafCells& leaf, CellOf<T> cell, double* top) {
  alignas(64) T largest[n_lanes];
  for (int64_t j = 0; j < leaf.period; ++j) largest[j] = -std::numeric_limits<T>::infinity();
  each_chunk<T>(leaf, [&](const unsigned char* cells_ptr, const unsigned char* keep_ptr, int64_t, int64_t n) {
    if (is_masked && leaf.ahead) prefetch(keep_ptr + leaf.keep_ahead(), n);
    largest_of_chunk<T, is_masked>(cells_ptr, keep_ptr, n, cell, largest);
  });
  fold_pattern(largest, leaf.period, leaf.lanes, [](T a, T b) { return b > a ? b : a; });
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
NEVER_INLINE void raise_leaf(const LeafCells& leaf, CellOf<T> given, const double* pattern, double* given_raised) {
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
NEVER_INLINE void subtract_logs(const LeafCells& leaf, CellOf<T> given, const double* pattern, const double* logs,
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
NEVER_INLINE void find_nan(const LeafCells& leaf, CellOf<T> cell, bool* found) {
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
struct ExpLeaf {
  ExponentialsRoom& room;
  LeafCells leaf;
  CellOf<T> cell;

  ExpLeaf(ExponentialsRoom& of, const LeafCells& cells)
      : room(of), leaf(cells), cell{of.negates ? CellOf<T>::sign : 0} {}
  ExpLeaf(ExponentialsRoom& of, const Block& block, const Window& w, bool walks_mask = false)
      : ExpLeaf(of, of.load(block, w, walks_mask)) {}

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
    bases_of(top, lanes, base);
    for (int64_t l = 0; l < lanes; l += most) {
      const int64_t some = least(most, lanes - l);
      const ExpLeaf part(room, some < lanes ? leaf.part(l, some, sizeof(T)) : leaf);
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
