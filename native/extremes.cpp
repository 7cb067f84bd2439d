// Largest and smallest valid cells, where they are first, and how many cells are nonzero: exact, in any order.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "keys.hpp"

// The key by which an index is found: -0 and +0, the keys -1 and 0, are equal there.
template <class Key>
ALWAYS_INLINE typename Key::Out level(typename Key::Out key) {
  using K = typename Key::Out;
  if constexpr (Key::is_float) return key == K{-1} ? K{0} : key;
  return key;
}

template <class Key>
struct Best {
  using K = typename Key::Out;
  alignas(64) K best[n_tile_lanes];
  alignas(64) int64_t at[n_tile_lanes];
  alignas(64) int64_t count[n_tile_lanes];
  bool found[n_tile_lanes];
};

// The keys of one tile, searched.
template <class Key>
struct TileBest {
  using K = typename Key::Out;
  alignas(64) K pattern[n_tile_lanes];
  alignas(64) K chunk_of[n_tile_lanes];
  alignas(64) K best[n_tile_lanes];

  NEVER_INLINE void search(const K* __restrict keys, int64_t n_cells, int64_t lanes, K hidden) {
    const int64_t period = period_of(lanes);
    for (int64_t j = 0; j < period; ++j) pattern[j] = hidden;
    K* const to = pattern;
    each_cell(n_cells, period, [to, keys](int64_t p, int64_t j) { to[p] = keys[j] > to[p] ? keys[j] : to[p]; });
    if (lanes == 1) {
      for (int64_t half = n_tile_lanes / 2; half > 0; half /= 2) {
        for (int64_t j = 0; j < half; ++j) pattern[j] = pattern[j + half] > pattern[j] ? pattern[j + half] : pattern[j];
      }
      best[0] = pattern[0];
      return;
    }
    for (int64_t l = 0; l < lanes; ++l) best[l] = pattern[l];
    for (int64_t k = lanes; k < period; k += lanes) {
      for (int64_t l = 0; l < lanes; ++l) best[l] = pattern[k + l] > best[l] ? pattern[k + l] : best[l];
    }
  }

  // Which chunk, a run of `period` cells, has the lane's best first; -1 for none.
  NEVER_INLINE void locate(const K* __restrict keys, int64_t n_cells, int64_t lanes) {
    const int64_t period = period_of(lanes);
    spread(best, lanes, period, pattern);
    for (int64_t j = 0; j < period; ++j) pattern[j] = level<Key>(pattern[j]), chunk_of[j] = -1;
    K* const to = chunk_of;
    const K* const wanted = pattern;
    for (int64_t chunk = (n_cells - 1) / period; chunk >= 0; --chunk) {
      const K number = static_cast<K>(chunk);
      const int64_t n = least(period, n_cells - chunk * period);
      const K* const from = keys + chunk * period;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) to[j] = level<Key>(from[j]) == wanted[j] ? number : to[j];
    }
  }

  int64_t first_row(int64_t lane, int64_t lanes) const {
    const int64_t period = period_of(lanes), rows = period / lanes;
    int64_t first = -1;
    for (int64_t k = 0; k < rows; ++k) {
      const int64_t chunk = chunk_of[k * lanes + lane];
      if (chunk >= 0 && (first < 0 || chunk * rows + k < first)) first = chunk * rows + k;
    }
    return first;
  }
};

// As many as a tile has room for: at most 128 runs of a period, so that the number of one is an int8.
inline int64_t most_key_rows(const Block& block) { return least(4096, n_tile / least(block.inner + 1, n_tile_lanes)); }

