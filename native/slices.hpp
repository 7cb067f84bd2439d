// Whole slices: windows with all their rows, or the valid cells of one slice after the other.
// Included inside the namespace of one instruction set.

constexpr int64_t n_network = 96;          // cells of a slice up to which a network beats other ways
constexpr int64_t n_network_cells = 8192;  // of a tile, which stays in L1

// visit(window) over all results of a block, all rows at once, `most_cells` cells or one lane.
template <class Visit>
void each_whole_window(const Block& block, int64_t most_cells, int64_t most_lanes, const Visit& visit) {
  if (block.outer == 0 || block.inner == 0) return;
  most_lanes = least(most_lanes, most_cells / (block.n > 0 ? block.n : 1));
  most_lanes = most_lanes > 0 ? most_lanes : 1;
  const int64_t columns = least(block.inner, most_lanes);
  const int64_t groups = columns == block.inner ? most_lanes / columns : 1;
  Window w;
  w.rows = block.n;
  for (w.o = 0; w.o < block.outer; w.o += groups) {
    w.groups = least(groups, block.outer - w.o);
    for (w.c = 0; w.c < block.inner; w.c += columns) {
      w.columns = least(columns, block.inner - w.c);
      visit(w);
    }
  }
}

// item(key, row) of the valid cells of a lane, behind one another; how many.
template <class K, class Item, class Make>
int64_t keep_lane(const K* keys, const unsigned char* keep_ptr, int64_t first_row, int64_t rows, int64_t lanes,
                  const Make& make, Item* to) {
  if (!keep_ptr) {
    for (int64_t r = 0; r < rows; ++r) to[r] = make(keys[r * lanes], first_row + r);
    return rows;
  }
  int64_t n = 0;
  for (int64_t r = 0; r < rows; ++r) {
    to[n] = make(keys[r * lanes], first_row + r);
    n += keep_ptr[r * lanes];
  }
  return n;
}

constexpr int64_t n_side_by_side = 16;  // columns that share cache lines

// visit(o, c, the items of its valid cells, how many), one slice after the other; load(window, its keys).
template <class Item, class K, class Load, class Make, class Visit>
void each_slice(const Block& block, const Load& load, const Make& make, const Visit& visit) {
  if (block.outer == 0 || block.inner == 0) return;
  const int64_t columns = least(block.inner, n_side_by_side);
  const int64_t most_rows = least(block.n, n_tile / columns);
  struct Room {
    alignas(64) K keys[n_tile];
    alignas(64) unsigned char keep[n_tile];
  };
  const std::unique_ptr<Room> room(new Room);
  const int64_t lane_step = block.n + 1;
  Pile<Item> valid(lane_step * columns);
  Window w;
  for (w.o = 0; w.o < block.outer; ++w.o) {
    for (w.c = 0; w.c < block.inner; w.c += columns) {
      w.columns = least(columns, block.inner - w.c);
      int64_t n_valid[n_side_by_side] = {};
      for (w.i = 0; w.i < block.n; w.i += most_rows) {
        w.rows = least(most_rows, block.n - w.i);
        const unsigned char* const keep_ptr = gather_keep(block, w, room->keep);
        load(w, room->keys);
        for (int64_t l = 0; l < w.columns; ++l) {
          n_valid[l] += keep_lane(room->keys + l, keep_ptr ? keep_ptr + l : nullptr, w.i, w.rows, w.columns, make,
                                  valid.items + l * lane_step + n_valid[l]);
        }
      }
      for (int64_t l = 0; l < w.columns; ++l) visit(w.o, w.c + l, valid.items + l * lane_step, n_valid[l]);
    }
  }
}
