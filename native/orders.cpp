// Slices in order: sort, topk, ranks, the mode and how many cells differ. Valid cells are sorted with their places, so
// that equal ones keep their order; masked ones are not sorted at all. NaN is beyond inf, -0 equals +0.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "narrow.hpp"

#include "keys.hpp"

#include "order.hpp"

#include "slices.hpp"

// ---- a key and its place --------------------------------------------------------------------------------------------

// In one number, where the key has at most 32 bits.
template <int n_bits>
struct Narrow {
  static constexpr bool is_wide = false;
  static constexpr int n_key_bits = n_bits;
  static constexpr int place_bits = 31;
  static constexpr int64_t step = int64_t{1} << place_bits;
  int64_t both;
  static ALWAYS_INLINE Narrow of(int64_t placed, int64_t place) { return {placed + place}; }
  ALWAYS_INLINE int64_t key() const { return both >> place_bits; }
  ALWAYS_INLINE int64_t place() const { return both & (step - 1); }
  ALWAYS_INLINE uint64_t ordered() const {  // the key, from 0
    return static_cast<uint64_t>(key() + (int64_t{1} << (n_key_bits - 1)));
  }
  ALWAYS_INLINE bool operator<(Narrow other) const { return both < other.both; }
};

struct Wide {
  static constexpr bool is_wide = true;
  static constexpr int n_key_bits = 64;
  int64_t its_key, its_place;
  static ALWAYS_INLINE Wide of(int64_t key, int64_t place) { return {key, place}; }
  ALWAYS_INLINE int64_t key() const { return its_key; }
  ALWAYS_INLINE int64_t place() const { return its_place; }
  ALWAYS_INLINE uint64_t ordered() const {
    return static_cast<uint64_t>(its_key) ^ (uint64_t{1} << 63);
  }
  ALWAYS_INLINE bool operator<(Wide other) const {
    return its_key < other.its_key || (its_key == other.its_key && its_place < other.its_place);
  }
};

// ---- sorting --------------------------------------------------------------------------------------------------------

// Stable, the lowest digits first; where the result lies, in `items` or in `room`.
template <int width, class Item>
NEVER_INLINE Item* sort_by_digits(Item* items, int64_t n, Item* room) {
  constexpr int n_digits = (Item::n_key_bits + width - 1) / width;
  constexpr uint64_t most = (uint64_t{1} << width) - 1;
  uint32_t firsts[n_digits][most + 1] = {};
  for (int64_t j = 0; j < n; ++j) {
    const uint64_t key = items[j].ordered();
    for (int d = 0; d < n_digits; ++d) ++firsts[d][(key >> (d * width)) & most];
  }
  Item *from = items, *to = room;
  for (int d = 0; d < n_digits; ++d) {
    const int shift = d * width;
    const uint64_t some = (from[0].ordered() >> shift) & most;
    if (firsts[d][some] == static_cast<uint32_t>(n)) continue;  // one digit in all keys
    uint32_t before = 0;
    for (uint64_t k = 0; k <= most; ++k) {
      const uint32_t own = firsts[d][k];
      firsts[d][k] = before;
      before += own;
    }
    for (int64_t j = 0; j < n; ++j) {
      const Item item = from[j];
      to[firsts[d][(item.ordered() >> shift) & most]++] = item;
    }
    Item* const next = from;
    from = to, to = next;
  }
  return from;
}

constexpr int64_t n_inserted = 40;          // items up to which insertion is fastest
constexpr int64_t n_wide_digits = 1 << 12;  // from which fewer digits pay for more counters

template <class Item>
NEVER_INLINE Item* sort_items(Item* items, int64_t n, Item* room) {
  if (n <= n_inserted) {
    sort_few(items, n);
    return items;
  }
  return n < n_wide_digits ? sort_by_digits<8>(items, n, room) : sort_by_digits<11>(items, n, room);
}

// The first k in order, in any order, moved to the front of `room`.
template <int n_bits>
void first_items(const Narrow<n_bits>* items, int64_t n, int64_t k, Narrow<n_bits>* room) {
  const int64_t* const keys = reinterpret_cast<const int64_t*>(items);
  Pile<int64_t> some(n + 1);
  const int64_t last = nth_key(keys, n, k - 1, some.items);
  take_keys(keys, n, std::numeric_limits<int64_t>::min(), last, some.items);  // no two are equal
  std::memcpy(room, some.items, static_cast<size_t>(k) * sizeof *room);
}

