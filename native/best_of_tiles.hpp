// The best cells, smallest and largest, of lanes whose keys were gathered: any layout.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

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
inline int64_t most_key_rows(const Block& block) {
  return least(4096, n_tile / least(block.inner + 1, n_tile_lanes));
}

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
    for (int64_t l = 0; l < lanes; ++l) {
      lane.best[l] = key.hidden, lane.at[l] = lane.count[l] = 0, lane.found[l] = false;
    }
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
