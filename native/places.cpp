// Cells that are taken from elsewhere in their slice: running extremes, and masked cells that are filled.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "keys.hpp"

#include "narrow.hpp"

#include "scan.hpp"

constexpr int64_t most_cells = int64_t{1} << 30;  // of a slice whose places are counted in 32 bits

// Places counted in 32 bits, as a result of int64.
struct ToPlace {
  using Raw = uint64_t;
  Raw narrow(int32_t place) const { return static_cast<Raw>(place); }
};

template <class Key>
struct FromKey {
  using Raw = typename Key::Raw;
  Key key;
  Raw flip;
  ALWAYS_INLINE Raw narrow(typename Key::Out k) const { return static_cast<Raw>(key.cell(k) ^ flip); }
};

// The bits of a cell, those of NaN canonical; of any dtype, by its width: the infinity of integers is beyond all.
template <class RawBits>
struct ToCell {
  using Raw = RawBits;
  using Out = Raw;
  using Bits = Raw;
  static constexpr Raw most = static_cast<Raw>(static_cast<Raw>(~Raw{0}) >> 1);
  Raw infinity;
  Out hidden = 0;
  ALWAYS_INLINE Out operator()(Raw raw) const {
    using Signed = std::make_signed_t<Raw>;
    const Raw magnitude = static_cast<Raw>(raw & most);
    const bool beyond = static_cast<Signed>(magnitude) > static_cast<Signed>(infinity);
    const Raw is_nan = static_cast<Raw>(-static_cast<Raw>(beyond));
    const Raw quiet = static_cast<Raw>(infinity | static_cast<Raw>(infinity & -infinity) >> 1);
    return choose<Raw>(is_nan, quiet, raw);
  }
};

// visit(the infinity of a dtype's cells).
template <class Visit>
void with_infinity(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::f64: return visit(uint64_t{0x7ff0000000000000u});
    case Dtype::f32: return visit(uint32_t{0x7f800000u});
    case Dtype::f16: return visit(uint16_t{0x7c00u});
    case Dtype::bf16: return visit(uint16_t{0x7f80u});
    default: break;
  }
  switch (cell_bytes(dtype)) {
    case 8: return visit(ToCell<uint64_t>::most);
    case 4: return visit(ToCell<uint32_t>::most);
    case 2: return visit(ToCell<uint16_t>::most);
    default: return visit(ToCell<uint8_t>::most);
  }
}

template <class RawBits>
struct Flipped {
  using Raw = RawBits;
  Raw flip;
  ALWAYS_INLINE Raw narrow(Raw raw) const { return static_cast<Raw>(raw ^ flip); }
};

Filled places_of(const Filled& filled) {
  Filled places = filled;
  places.values_ptr = filled.places_ptr, places.mask_ptr = nullptr;
  return places;
}

void write_places(const Filled& filled, const ScanTile& tile, const int32_t* places, const unsigned char* keep_ptr) {
  const Filled to = places_of(filled);
  each_part(to.values, tile, [&](const Window& w, int64_t at) {
    narrow_cells(to, w, places + at, from(keep_ptr, at), ToPlace());
  });
}

// ---- running extremes -----------------------------------------------------------------------------------------------

template <class Key>
struct ExtremesRoom {
  using K = typename Key::Out;
  alignas(64) K cells[n_tile];
  alignas(64) int32_t places[n_tile];
  alignas(64) unsigned char keep[n_tile];
  alignas(64) K best[n_tile_lanes];
  alignas(64) int32_t place[n_tile_lanes];
};

// The best key so far, the last of equal ones; -0 and +0, the keys -1 and 0, are equal.
template <class Key, bool has_places>
struct Extreme {
  using K = typename Key::Out;
  struct State {
    K best;
    int32_t place;
  };
  K *cells, *best;
  int32_t *places, *place;
  int32_t first;

  ALWAYS_INLINE State load(int64_t l) const { return {best[l], has_places ? place[l] : 0}; }
  ALWAYS_INLINE void store(int64_t l, State state) const {
    best[l] = state.best;
    if (has_places) place[l] = state.place;
  }
  ALWAYS_INLINE void operator()(State& state, int64_t at, int64_t row) const {
    const K cell = cells[at];
    const K least_best = Key::is_float ? static_cast<K>(state.best - (state.best == 0)) : state.best;
    const bool is_best = cell >= least_best;
    cells[at] = state.best = is_best ? cell : state.best;
    if (has_places) places[at] = state.place = is_best ? first + static_cast<int32_t>(row) : state.place;
  }
};

template <bool has_places, class Key>
void run_extremes(const Block& block, const Filled& filled, const Key& key, typename Key::Raw flip) {
  const std::unique_ptr<ExtremesRoom<Key>> room(new ExtremesRoom<Key>);
  const auto begin = [&](const ScanTile& tile) {
    for (int64_t l = 0; l < tile.w.lanes(); ++l) room->best[l] = key.hidden, room->place[l] = 0;
  };
  each_scan_tile(block, block.leaf, false, begin, [&](const ScanTile& tile) {
    const unsigned char* const keep_ptr = scan_keep(block, tile, room->keep);
    scan_cells(block, tile, keep_ptr, key, room->cells);
    run_scan(Extreme<Key, has_places>{room->cells, room->best, room->places, room->place,
                                      static_cast<int32_t>(tile.w.i)}, tile);
    write_scan_cells(filled, tile, room->cells, keep_ptr, FromKey<Key>{key, flip});
    if (has_places) write_places(filled, tile, room->places, keep_ptr);
  });
}