inline void first_items(const Wide* items, int64_t n, int64_t k, Wide* room) {
  Pile<int64_t> keys(n), some(n + 1);
  for (int64_t j = 0; j < n; ++j) keys.items[j] = items[j].its_key;
  const int64_t last = nth_key(keys.items, n, k - 1, some.items);
  int64_t n_equal = k - count_keys(keys.items, n, last, last).below, taken = 0;
  for (int64_t j = 0; j < n && taken < k; ++j) {
    const bool is_equal = items[j].its_key == last;
    if (items[j].its_key < last || (is_equal && n_equal > 0)) room[taken++] = items[j];
    n_equal -= is_equal;
  }
}

constexpr int64_t place_step = Narrow<32>::step;

// Keys with room for their places; one of 64 bits leaves none, and its place stands apart.
template <class Order>
struct Placed {
  static constexpr bool is_wide = sizeof(typename Order::Out) == 8;
  using Raw = typename Order::Raw;
  using Out = int64_t;
  using Bits = uint64_t;
  Order order;
  int64_t flip;  // -1 for the largest first
  int64_t hidden = is_wide ? std::numeric_limits<int64_t>::max() : int64_t{1} << 62;  // the other keys have 32 bits
  ALWAYS_INLINE int64_t operator()(Raw raw) const {
    return (static_cast<int64_t>(order(raw)) ^ flip) * (is_wide ? 1 : place_step);
  }
};

NEVER_INLINE void gather_placed(const Block& block, const Window& w, const unsigned char* keep_ptr, int64_t flip,
                                int64_t* out) {
  with_order<true>(block.dtype, [&](const auto& order) {
    gather(block.data, w, keep_ptr, Placed<std::decay_t<decltype(order)>>{order, flip}, out);
  });
}

// visit(an item) of the kind that holds a dtype's cells.
template <class Visit>
void with_items(Dtype dtype, const Visit& visit) {
  switch (cell_bytes(dtype)) {
    case 8: return visit(Wide());
    case 4: return visit(Narrow<32>());
    default: return visit(Narrow<16>());
  }
}

inline NEVER_INLINE void exchange_pairs(int64_t* low_keys, int64_t* given_keys, int64_t* low_rows, int64_t* given_rows,
                                        int64_t n) {
  int64_t *const high_keys = given_keys, *const high_rows = given_rows;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    const int64_t a = low_keys[j], b = high_keys[j], row = low_rows[j], other = high_rows[j];
    const bool is_later = (a > b) | ((a == b) & (row > other));
    low_keys[j] = is_later ? b : a, high_keys[j] = is_later ? a : b;
    low_rows[j] = is_later ? other : row, high_rows[j] = is_later ? row : other;
  }
}

struct NetworkRoom {
  alignas(64) int64_t both[n_tile];
  alignas(64) int64_t rows[n_network_cells];  // of keys of 64 bits
  alignas(64) unsigned char keep[n_tile];
  int64_t n_valid[n_tile_lanes];
};

// The items of all slices of a window in order.
NEVER_INLINE void sort_window(const Block& block, const Window& w, int64_t flip, NetworkRoom& room) {
  const int64_t lanes = w.lanes();
  int64_t *const both = room.both, *const rows = room.rows;
  const unsigned char* const keep_ptr = gather_keep(block, w, room.keep);
  gather_placed(block, w, keep_ptr, flip, both);
  for (int64_t l = 0; l < lanes; ++l) room.n_valid[l] = 0;
  count_window(keep_ptr, w, room.n_valid);
  if (cell_bytes(block.dtype) < 8) {
    for (int64_t r = 1; r < w.rows; ++r) {
      for (int64_t l = r * lanes; l < (r + 1) * lanes; ++l) both[l] += r;
    }
    return sort_columns(both, w.rows, lanes);
  }
  for (int64_t r = 0; r < w.rows; ++r) {
    for (int64_t l = r * lanes; l < (r + 1) * lanes; ++l) rows[l] = r;
  }
  for (int64_t j = 0; keep_ptr && j < w.cells(); ++j) rows[j] += n_network * (1 - keep_ptr[j]);
  merge_exchange(w.rows, [=](int64_t row, int64_t other, int64_t n) {
    exchange_pairs(both + row * lanes, both + other * lanes, rows + row * lanes, rows + other * lanes, n * lanes);
  });
}

template <class Visit>
void each_sorted_window(const Block& block, int64_t flip, const Visit& visit) {
  const std::unique_ptr<NetworkRoom> room(new NetworkRoom);
  each_whole_window(block, n_network_cells / 2, n_tile_lanes, [&](const Window& w) {
    sort_window(block, w, flip, *room);
    visit(w, *room);
  });
}

