// The median and quantiles of the valid cells of each slice, selected from ordered keys: exact, whatever is sampled.
// Short slices are sorted side by side, longer ones are gathered, the longest are searched block by block.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "keys.hpp"

#include "order.hpp"

#include "slices.hpp"

// ---- which cells, and what is made of two of them -------------------------------------------------------------------

enum Interpolation { linear, lower, higher, midpoint, nearest, middle };  // the first as in interpolation_names

struct Asked {
  const double* shares;
  int64_t n_shares;
  Interpolation interpolation;
};

constexpr double half[] = {0.5};

Asked median_asked(const Options&) { return {half, 1, middle}; }
Asked quantile_asked(const Options& options) {
  return {options.q_ptr, options.n_q, static_cast<Interpolation>(options.interpolation)};
}

// The two cells in order that a quantile lies between, and how far from the first.
struct Places {
  int64_t lower, upper;
  double share;
};

ALWAYS_INLINE Places places_of(double q, int64_t count, Interpolation interpolation) {
  const double wanted = q * static_cast<double>(count > 1 ? count - 1 : 0);
  int64_t at = static_cast<int64_t>(wanted);
  const double rest = wanted - static_cast<double>(at);
  const int64_t next = at + (rest > 0.0);
  switch (interpolation) {
    case lower: return {at, at, 0.0};
    case higher: return {next, next, 0.0};
    case nearest: at += rest > 0.5 || (rest == 0.5 && at % 2 == 1); return {at, at, 0.0};
    case linear: return {at, next, rest};
    default: return {at, next, 0.5};
  }
}

ALWAYS_INLINE double two_product_error(double a, double b, double product) {  // Dekker; 0 where it is not finite
  constexpr double splitter = 134217729.0;
  const double spread_a = splitter * a, spread_b = splitter * b;
  const double a_top = spread_a - (spread_a - a), b_top = spread_b - (spread_b - b);
  const double a_rest = a - a_top, b_rest = b - b_top;
  const double error = ((a_top * b_top - product) + a_top * b_rest + a_rest * b_top) + a_rest * b_rest;
  return error - error == 0.0 ? error : 0.0;
}

// lower + share * (upper - lower), rounded as the reference does; an infinite end wins.
ALWAYS_INLINE double interpolated(double low, double high, double share) {
  const double a = low * 0.25, b = high * 0.25;  // at a quarter the size nothing overflows
  const double gap = b - a, gap_error = rounding_error(b, -a, gap);
  const double step = share * gap, step_error = two_product_error(share, gap, step);
  const double total = a + step, error = rounding_error(a, step, total);
  const double found = total + (error + (step_error + share * gap_error));
  const bool is_infinite = (gap < 0.0 ? -gap : gap) > std::numeric_limits<double>::max();
  const double between_ends = (is_infinite ? a + b : found) * 4.0;
  return low == high || share == 0.0 ? low : between_ends;
}

ALWAYS_INLINE double mean_of(double low, double high) {
  const double mean = (low + high) * 0.5;
  const bool overflowed = !is_finite(mean) && mean == mean && is_finite(low);
  return overflowed ? low * 0.5 + high * 0.5 : mean;
}

NEVER_INLINE void values_of(const double* low, const double* high, const double* share, int64_t n,
                            Interpolation interpolation, double* values) {
  if (interpolation == middle) {
    for (int64_t l = 0; l < n; ++l) values[l] = mean_of(low[l], high[l]);
  } else if (interpolation == linear || interpolation == midpoint) {
    for (int64_t l = 0; l < n; ++l) values[l] = interpolated(low[l] + 0.0, high[l] + 0.0, share[l]);
  } else {
    for (int64_t l = 0; l < n; ++l) values[l] = low[l] + 0.0;
  }
}

// ---- short slices: columns in order ---------------------------------------------------------------------------------

template <class Order>
struct ShortRoom {
  alignas(64) typename Order::Out keys[n_tile];
  alignas(64) unsigned char keep[n_tile];
  alignas(64) double low[n_tile_lanes], high[n_tile_lanes], share[n_tile_lanes];
};

