// The best cells of columns, rows as they lie: no key is written, and a row is read in long runs.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

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
NEVER_INLINE void better_cells(const Rows& rows, int64_t first_row, int64_t columns, const Key& given,
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

template <int n_rows>
NEVER_INLINE void count_rows(const unsigned char* keep_ptr, int64_t stride, int64_t columns, uint8_t* count) {
  for (int64_t c = 0; c < columns; ++c) {
    uint8_t kept = count[c];
    for (int r = 0; r < n_rows; ++r) kept = static_cast<uint8_t>(kept + (keep_ptr ? keep_ptr[r * stride + c] : 1));
    count[c] = kept;
  }
}

template <int n_rows, bool with_at, class Key>
void better_rows(const Rows& rows, int64_t first_row, int64_t columns, const Key& key, GroupBest<Key>& group) {
  rows.keep_ptr ? better_cells<n_rows, true, with_at>(rows, first_row, columns, key, group)
                : better_cells<n_rows, false, with_at>(rows, first_row, columns, key, group);
  count_rows<n_rows>(rows.keep_ptr, rows.keep_stride, columns, group.count);
}

// The mask of some rows of a strip: where it lies, or spread out; null where all of their cells count.
inline const unsigned char* keep_rows(const Operand& mask, const Window& w, Kept kept, unsigned char* copy_ptr) {
  if (!mask.cells_ptr || kept == Kept::all) return nullptr;
  return mask.compact_ptr ? gather_mask(mask, w, copy_ptr) : window_ptr(mask, w, 1);
}

template <bool with_at, class Key>
void better_group(const Block& block, const Window& given, const Key& key, GroupBest<Key>& group) {
  constexpr int64_t cell_bytes = sizeof(typename Key::Raw);
  const int64_t columns = given.columns;
  alignas(64) unsigned char copy[n_fold_rows * n_strip];  // few rows, which stay in L1
  Window w = given;
  for (int64_t i = 0; i < given.rows; i += w.rows) {
    w.i = given.i + i, w.rows = given.rows - i < n_fold_rows ? 1 : n_fold_rows;
    const bool is_compact = block.mask.compact_ptr;
    Rows rows{window_ptr(block.data, w, cell_bytes), nullptr, block.data.stride_n,
              is_compact ? columns : block.mask.stride_n};
    for (int64_t r = n_fold_rows; r < n_fold_rows + w.rows; ++r) {  // rows the processor knows nothing of
      prefetch(rows.cells_ptr + r * rows.stride * cell_bytes, columns * cell_bytes);
      if (block.mask.cells_ptr && !is_compact) prefetch(window_ptr(block.mask, w, 1) + r * rows.keep_stride, columns);
    }
    const Kept kept = kept_of(block.mask, w);
    if (kept == Kept::none) continue;
    rows.keep_ptr = keep_rows(block.mask, w, kept, copy);
    w.rows == 1 ? better_rows<1, with_at>(rows, i, columns, key, group)
                : better_rows<n_fold_rows, with_at>(rows, i, columns, key, group);
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
  for (int64_t o = 0; o < block.outer; ++o) {
    for (int64_t c = 0; c < block.inner; c += n_strip) {
      const int64_t columns = least(n_strip, block.inner - c), result = o * block.inner + c;
      int64_t* const count_ptr = parts.count_ptr + result;
      for (int64_t l = 0; l < columns; ++l) {
        room->best[l] = key.hidden, room->at[l] = -1, count_ptr[l] = 0;
      }
      for (int64_t i = 0; i < block.n; i += n_group_rows) {
        for (int64_t l = 0; l < columns; ++l) group.best[l] = key.hidden, group.row[l] = 0, group.count[l] = 0;
        better_group<with_at>(block, {o, 1, i, least(n_group_rows, block.n - i), c, columns}, key, group);
        for (int64_t l = 0; with_at && l < columns; ++l) {
          room->at[l] = level<Key>(group.best[l]) > level<Key>(room->best[l]) ? i + group.row[l] : room->at[l];
        }
        for (int64_t l = 0; l < columns; ++l) {
          room->best[l] = group.best[l] > room->best[l] ? group.best[l] : room->best[l];
        }
        for (int64_t l = 0; l < columns; ++l) count_ptr[l] += group.count[l];
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