// visit(o, c, items in order, how many valid cells): the first k of them at least.
template <class Item, class Visit>
void each_sorted_slice(const Block& block, bool descending, int64_t k, const Visit& visit) {
  const int64_t flip = descending ? -1 : 0;
  if (block.n <= n_network) {
    Item items[n_network];
    return each_sorted_window(block, flip, [&](const Window& w, const NetworkRoom& room) {
      for (int64_t l = 0; l < w.lanes(); ++l) {
        for (int64_t r = 0; r < w.rows; ++r) {
          const int64_t j = r * w.lanes() + l;
          if constexpr (Item::is_wide) {
            items[r] = {room.both[j], room.rows[j]};
          } else {
            items[r] = {room.both[j]};
          }
        }
        visit(w.o + l / w.columns, w.c + l % w.columns, items, room.n_valid[l]);
      }
    });
  }
  Pile<Item> room(block.n + 1);
  const auto load = [&](const Window& w, int64_t* placed) { gather_placed(block, w, nullptr, flip, placed); };
  const auto make = [](int64_t placed, int64_t row) { return Item::of(placed, row); };
  each_slice<Item, int64_t>(block, load, make, [&](int64_t o, int64_t c, Item* items, int64_t n) {
    if (k <= 0 || k > n / 4) return visit(o, c, sort_items(items, n, room.items), n);
    first_items(items, n, k, room.items);
    visit(o, c, sort_items(room.items, k, items), n);
  });
}

// ---- what is made of them -------------------------------------------------------------------------------------------

// A slice of the result, where it goes or on its way there.
struct Line {
  unsigned char *values_ptr, *mask_ptr;
  int64_t stride;
  template <class T>
  ALWAYS_INLINE void set(int64_t r, T value, bool is_valid) const {
    std::memcpy(values_ptr + 8 * r * stride, &value, 8);
    if (mask_ptr) mask_ptr[r * stride] = is_valid;
  }
};

// The slices of a result: long ones side by side wait for each other and are written row by row.
class Lines {
 public:
  Lines(const Block& block, const Filled& given, int64_t given_rows)
      : filled(given), inner(block.inner), rows(given_rows),
        columns(block.n > n_network ? least(block.inner, n_side_by_side) : 1),
        pitch(given_rows + 9), values(columns > 1 ? columns * pitch * 8 : 0), keep(columns > 1 ? columns * pitch : 0) {}

  Line line(int64_t o, int64_t c) const {
    if (columns > 1) return {values.items + c % columns * pitch * 8, keep.items + c % columns * pitch, 1};
    const int64_t first = first_of(o, c);
    return {filled.values_ptr + 8 * first, filled.mask_ptr ? filled.mask_ptr + first : nullptr, filled.values.stride_n};
  }

  void written(int64_t o, int64_t c) const {
    if (columns == 1 || (c % columns < columns - 1 && c < inner - 1)) return;
    const int64_t n = c % columns + 1, step = filled.values.stride_inner;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = first_of(o, c - n + 1) + r * filled.values.stride_n;
      for (int64_t k = 0; k < n; ++k) {
        std::memcpy(filled.values_ptr + 8 * (first + k * step), values.items + 8 * (k * pitch + r), 8);
        if (filled.mask_ptr) filled.mask_ptr[first + k * step] = keep.items[k * pitch + r];
      }
    }
  }

 private:
  int64_t first_of(int64_t o, int64_t c) const {
    return o * filled.values.stride_outer + c * filled.values.stride_inner;
  }

  const Filled& filled;
  const int64_t inner, rows, columns, pitch;  // pitch: no power of two, whose multiples share a place in the cache
  Pile<unsigned char> values, keep;
};

void fill_short_places(const Block& block, bool descending, int64_t rows, const Filled& filled) {
  const bool is_wide = cell_bytes(block.dtype) == 8;
  each_sorted_window(block, descending ? -1 : 0, [&](const Window& given, NetworkRoom& room) {
    Window w = given;
    w.rows = rows;
    const int64_t lanes = w.lanes();
    for (int64_t j = 0; !is_wide && j < w.cells(); ++j) room.both[j] &= place_step - 1;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t l = 0; l < lanes; ++l) room.keep[r * lanes + l] = r < room.n_valid[l];
    }
    write_mask(filled, w, room.keep);
    narrow_cells<ToI64>(filled, w, is_wide ? room.rows : room.both, room.keep);
  });
}