template <class Key>
NEVER_INLINE bool best_cells(const Block& block, const Parts& parts, const Key& key) {
  using K = typename Key::Out;
  struct Room {
    alignas(64) K keys[n_tile];
    alignas(64) unsigned char keep[n_tile];
    Best<Key> lanes;
    TileBest<Key> tile;
  };
  const std::unique_ptr<Room> room(new Room);
  Best<Key>& lane = room->lanes;
  TileBest<Key>& tile = room->tile;
  const bool with_at = parts.part_ptr[1] != nullptr;
  const int64_t most_rows = most_key_rows(block);
  each_window(block, most_rows, [&](Window& w) {
    const int64_t lanes = w.lanes();
    for (int64_t l = 0; l < lanes; ++l) lane.best[l] = key.hidden, lane.at[l] = lane.count[l] = 0, lane.found[l] = false;
    for (w.i = 0; w.i < block.n; w.i += most_rows) {
      w.rows = least(most_rows, block.n - w.i);
      const unsigned char* const keep_ptr = gather_keep(block, w, room->keep);
      gather(block.data, w, keep_ptr, key, room->keys);
      tile.search(room->keys, w.cells(), lanes, key.hidden);
      int64_t better = 0, worst = 0;
      for (int64_t l = 0; l < lanes; ++l) {
        better |= level<Key>(tile.best[l]) > level<Key>(lane.best[l]);
        worst |= tile.best[l] == key.hidden && !lane.found[l];
      }
      if (with_at && better) {
        tile.locate(room->keys, w.cells(), lanes);
        for (int64_t l = 0; l < lanes; ++l) {
          if (level<Key>(tile.best[l]) <= level<Key>(lane.best[l])) continue;
          lane.at[l] = w.i + tile.first_row(l, lanes), lane.found[l] = true;
        }
      }
      for (int64_t l = 0; l < lanes; ++l) lane.best[l] = tile.best[l] > lane.best[l] ? tile.best[l] : lane.best[l];
      if (with_at && worst) {  // the first cell may be as bad as a masked one, and still be the first
        for (int64_t l = 0; l < lanes; ++l) {
          for (int64_t r = 0; r < w.rows && !lane.found[l] && lane.best[l] == key.hidden; ++r) {
            const int64_t j = r * lanes + l;
            if (keep_ptr && !keep_ptr[j]) continue;
            lane.found[l] = true, lane.at[l] = w.i + r;
          }
        }
      }
      count_window(keep_ptr, w, lane.count);
    }
    typename Key::Raw* const best = static_cast<typename Key::Raw*>(parts.part_ptr[0]) + w.o * block.inner + w.c;
    for (int64_t l = 0; l < lanes; ++l) best[l] = key.cell(lane.best[l]);
    write_lanes(block, w, lane.count, parts.count_ptr);
    if (with_at) write_lanes(block, w, lane.at, parts.part_ptr[1]);
  });
  return true;
}

// The smallest and the largest cells of one walk.
template <class Key>
NEVER_INLINE bool range_cells(const Block& block, const Parts& parts, const Key& high_key) {
  using K = typename Key::Out;
  struct Room {
    alignas(64) K keys[n_tile];
    alignas(64) unsigned char keep[n_tile];
    alignas(64) K best[2][n_tile_lanes];
    alignas(64) int64_t count[n_tile_lanes];
    TileBest<Key> tile;
  };
  const std::unique_ptr<Room> room(new Room);
  Key low_key = high_key;  // what stands for a masked cell is the same in both orders
  low_key.flip = static_cast<typename Key::Raw>(~high_key.flip);
  const Key keys[2] = {low_key, high_key};
  const int64_t most_rows = most_key_rows(block);
  each_window(block, most_rows, [&](Window& w) {
    const int64_t lanes = w.lanes();
    for (int64_t l = 0; l < lanes; ++l) room->best[0][l] = room->best[1][l] = high_key.hidden, room->count[l] = 0;
    for (w.i = 0; w.i < block.n; w.i += most_rows) {
      w.rows = least(most_rows, block.n - w.i);
      const unsigned char* const keep_ptr = gather_keep(block, w, room->keep);
      for (int k = 0; k < 2; ++k) {
        gather(block.data, w, keep_ptr, keys[k], room->keys);
        room->tile.search(room->keys, w.cells(), lanes, high_key.hidden);
        const K* const found = room->tile.best;
        K* const best = room->best[k];
        for (int64_t l = 0; l < lanes; ++l) best[l] = found[l] > best[l] ? found[l] : best[l];
      }
      count_window(keep_ptr, w, room->count);
    }
    for (int k = 0; k < 2; ++k) {
      auto* const best = static_cast<typename Key::Raw*>(parts.part_ptr[k]) + w.o * block.inner + w.c;
      for (int64_t l = 0; l < lanes; ++l) best[l] = keys[k].cell(room->best[k][l]);
    }
    write_lanes(block, w, room->count, parts.count_ptr);
  });
  return true;
}