int cumulative_extreme(const Block& block, const Options& options, const Filled& filled, bool largest) {
  if (block.n >= most_cells) return fill_refused;
  with_key(block.dtype, largest, [&](const auto& key) {
    const auto flip = static_cast<decltype(key.flip)>(options.flip);
    if (filled.places_ptr) {
      run_extremes<true>(block, filled, key, flip);
    } else {
      run_extremes<false>(block, filled, key, flip);
    }
  });
  return fill_done;
}

// ---- fills ----------------------------------------------------------------------------------------------------------

template <class Raw>
struct FillRoom {
  alignas(64) Raw cells[n_tile];
  alignas(64) int32_t places[n_tile];
  alignas(64) unsigned char keep[n_tile], valid[n_tile];
  alignas(64) Raw latest[n_tile_lanes];
  alignas(64) int32_t age[n_tile_lanes];
};

// The latest valid cell, unless more masked ones than the limit have come since.
template <class Raw, bool has_places>
struct Latest {
  struct State {
    Raw cell;
    int32_t age;
  };
  Raw *cells, *latest;
  int32_t *places, *ages;
  const unsigned char* keep_ptr;
  unsigned char* valid;
  int32_t limit, first, sign;  // sign: a place is that many rows before, or after

  ALWAYS_INLINE State load(int64_t l) const { return {latest[l], ages[l]}; }
  ALWAYS_INLINE void store(int64_t l, State state) const { latest[l] = state.cell, ages[l] = state.age; }
  ALWAYS_INLINE void operator()(State& state, int64_t at, int64_t row) const {
    const unsigned char keep = keep_ptr[at];  // no branch: it would be mispredicted at every third cell
    state.cell = choose<Raw>(static_cast<Raw>(-static_cast<Raw>(keep)), cells[at], state.cell);
    state.age = (state.age + 1) & (static_cast<int32_t>(keep) - 1);
    cells[at] = state.cell;
    valid[at] = state.age <= limit;
    if (has_places) places[at] = first + static_cast<int32_t>(row) - sign * state.age;
  }
};

template <bool has_places, class Raw>
NEVER_INLINE void run_latest(const Block& block, const Options& options, const Filled& filled, Raw infinity,
                             bool backwards) {
  const std::unique_ptr<FillRoom<Raw>> room(new FillRoom<Raw>);
  const ToCell<Raw> to_cell{infinity};
  const Flipped<Raw> flipped{static_cast<Raw>(options.flip)};
  const int32_t limit = static_cast<int32_t>(least(options.limit, most_cells - 1));
  const auto begin = [&](const ScanTile& tile) {
    for (int64_t l = 0; l < tile.w.lanes(); ++l) room->latest[l] = 0, room->age[l] = static_cast<int32_t>(most_cells);
  };
  each_scan_tile(block, block.leaf, backwards, begin, [&](const ScanTile& tile) {
    const unsigned char* keep_ptr = scan_keep(block, tile, room->keep);
    if (!keep_ptr) keep_ptr = static_cast<unsigned char*>(std::memset(room->keep, 1, sizeof room->keep));
    scan_cells(block, tile, nullptr, to_cell, room->cells);
    run_scan(Latest<Raw, has_places>{room->cells, room->latest, room->places, room->age, keep_ptr, room->valid, limit,
                                     static_cast<int32_t>(tile.w.i), backwards ? -1 : 1}, tile);
    const unsigned char* const valid_ptr = filled.mask_ptr ? room->valid : nullptr;
    write_scan_cells(filled, tile, room->cells, valid_ptr, flipped);
    if (has_places) write_places(filled, tile, room->places, valid_ptr);
  });
}

int fill_along(const Block& block, const Options& options, const Filled& filled, bool backwards) {
  if (block.n >= most_cells) return fill_refused;
  with_infinity(block.dtype, [&](auto infinity) {
    if (filled.places_ptr) {
      run_latest<true>(block, options, filled, infinity, backwards);
    } else {
      run_latest<false>(block, options, filled, infinity, backwards);
    }
  });
  return fill_done;
}

template <class Raw>
NEVER_INLINE void run_fill(const Block& block, const Options& options, const Filled& filled, Raw infinity) {
  const std::unique_ptr<FillRoom<Raw>> room(new FillRoom<Raw>);
  const ToCell<Raw> to_cell{infinity, static_cast<Raw>(options.value ^ options.flip)};
  const Flipped<Raw> flipped{static_cast<Raw>(options.flip)};
  std::memset(room->valid, 1, sizeof room->valid);
  const unsigned char* const valid_ptr = filled.mask_ptr ? room->valid : nullptr;
  each_scan_tile(block, block.leaf, false, [](const ScanTile&) {}, [&](const ScanTile& tile) {
    scan_cells(block, tile, scan_keep(block, tile, room->keep), to_cell, room->cells);
    each_part(filled.values, tile, [&](const Window& w, int64_t at) {
      write_mask(filled, w, from(valid_ptr, at));
      narrow_cells(filled, w, room->cells + at, nullptr, flipped);
    });
  });
}

}  // namespace

int cumulative_largest(const Block& block, const Options& options, const Filled& filled) {
  return cumulative_extreme(block, options, filled, true);
}
int cumulative_smallest(const Block& block, const Options& options, const Filled& filled) {
  return cumulative_extreme(block, options, filled, false);
}
int fill_forward(const Block& block, const Options& options, const Filled& filled) {
  return fill_along(block, options, filled, false);
}
int fill_backward(const Block& block, const Options& options, const Filled& filled) {
  return fill_along(block, options, filled, true);
}
int fill_value(const Block& block, const Options& options, const Filled& filled) {
  with_infinity(block.dtype, [&](auto infinity) { run_fill(block, options, filled, infinity); });
  return fill_done;
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