template <class Order>
void short_quantiles(const Block& block, const Order& order, const Asked& asked, double* values, int64_t* count) {
  using K = typename Order::Out;
  const std::unique_ptr<ShortRoom<Order>> room(new ShortRoom<Order>);
  const int64_t n_results = block.outer * block.inner;
  each_whole_window(block, n_network_cells, n_tile_lanes, [&](const Window& w) {
    const int64_t lanes = w.lanes(), first = w.o * block.inner + w.c;
    const unsigned char* const keep_ptr = gather_keep(block, w, room->keep);
    gather(block.data, w, keep_ptr, order, room->keys);
    int64_t* const n_valid = count + first;
    for (int64_t l = 0; l < lanes; ++l) n_valid[l] = 0;
    count_window(keep_ptr, w, n_valid);
    const K* const keys = room->keys;
    sort_columns(room->keys, w.rows, lanes);
    for (int64_t q = 0; q < asked.n_shares; ++q) {
      double* const to = values + q * n_results + first;
      for (int64_t l = 0; l < lanes; ++l) {
        const Places at = places_of(asked.shares[q], n_valid[l], asked.interpolation);
        room->low[l] = order.value(keys[at.lower * lanes + l]);
        room->high[l] = order.value(keys[at.upper * lanes + l]);
        room->share[l] = at.share;
      }
      values_of(room->low, room->high, room->share, lanes, asked.interpolation, to);
      if constexpr (Order::is_float) {
        for (int64_t l = 0; l < lanes; ++l) {
          const int64_t last = n_valid[l] > 0 ? n_valid[l] - 1 : 0;
          to[l] = keys[last * lanes + l] == order.nan_key ? not_a_number : to[l];
        }
      }
    }
  });
}

// ---- longer slices: the valid keys gathered, then selected from -----------------------------------------------------

template <class K>
NEVER_INLINE K largest_key(const K* keys, int64_t n) {
  K most = std::numeric_limits<K>::min();
  for (int64_t j = 0; j < n; ++j) most = keys[j] > most ? keys[j] : most;
  return most;
}

template <class Order>
void long_quantiles(const Block& block, const Order& order, const Asked& asked, double* values, int64_t* count) {
  using K = typename Order::Out;
  Pile<K> room(block.n + 1);
  const int64_t n_results = block.outer * block.inner;
  const auto key_alone = [](K key, int64_t) { return key; };
  const auto load = [&](const Window& w, K* keys) { gather(block.data, w, nullptr, order, keys); };
  each_slice<K, K>(block, load, key_alone, [&](int64_t o, int64_t c, const K* keys, int64_t n) {
    const int64_t result = o * block.inner + c;
    count[result] = n;
    bool is_nan = false;
    if constexpr (Order::is_float) is_nan = n > 0 && largest_key(keys, n) == order.nan_key;
    for (int64_t q = 0; q < asked.n_shares; ++q) {
      double* const to = values + q * n_results + result;
      *to = is_nan ? not_a_number : 0.0;
      if (is_nan || n == 0) continue;
      const Places at = places_of(asked.shares[q], n, asked.interpolation);
      const K lower_key = nth_key(keys, n, at.lower, room.items);
      K upper_key = lower_key;
      if (at.upper > at.lower) {
        int64_t n_up_to = 0;
        const K above = next_key(keys, n, lower_key, &n_up_to);
        if (at.upper >= n_up_to) upper_key = above;
      }
      const double low = order.value(lower_key), high = order.value(upper_key);
      values_of(&low, &high, &at.share, 1, asked.interpolation, to);
    }
  });
}

void quantiles(const Block& block, const Asked& asked, double* values, int64_t* count) {
  if (block.n == 0) {
    for (int64_t j = 0; j < block.outer * block.inner; ++j) count[j] = 0;
    for (int64_t j = 0; j < asked.n_shares * block.outer * block.inner; ++j) values[j] = 0.0;
    return;
  }
  with_order<false>(block.dtype, [&](const auto& order) {
    (block.n <= n_network ? short_quantiles<std::decay_t<decltype(order)>>
                          : long_quantiles<std::decay_t<decltype(order)>>)(block, order, asked, values, count);
  });
}