// ---- the best cells of columns: rows as they lie ---------------------------------------------------------------------

constexpr int64_t n_strip = 1024;  // columns side by side
constexpr int64_t n_fold_rows = 4;  // rows for each step of what is best so far
constexpr int64_t n_group_rows = 124;  // a multiple of n_fold_rows whose row numbers fit an int8, and counts a byte

// Strides: in cells of the data, in bytes of the mask.
struct Rows {
  const unsigned char* cells_ptr;
  const unsigned char* keep_ptr;
  int64_t stride, keep_stride;
};

// The best of some columns of a group of rows, and the rows where they are first.
template <class Key>
struct GroupBest {
  using K = typename Key::Out;
  alignas(64) K best[n_strip];
  alignas(64) K row[n_strip];
  alignas(64) uint8_t count[n_strip];
};

template <int n_rows, bool is_masked, bool with_at, class Key>
NEVER_INLINE void better_rows(const Rows& rows, int64_t first_row, int64_t columns, const Key& given,
                              GroupBest<Key>& group) {
  using Raw = typename Key::Raw;
  using K = typename Key::Out;
  const Key key = given;
  const unsigned char *const cells_ptr = rows.cells_ptr, *const keep_ptr = rows.keep_ptr;
  const int64_t row_bytes = rows.stride * static_cast<int64_t>(sizeof(Raw)), keep_stride = rows.keep_stride;
  const K first = static_cast<K>(first_row);
  K *const best = group.best, *const row = group.row;
#pragma GCC ivdep
  for (int64_t c = 0; c < columns; ++c) {
    K found = best[c], at = with_at ? row[c] : K{0};
    for (int r = 0; r < n_rows; ++r) {
      Raw raw;
      std::memcpy(&raw, cells_ptr + r * row_bytes + c * static_cast<int64_t>(sizeof raw), sizeof raw);
      K k = key(raw);
      if constexpr (is_masked) {
        const Raw keep = static_cast<Raw>(-static_cast<Raw>(keep_ptr[r * keep_stride + c]));
        k = static_cast<K>(choose<Raw>(keep, static_cast<Raw>(k), static_cast<Raw>(key.hidden)));
      }
      if constexpr (with_at) at = level<Key>(k) > level<Key>(found) ? static_cast<K>(first + r) : at;
      found = k > found ? k : found;
    }
    best[c] = found;
    if constexpr (with_at) row[c] = at;
  }
}

template <bool with_at, class Key>
void better_group(Rows rows, int64_t n, int64_t columns, const Key& key, GroupBest<Key>& group) {
  const int64_t row_bytes = rows.stride * static_cast<int64_t>(sizeof(typename Key::Raw));
  for (int64_t i = 0; i < n;) {
    const int64_t some = n - i < n_fold_rows ? 1 : n_fold_rows;
    for (int64_t r = n_fold_rows; r < n_fold_rows + some; ++r) {  // the next rows, of which the processor knows nothing
      prefetch(rows.cells_ptr + r * row_bytes, columns * static_cast<int64_t>(sizeof(typename Key::Raw)));
      if (rows.keep_ptr) prefetch(rows.keep_ptr + r * rows.keep_stride, columns);
    }
    if (some == n_fold_rows) {
      rows.keep_ptr ? better_rows<n_fold_rows, true, with_at>(rows, i, columns, key, group)
                    : better_rows<n_fold_rows, false, with_at>(rows, i, columns, key, group);
    } else {
      rows.keep_ptr ? better_rows<1, true, with_at>(rows, i, columns, key, group)
                    : better_rows<1, false, with_at>(rows, i, columns, key, group);
    }
    for (int64_t r = 0; rows.keep_ptr && r < some; ++r, rows.keep_ptr += rows.keep_stride) {
      const unsigned char* const keep_ptr = rows.keep_ptr;
      for (int64_t c = 0; c < columns; ++c) group.count[c] = static_cast<uint8_t>(group.count[c] + keep_ptr[c]);
    }
    rows.cells_ptr += some * row_bytes, i += some;
  }
}

