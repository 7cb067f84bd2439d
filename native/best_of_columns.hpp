// The best cells of columns, rows as they lie: no key is written, and a row is read in long runs.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

constexpr int64_t n_strip = 1024;  // columns side by side
constexpr int64_t n_fold_rows = 4;  // rows for each step of what is best so far
constexpr int64_t n_group_rows = 124;  // a multiple of n_fold_rows whose row numbers fit an int8, and counts a byte
constexpr int64_t n_spread_rows = 32;  // of a group under a compact mask, whose bytes then stay in L1

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
  if (!block.mask.cells_ptr) return 0;
  int64_t i = 0;
  while (i < block.n - 1 && !mask_cell(block.mask, o * block.mask.stride_outer + i * block.mask.stride_n + c)) ++i;
  return i;
}

// The mask of some rows of a strip: where it lies, or spread out; null where all of their cells count.
inline Rows keep_rows(const Operand& mask, const Window& w, Kept kept, unsigned char* copy_ptr) {
  if (!mask.cells_ptr || kept == Kept::all) return {nullptr, nullptr, 0, 0};
  if (!mask.compact_ptr) return {nullptr, window_ptr(mask, w, 1), 0, mask.stride_n};
  return {nullptr, gather_mask(mask, w, copy_ptr), 0, w.columns};
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
  std::unique_ptr<unsigned char[]> keep_copy;
  if (block.mask.compact_ptr) keep_copy.reset(new unsigned char[n_spread_rows * n_strip]);
  const int64_t most_rows = keep_copy ? n_spread_rows : n_group_rows;
  constexpr int64_t cell_bytes = sizeof(typename Key::Raw);
  for (int64_t o = 0; o < block.outer; ++o) {
    for (int64_t c = 0; c < block.inner; c += n_strip) {
      const int64_t columns = least(n_strip, block.inner - c), result = o * block.inner + c;
      int64_t* const count_ptr = parts.count_ptr + result;
      for (int64_t l = 0; l < columns; ++l) {
        room->best[l] = key.hidden, room->at[l] = -1, count_ptr[l] = 0;
      }
      for (int64_t i = 0; i < block.n; i += most_rows) {
        const Window w{o, 1, i, least(most_rows, block.n - i), c, columns};
        const Kept kept = kept_of(block.mask, w);
        if (kept == Kept::none) continue;
        for (int64_t l = 0; l < columns; ++l) group.best[l] = key.hidden, group.row[l] = 0, group.count[l] = 0;
        Rows rows = keep_rows(block.mask, w, kept, keep_copy.get());
        rows.cells_ptr = window_ptr(block.data, w, cell_bytes), rows.stride = block.data.stride_n;
        const bool is_masked = rows.keep_ptr;
        better_group<with_at>(rows, w.rows, columns, key, group);
        for (int64_t l = 0; with_at && l < columns; ++l) {
          room->at[l] = level<Key>(group.best[l]) > level<Key>(room->best[l]) ? i + group.row[l] : room->at[l];
        }
        for (int64_t l = 0; l < columns; ++l) {
          room->best[l] = group.best[l] > room->best[l] ? group.best[l] : room->best[l];
        }
        for (int64_t l = 0; l < columns; ++l) count_ptr[l] += is_masked ? group.count[l] : w.rows;
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