// ---- the longest: block by block ------------------------------------------------------------------------------------

// A rank that is searched for: its key lies from `first` to `last`, with `n_before` keys below and `n_to` up to them.
template <class K>
struct Rank {
  int64_t at = 0, n_before = 0, n_to = 0;
  K first = std::numeric_limits<K>::min(), last = std::numeric_limits<K>::max();
  bool is_found = false;
  K key = 0;

  // What the counts of a bracket say; `inside` are the keys between its ends, or null where they are too many.
  void learn(const Counts& counts, K low, K high, const Pile<K>* inside, K* room) {
    if (is_found) return;
    const int64_t from_low = counts.below + counts.at_low, up_to_high = counts.below_high + counts.at_high;
    if (at < counts.below) return narrow(first, n_before, static_cast<K>(low - 1), counts.below);
    if (at < from_low) return found(low);
    if (at < counts.below_high) {
      if (inside) return found(nth_key(inside->items, inside->size, at - from_low, room));
      return narrow(static_cast<K>(low + 1), from_low, static_cast<K>(high - 1), counts.below_high);
    }
    if (at < up_to_high) return found(high);
    narrow(static_cast<K>(high + 1), up_to_high, last, n_to);
  }

 private:
  void found(K its_key) { is_found = true, key = its_key; }
  void narrow(K new_first, int64_t new_before, K new_last, int64_t new_to) {
    if (new_first > first) first = new_first, n_before = new_before;
    if (new_last < last) last = new_last, n_to = new_to;
  }
};

template <class K>
struct Bracket {
  K low, high;
  bool is_open;
};

template <class Order>
class OrderSearch final : public Search {
  using K = typename Order::Out;

  struct Sifted final : Found {  // of each lane, and of each bracket of it
    explicit Sifted(int64_t lanes, int64_t brackets)
        : n_valid(new int64_t[lanes]()), n_last(new int64_t[lanes]()), counts(new Counts[lanes * brackets]),
          inside(new Pile<K>[lanes * brackets]), overfull(new bool[lanes * brackets]()) {}
    ~Sifted() override { delete[] n_valid, delete[] n_last, delete[] counts, delete[] inside, delete[] overfull; }
    int64_t *n_valid, *n_last;  // n_last: with the largest key there is, NaN's
    Counts* counts;
    Pile<K>* inside;
    bool* overfull;
  };

 public:
  OrderSearch(Order given_order, Asked given_asked, int64_t n_lanes)
      : order(given_order), asked(given_asked), lanes(n_lanes), all(n_lanes, given_asked.n_shares),
        ranks(new Rank<K>[2 * n_lanes * given_asked.n_shares]),
        brackets(new Bracket<K>[n_lanes * given_asked.n_shares]),
        samples(new Pile<K>[n_lanes]) {}
  ~OrderSearch() override { delete[] ranks, delete[] brackets, delete[] samples; }

  Found* sample(const Block& block, int64_t n_cells, uint64_t seed) const override {
    Sifted* const found = new Sifted(lanes, 1);
    Chance chance{seed};
    for (int64_t l = 0; l < lanes; ++l) {
      Pile<K>& sampled = found->inside[l];
      sampled.reserve(n_cells + 1);
      for (int64_t j = 0; j < n_cells; ++j) {
        const int64_t r = chance.below(block.n);
        const Operand &data = block.data, &mask = block.mask;
        const K key = order(load_raw<RawCell>(data.cells_ptr, r * data.stride_n + l * data.stride_inner));
        if constexpr (Order::is_float) {
          if (block.omits_nan && key == order.nan_key) continue;
        }
        sampled.items[sampled.size] = key;
        sampled.size += mask.cells_ptr ? mask_cell(mask, r * mask.stride_n + l * mask.stride_inner) : 1;
      }
    }
    return found;
  }