bool are_columns(const Block& block) {
  const bool mask_fits = !block.mask.cells_ptr || block.mask.stride_inner == 1;
  return block.inner >= 64 && block.data.stride_inner == 1 && mask_fits && !block.omits_nan;
}

// The first valid cell of a column all of whose valid cells are as bad as masked ones.
int64_t first_valid(const Block& block, int64_t o, int64_t c) {
  const unsigned char* keep_ptr = block.mask.cells_ptr;
  if (!keep_ptr) return 0;
  keep_ptr += o * block.mask.stride_outer + c;
  int64_t i = 0;
  while (i < block.n - 1 && !keep_ptr[i * block.mask.stride_n]) ++i;
  return i;
}

template <bool with_at, class Key>
NEVER_INLINE bool best_columns(const Block& block, const Parts& parts, const Key& key) {
  using K = typename Key::Out;
  struct Room {
    GroupBest<Key> group;
    alignas(64) K best[n_strip];
    alignas(64) int64_t at[n_strip];
  };
  const std::unique_ptr<Room> room(new Room);
  GroupBest<Key>& group = room->group;
  const bool is_masked = block.mask.cells_ptr;
  constexpr int64_t cell_bytes = sizeof(typename Key::Raw);
  for (int64_t o = 0; o < block.outer; ++o) {
    for (int64_t c = 0; c < block.inner; c += n_strip) {
      const int64_t columns = least(n_strip, block.inner - c), result = o * block.inner + c;
      int64_t* const count_ptr = parts.count_ptr + result;
      for (int64_t l = 0; l < columns; ++l) {
        room->best[l] = key.hidden, room->at[l] = -1, count_ptr[l] = is_masked ? 0 : block.n;
      }
      for (int64_t i = 0; i < block.n; i += n_group_rows) {
        for (int64_t l = 0; l < columns; ++l) group.best[l] = key.hidden, group.row[l] = 0, group.count[l] = 0;
        Rows rows{block.data.cells_ptr + (o * block.data.stride_outer + i * block.data.stride_n + c) * cell_bytes,
                  nullptr, block.data.stride_n, block.mask.stride_n};
        if (is_masked) rows.keep_ptr = block.mask.cells_ptr + o * block.mask.stride_outer + i * block.mask.stride_n + c;
        better_group<with_at>(rows, least(n_group_rows, block.n - i), columns, key, group);
        for (int64_t l = 0; with_at && l < columns; ++l) {
          room->at[l] = level<Key>(group.best[l]) > level<Key>(room->best[l]) ? i + group.row[l] : room->at[l];
        }
        for (int64_t l = 0; l < columns; ++l) {
          room->best[l] = group.best[l] > room->best[l] ? group.best[l] : room->best[l];
        }
        for (int64_t l = 0; is_masked && l < columns; ++l) count_ptr[l] += group.count[l];
      }
      auto* const out = static_cast<typename Key::Raw*>(parts.part_ptr[0]) + result;
      for (int64_t l = 0; l < columns; ++l) out[l] = key.cell(room->best[l]);
      if (!with_at) continue;
      auto* const at = static_cast<int64_t*>(parts.part_ptr[1]) + result;
      for (int64_t l = 0; l < columns; ++l) {
        const bool is_found = room->at[l] >= 0 || !count_ptr[l];
        at[l] = is_found ? (room->at[l] > 0 ? room->at[l] : 0) : first_valid(block, o, c + l);
      }
    }
  }
  return true;
}

