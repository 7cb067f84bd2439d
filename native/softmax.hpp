// softmax and log_softmax of whole slices, or of parts of slices whose states are known.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

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
// first. What was raised is kept where the slice is not too long; else the cells are read and raised again. Of slices
// whose states are known the cells are raised once, from the largest of all.
struct Way {
  bool is_log, quick, is_known, is_one_leaf, stores, is_pair;
  Raising raising;
};

bool is_quick(Dtype dtype, Dtype result) {
  const auto is_short = [](Dtype of) { return of == Dtype::f32 || of == Dtype::f16 || of == Dtype::bf16; };
  return is_short(dtype) && is_short(result);
}

// softmax of a window of whole slices of 64 rows.
template <int columns>
bool normalize_groups(ExponentialsRoom& room, const Block& block, const Filled& filled, const Window& flat) {
  const int64_t groups = flat.rows / n_group_rows, lanes = groups * columns;
  alignas(64) double top[n_lanes], total[n_lanes], factor[n_lanes];
  const ExpLeaf<float> of(room, block, flat);
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
      const ExpLeaf<T> leaf(room, block, w, !way.is_one_leaf);
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
      ExpLeaf<T>(room, block, w, true).largest(base);
      for (int64_t l = 0; l < lanes; ++l) top[l] = base[l] > top[l] ? base[l] : top[l];
    });
    bases_of(top, lanes, base);
    each_leaf(block, w, [&] {
      double* const raised = kept(w);
      ExpLeaf<T>(room, block, w, true).raise(base, way.raising, way.is_pair, raised);
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

  void divide_rows(const Window& w) {
    const bool is_kept = way.is_one_leaf || way.stores;
    if (!is_kept) {
      ExpLeaf<T>(room, block, w).raise(base, way.raising, way.is_pair, room.raised);
    } else if (!way.is_one_leaf) {
      room.keep_ptr = gather_keep(block, w, room.keep);
    }
    divide_cells(room, kept(w), w, divisor_of(w), filled.dtype == Dtype::f64);
  }

  bool operator()(Window& w) {
    const int64_t lanes = w.lanes();
    Window flat;
    w.i = 0, w.rows = block.n;
    if (way.quick && !way.is_log && !way.is_known && are_groups(room, block, w, flat) && is_run(filled.values, w)) {
      return with_columns(w.columns,
                          [&](auto columns) { return normalize_groups<columns()>(room, block, filled, flat); });
    }
    if (way.is_known) {
      read_lanes(block, w, 0, top), read_lanes(block, w, 1, total);
    } else if (way.is_one_leaf || way.quick) {
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
      way.is_log ? ExpLeaf<T>(room, block, w).subtract_from(base, scale) : divide_rows(w);
      overflowed |= write_doubles(filled, w, room.raised, room.keep_ptr, way.is_log);
    });
    return overflowed;
  }
};

int normalize(const Block& block, const Options& options, const Filled& filled, bool is_log) {
  const std::unique_ptr<ExponentialsRoom> room = room_for(block);
  room->negates = options.negates;
  const bool quick = is_quick(block.dtype, filled.dtype), is_known = block.states_ptr;
  const bool is_one_leaf = !is_known && block.n <= block.leaf;
  const bool stores = !is_log && !is_known && !is_one_leaf && block.n <= n_stored / (block.leaf > 64 ? 1 : 64);
  const Way way{is_log, quick, is_known, is_one_leaf, stores, block.dtype == Dtype::f64, quick ? Raising::quick : Raising::full};
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