  Found* sift(const Block& block) const override {
    Sifted* const found = new Sifted(lanes, asked.n_shares);
    struct Room {
      alignas(64) K keys[n_tile], lane[n_tile], taken[n_tile + 1];
      alignas(64) unsigned char keep[n_tile];
    };
    const std::unique_ptr<Room> room(new Room);
    const int64_t most_rows = least(4096, n_tile / lanes), most_inside = block.n / 4 + n_tile;
    Window w;
    w.columns = lanes;
    for (w.i = 0; w.i < block.n; w.i += most_rows) {
      w.rows = least(most_rows, block.n - w.i);
      const unsigned char* const keep_ptr = gather_keep(block, w, room->keep);
      gather(block.data, w, keep_ptr, order, room->keys);
      count_window(keep_ptr, w, found->n_valid);
      for (int64_t l = 0; l < lanes; ++l) {
        const K* keys = room->keys;
        if (lanes > 1) {
          for (int64_t r = 0; r < w.rows; ++r) room->lane[r] = room->keys[r * lanes + l];
          keys = room->lane;
        }
        sift_keys(*found, l, keys, w.rows, room->taken, most_inside);
      }
    }
    for (int64_t l = 0; l < lanes; ++l) found->n_last[l] -= block.n - found->n_valid[l];
    return found;
  }

  void absorb(const Found& given) override {
    const Sifted& found = static_cast<const Sifted&>(given);
    if (!is_bracketed) {
      for (int64_t l = 0; l < lanes; ++l) samples[l].add(found.inside[l].items, found.inside[l].size);
      return;
    }
    for (int64_t l = 0; l < lanes; ++l) all.n_valid[l] += found.n_valid[l], all.n_last[l] += found.n_last[l];
    for (int64_t b = 0; b < lanes * asked.n_shares; ++b) {
      all.counts[b].add(found.counts[b]);
      all.overfull[b] |= found.overfull[b];
      all.inside[b].add(found.inside[b].items, found.inside[b].size);
    }
  }

  void bracket() override {
    Pile<K> some, room;
    for (int64_t l = 0; l < lanes; ++l) {
      all.n_valid[l] = all.n_last[l] = 0;
      const Pile<K>& sampled = samples[l];
      some.reserve(sampled.size + 1), room.reserve(sampled.size + 1);
      for (int64_t q = 0; q < asked.n_shares; ++q) {
        const int64_t b = l * asked.n_shares + q;
        all.counts[b] = Counts(), all.inside[b].size = 0, all.overfull[b] = false;
        const Rank<K>&lower_rank = ranks[2 * b], &upper_rank = ranks[2 * b + 1];
        const Rank<K>& rank = lower_rank.is_found ? upper_rank : lower_rank;
        brackets[b] = {rank.first, rank.last, !rank.is_found};
        if (rank.is_found) continue;
        const int64_t n = take_keys(sampled.items, sampled.size, rank.first, rank.last, some.items);
        if (n == 0) {  // halve the range
          const K at = static_cast<K>((rank.first & rank.last) + ((rank.first ^ rank.last) >> 1));
          brackets[b].low = brackets[b].high = at;
          continue;
        }
        const int64_t at_inside = rank.at - rank.n_before, n_inside = rank.n_to - rank.n_before;
        const double last = static_cast<double>(n_inside > 1 ? n_inside - 1 : 1);
        const double share = is_counted ? static_cast<double>(at_inside) / last : asked.shares[q];
        const Between at = between(n, share, share, 5.0);
        if (at.low >= 0) brackets[b].low = nth_key(some.items, n, at.low, room.items);
        if (at.high < n) brackets[b].high = nth_key(some.items, n, at.high, room.items);
      }
    }
    is_bracketed = true;
  }