bool extremes(const Block& block, const Parts& parts, bool largest) {
  return with_key(block.dtype, largest, [&](const auto& key) {
    if (!are_columns(block)) return best_cells(block, parts, key);
    return parts.part_ptr[1] ? best_columns<true>(block, parts, key) : best_columns<false>(block, parts, key);
  });
}

// ---- truths ---------------------------------------------------------------------------------------------------------

template <class RawBits>
struct ToTruth {
  using Raw = RawBits;
  using Out = uint8_t;
  using Bits = uint8_t;
  Raw magnitude;  // -0 is zero too
  uint8_t hidden = 0;
  ALWAYS_INLINE uint8_t operator()(Raw raw) const { return (raw & magnitude) != 0; }
};

template <class Raw>
NEVER_INLINE bool true_cells(const Block& block, const Parts& parts, Raw magnitude) {
  struct Room {
    alignas(64) unsigned char truths[n_tile];
    alignas(64) unsigned char keep[n_tile];
    alignas(64) int64_t trues[n_tile_lanes];
    alignas(64) int64_t count[n_tile_lanes];
  };
  const std::unique_ptr<Room> room(new Room);
  const int64_t most_rows = most_key_rows(block);
  each_window(block, most_rows, [&](Window& w) {
    for (int64_t l = 0; l < w.lanes(); ++l) room->trues[l] = room->count[l] = 0;
    for (w.i = 0; w.i < block.n; w.i += most_rows) {
      w.rows = least(most_rows, block.n - w.i);
      const unsigned char* const keep_ptr = gather_keep(block, w, room->keep);
      gather(block.data, w, keep_ptr, ToTruth<Raw>{magnitude}, room->truths);
      count_lanes(room->truths, w.cells(), w.lanes(), room->trues);
      count_window(keep_ptr, w, room->count);
    }
    write_lanes(block, w, room->count, parts.count_ptr);
    write_lanes(block, w, room->trues, parts.part_ptr[0]);
  });
  return true;
}

}  // namespace

bool count_numbers(const Block& block, const Parts& parts) {
  alignas(64) unsigned char keep[n_tile];
  alignas(64) int64_t count[n_tile_lanes];
  const int64_t most_rows = most_key_rows(block);
  each_window(block, most_rows, [&](Window& w) {
    for (int64_t l = 0; l < w.lanes(); ++l) count[l] = 0;
    for (w.i = 0; w.i < block.n; w.i += most_rows) {
      w.rows = least(most_rows, block.n - w.i);
      count_window(gather_keep(block, w, keep), w, count);
    }
    write_lanes(block, w, count, parts.count_ptr);
  });
  return true;
}

bool largest(const Block& block, const Options&, const Parts& parts) { return extremes(block, parts, true); }
bool smallest(const Block& block, const Options&, const Parts& parts) { return extremes(block, parts, false); }

bool extent(const Block& block, const Options&, const Parts& parts) {
  return with_key(block.dtype, true, [&](const auto& key) { return range_cells(block, parts, key); });
}

bool truths(const Block& block, const Options&, const Parts& parts) {
  switch (block.dtype) {
    case Dtype::f64: return true_cells<uint64_t>(block, parts, ~uint64_t{0} >> 1);
    case Dtype::f32: return true_cells<uint32_t>(block, parts, 0x7fffffffu);
    case Dtype::f16:
    case Dtype::bf16: return true_cells<uint16_t>(block, parts, 0x7fff);
    case Dtype::i8:
    case Dtype::u8:
    case Dtype::boolean: return true_cells<uint8_t>(block, parts, 0xff);
    case Dtype::i16: return true_cells<uint16_t>(block, parts, 0xffff);
    case Dtype::i32: return true_cells<uint32_t>(block, parts, 0xffffffffu);
    case Dtype::i64: return true_cells<uint64_t>(block, parts, ~uint64_t{0});
  }
  return false;
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