int fill_places(const Block& block, bool descending, int64_t k, const Filled& filled) {
  if (k == 0 || block.n == 0) return fill_done;
  const int64_t rows = k > 0 ? k : block.n;
  if (block.n <= n_network) {
    fill_short_places(block, descending, rows, filled);
    return fill_done;
  }
  with_items(block.dtype, [&](auto item) {
    const Lines lines(block, filled, rows);
    each_sorted_slice<decltype(item)>(block, descending, k, [&](int64_t o, int64_t c, const auto* items, int64_t n) {
      const Line line = lines.line(o, c);
      const int64_t n_valid = least(n, rows);
      for (int64_t r = 0; r < n_valid; ++r) line.set(r, items[r].place(), true);
      for (int64_t r = n_valid; r < rows; ++r) line.set(r, int64_t{0}, false);
      lines.written(o, c);
    });
  });
  return fill_done;
}

enum Method { average, lowest, highest, dense, ordinal };  // as in method_names

// visit(first, last + 1) of each run of equal keys.
template <class Item, class Visit>
ALWAYS_INLINE void each_run_of_equals(const Item* items, int64_t n, const Visit& visit) {
  for (int64_t first = 0; first < n;) {
    int64_t stop = first + 1;
    while (stop < n && items[stop].key() == items[first].key()) ++stop;
    visit(first, stop);
    first = stop;
  }
}

template <class Item>
void write_ranks(const Item* items, int64_t n, Method method, const Line& line) {
  int64_t n_runs = 0;
  each_run_of_equals(items, n, [&](int64_t first, int64_t stop) {
    ++n_runs;
    const double same = method == average  ? static_cast<double>(first + 1 + stop) / 2.0
                        : method == lowest ? static_cast<double>(first + 1)
                        : method == dense  ? static_cast<double>(n_runs)
                                           : static_cast<double>(stop);
    for (int64_t r = first; r < stop; ++r) {
      line.set(items[r].place(), method == ordinal ? static_cast<double>(r + 1) : same, true);
    }
  });
}

// The place of the first of the most frequent cells.
template <class Item>
int64_t mode_of(const Item* items, int64_t n) {
  int64_t best = 0, most = 0;
  each_run_of_equals(items, n, [&](int64_t first, int64_t stop) {
    if (stop - first > most) most = stop - first, best = items[first].place();
  });
  return best;
}

template <class Item>
int64_t distinct_of(const Item* items, int64_t n) {
  int64_t n_distinct = n > 0;
  for (int64_t r = 1; r < n; ++r) n_distinct += items[r].key() != items[r - 1].key();
  return n_distinct;
}

// of(items, n) for each slice, and its count.
template <class Of>
void select_sorted(const Block& block, void* values_ptr, int64_t* count_ptr, const Of& of) {
  int64_t* const values = static_cast<int64_t*>(values_ptr);
  if (block.n == 0) {
    for (int64_t j = 0; j < block.outer * block.inner; ++j) values[j] = count_ptr[j] = 0;
    return;
  }
  with_items(block.dtype, [&](auto item) {
    each_sorted_slice<decltype(item)>(block, false, -1, [&](int64_t o, int64_t c, const auto* items, int64_t n) {
      values[o * block.inner + c] = of(items, n);
      count_ptr[o * block.inner + c] = n;
    });
  });
}

}  // namespace

int sorted(const Block& block, const Options& options, const Filled& filled) {
  return fill_places(block, options.descending, -1, filled);
}

int top(const Block& block, const Options& options, const Filled& filled) {
  return fill_places(block, options.largest, options.k, filled);
}

int rank(const Block& block, const Options& options, const Filled& filled) {
  if (block.n == 0) return fill_done;
  const Method method = static_cast<Method>(options.method);
  const bool is_float = block.dtype <= Dtype::bf16;
  with_items(block.dtype, [&](auto item) {
    constexpr int64_t nan_key = std::numeric_limits<int64_t>::max() >> (64 - decltype(item)::n_key_bits);
    const Lines lines(block, filled, block.n);
    each_sorted_slice<decltype(item)>(block, false, -1, [&](int64_t o, int64_t c, const auto* items, int64_t n) {
      const Line line = lines.line(o, c);
      for (int64_t r = 0; n < block.n && r < block.n; ++r) line.set(r, 0.0, false);
      if (is_float && n > 0 && items[n - 1].key() == nan_key) {
        for (int64_t r = 0; r < n; ++r) line.set(items[r].place(), uint64_t{0x7ff8000000000000u}, true);
      } else {
        write_ranks(items, n, method, line);
      }
      lines.written(o, c);
    });
  });
  return fill_done;
}

void mode(const Block& block, const Options&, void* values_ptr, int64_t* count_ptr) {
  select_sorted(block, values_ptr, count_ptr, [](const auto* items, int64_t n) { return mode_of(items, n); });
}

void count_distinct(const Block& block, const Options&, void* values_ptr, int64_t* count_ptr) {
  select_sorted(block, values_ptr, count_ptr, [](const auto* items, int64_t n) { return distinct_of(items, n); });
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