  bool settle() override {
    bool is_last = true;
    Pile<K> room;
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t n = all.n_valid[l];
      for (int64_t q = 0; q < asked.n_shares; ++q) {
        const int64_t b = l * asked.n_shares + q;
        if (!brackets[b].is_open) continue;
        Counts counts = all.counts[b];
        const K last_key = std::numeric_limits<K>::max();  // the masked ones have it too
        if (brackets[b].low == last_key) counts.at_low = n - counts.below;
        if (brackets[b].high == last_key) counts.at_high = n - counts.below_high;
        if (brackets[b].low == brackets[b].high) counts.below_high = counts.below, counts.at_high = counts.at_low;
        const Pile<K>* const inside = all.overfull[b] ? nullptr : &all.inside[b];
        room.reserve(all.inside[b].size + 1);
        const Places at = places_of(asked.shares[q], n, asked.interpolation);
        for (int k = 0; k < 2; ++k) {
          Rank<K>& rank = ranks[2 * b + k];
          if (!is_counted) rank.at = k ? at.upper : at.lower, rank.n_to = n;
          if (n == 0 || has_nan(l)) rank.is_found = true;
          rank.learn(counts, brackets[b].low, brackets[b].high, inside, room.items);
          is_last &= rank.is_found;
        }
      }
      samples[l].size = 0;
    }
    is_bracketed = false, is_counted = true;
    return is_last;
  }

  void write(double* values_ptr, int64_t* count_ptr) const override {
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t n = count_ptr[l] = all.n_valid[l];
      for (int64_t q = 0; q < asked.n_shares; ++q) {
        const Rank<K>* const found = ranks + 2 * (l * asked.n_shares + q);
        const double share = places_of(asked.shares[q], n, asked.interpolation).share;
        const double low = order.value(found[0].key), high = order.value(found[1].key);
        double* const to = values_ptr + q * lanes + l;
        values_of(&low, &high, &share, 1, asked.interpolation, to);
        if (has_nan(l)) *to = not_a_number;
      }
    }
  }

 private:
  struct RawCell {
    using Raw = typename Order::Raw;
  };

  // A valid NaN: keys that a masked cell has too, but more of them.
  bool has_nan(int64_t l) const { return Order::is_float && all.n_last[l] > 0; }

  void sift_keys(Sifted& found, int64_t l, const K* keys, int64_t n, K* taken, int64_t most_inside) const {
    if constexpr (Order::is_float) found.n_last[l] += count_keys(keys, n, order.nan_key, order.nan_key).at_low;
    for (int64_t q = 0; q < asked.n_shares; ++q) {
      const int64_t b = l * asked.n_shares + q;
      const Bracket<K>& ends = brackets[b];
      if (!ends.is_open) continue;
      found.counts[b].add(count_keys(keys, n, ends.low, ends.high));
      if (found.overfull[b] || ends.low >= ends.high || ends.low + 1 == ends.high) continue;
      const int64_t n_taken = take_keys(keys, n, static_cast<K>(ends.low + 1), static_cast<K>(ends.high - 1), taken);
      found.overfull[b] = found.inside[b].size + n_taken > most_inside;
      if (!found.overfull[b]) found.inside[b].add(taken, n_taken);
    }
  }

  const Order order;
  const Asked asked;
  const int64_t lanes;
  Sifted all;
  Rank<K>* const ranks;
  Bracket<K>* const brackets;
  Pile<K>* const samples;
  bool is_bracketed = false, is_counted = false;
};

Search* search_of(Dtype dtype, const Asked& asked, int64_t lanes) {
  return with_order<false>(dtype, [&](const auto& order) -> Search* {
    return new OrderSearch<std::decay_t<decltype(order)>>(order, asked, lanes);
  });
}

}  // namespace

void median(const Block& block, const Options& options, void* values_ptr, int64_t* count_ptr) {
  quantiles(block, median_asked(options), static_cast<double*>(values_ptr), count_ptr);
}

void quantile(const Block& block, const Options& options, void* values_ptr, int64_t* count_ptr) {
  quantiles(block, quantile_asked(options), static_cast<double*>(values_ptr), count_ptr);
}

Search* median_search(Dtype dtype, const Options& options, int64_t lanes) {
  return search_of(dtype, median_asked(options), lanes);
}

Search* quantile_search(Dtype dtype, const Options& options, int64_t lanes) {
  return search_of(dtype, quantile_asked(options), lanes);
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
