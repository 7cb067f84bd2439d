// The first and the last valid cell of each slice. A search ends where it has found one; the count reads the whole mask.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {

bool count(const Block&, const Options&, const Parts&);

namespace {

#include "tiles.hpp"

constexpr int64_t n_few_rows = 16;     // up to which all are looked at: a branch that is guessed wrong takes longer
constexpr int64_t n_between_looks = 8;  // rows

// Lanes are `lane_step` apart, rows `row_step`, which is negative where the last row is looked for; -1 for none.
NEVER_INLINE void find_across(const unsigned char* first_ptr, int64_t lanes, int64_t given_step, int64_t rows,
                              int64_t row_step, int64_t* __restrict at) {
  const int64_t lane_step = given_step;
  for (int64_t l = 0; l < lanes; ++l) at[l] = -1;
  for (int64_t r = 0; r < rows; ++r) {
    const unsigned char* const keep_ptr = first_ptr + r * row_step;
    if (lane_step == 1) {
      for (int64_t l = 0; l < lanes; ++l) at[l] = at[l] < 0 && keep_ptr[l] ? r : at[l];
    } else {
      for (int64_t l = 0; l < lanes; ++l) at[l] = at[l] < 0 && keep_ptr[l * lane_step] ? r : at[l];
    }
    if (rows <= n_few_rows || r % n_between_looks != n_between_looks - 1) continue;
    int64_t missing = 0;
    for (int64_t l = 0; l < lanes; ++l) missing |= at[l] < 0;
    if (!missing) return;
  }
}

// Along one row of bytes, eight at a time.
template <bool is_last>
int64_t find_along(const unsigned char* keep_ptr, int64_t n) {
  int64_t done = 0;
  for (; done + 8 <= n; done += 8) {
    uint64_t eight;
    std::memcpy(&eight, keep_ptr + (is_last ? n - done - 8 : done), sizeof eight);
    if (eight) break;
  }
  for (; done < n; ++done) {
    if (keep_ptr[is_last ? n - 1 - done : done]) return done;
  }
  return -1;
}

// The same of a compact mask: some rows of bytes at a time, until each lane has one.
template <bool is_last>
void find_in_compact(const Block& block, const Window& given, int64_t* at) {
  alignas(64) unsigned char keep[n_tile];
  const int64_t lanes = given.lanes(), most_rows = n_tile / lanes < 64 ? n_tile / lanes : 64;
  Window w = given;
  int64_t missing = lanes;
  for (int64_t l = 0; l < lanes; ++l) at[l] = -1;
  for (int64_t done = 0; done < block.n && missing; done += w.rows) {
    w.rows = least(most_rows, block.n - done), w.i = is_last ? block.n - done - w.rows : done;
    const unsigned char* const keep_ptr = gather_mask(block.mask, w, keep);
    for (int64_t r = 0; r < w.rows; ++r) {
      const unsigned char* const row_ptr = keep_ptr + (is_last ? w.rows - 1 - r : r) * lanes;
      for (int64_t l = 0; l < lanes; ++l) at[l] = at[l] < 0 && row_ptr[l] ? done + r : at[l];
    }
    missing = 0;
    for (int64_t l = 0; l < lanes; ++l) missing |= at[l] < 0;
  }
}

// How many rows lie before the first valid one, or after the last one.
template <bool is_last>
void find_ends(const Block& block, const Window& w, int64_t* at) {
  const Operand& mask = block.mask;
  if (mask.compact_ptr) return find_in_compact<is_last>(block, w, at);
  if (!mask.cells_ptr) {
    for (int64_t l = 0; l < w.lanes(); ++l) at[l] = block.n > 0 ? 0 : -1;
    return;
  }
  const int64_t first_row = is_last ? block.n - 1 : 0, row_step = is_last ? -mask.stride_n : mask.stride_n;
  const unsigned char* const group_ptr = mask.cells_ptr + w.o * mask.stride_outer + w.c * mask.stride_inner;
  if (w.columns == 1 && mask.stride_n == 1 && block.n > n_few_rows) {
    for (int64_t g = 0; g < w.groups; ++g) at[g] = find_along<is_last>(group_ptr + g * mask.stride_outer, block.n);
    return;
  }
  const unsigned char* const first_ptr = group_ptr + first_row * mask.stride_n;
  if (w.columns == 1) return find_across(first_ptr, w.groups, mask.stride_outer, block.n, row_step, at);
  for (int64_t g = 0; g < w.groups; ++g) {
    find_across(first_ptr + g * mask.stride_outer, w.columns, mask.stride_inner, block.n, row_step, at + g * w.columns);
  }
}

template <class Raw>
void take(const Block& block, const Window& w, const int64_t* row, void* part_ptr) {
  const Operand& data = block.data;
  Raw* const out = static_cast<Raw*>(part_ptr) + w.o * block.inner + w.c;
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int64_t c = 0; c < w.columns; ++c) {
      const int64_t l = g * w.columns + c, i = row[l] < 0 ? 0 : row[l];
      Raw raw{0};
      if (block.n > 0) {
        const int64_t at = (w.o + g) * data.stride_outer + i * data.stride_n + (w.c + c) * data.stride_inner;
        std::memcpy(&raw, data.cells_ptr + at * static_cast<int64_t>(sizeof raw), sizeof raw);
      }
      out[l] = row[l] < 0 ? Raw{0} : raw;
    }
  }
}

struct EndsRoom {
  alignas(64) unsigned char keep[n_tile];
  alignas(64) int64_t count[n_tile_lanes], row[n_tile_lanes];
};

// The counts of a mask whose strides have no walk at full speed.
void count_windows(const Block& block, const Parts& parts) {
  const std::unique_ptr<EndsRoom> room(new EndsRoom);
  each_window(block, block.leaf, [&](Window& w) {
    for (int64_t l = 0; l < w.lanes(); ++l) room->count[l] = 0;
    each_leaf(block, w, [&] { count_window(gather_keep(block, w, room->keep), w, room->count); });
    write_lanes(block, w, room->count, parts.count_ptr);
  });
}

void take_ends(const Block& block, const Window& w, const int64_t* row, const Parts& parts) {
  switch (cell_bytes(block.dtype)) {
    case 8: return take<uint64_t>(block, w, row, parts.part_ptr[0]);
    case 4: return take<uint32_t>(block, w, row, parts.part_ptr[0]);
    case 2: return take<uint16_t>(block, w, row, parts.part_ptr[0]);
    default: return take<uint8_t>(block, w, row, parts.part_ptr[0]);
  }
}

// Of the numbers alone: which they are is known when all cells have been read.
template <bool is_last>
bool end_numbers(const Block& block, const Parts& parts) {
  const std::unique_ptr<EndsRoom> room(new EndsRoom);
  each_window(block, block.leaf, [&](Window& w) {
    const int64_t lanes = w.lanes();
    for (int64_t l = 0; l < lanes; ++l) room->count[l] = 0, room->row[l] = -1;
    each_leaf(block, w, [&] {
      const unsigned char* const keep_ptr = gather_keep(block, w, room->keep);
      count_window(keep_ptr, w, room->count);
      for (int64_t r = 0; r < w.rows; ++r) {
        for (int64_t l = 0; l < lanes; ++l) {
          const bool is_end = keep_ptr[r * lanes + l] && (is_last || room->row[l] < 0);
          room->row[l] = is_end ? w.i + r : room->row[l];
        }
      }
    });
    write_lanes(block, w, room->count, parts.count_ptr);
    take_ends(block, w, room->row, parts);
  });
  return true;
}

template <bool is_last>
bool end_cells(const Block& block, const Options& options, const Parts& parts) {
  if (block.omits_nan) return end_numbers<is_last>(block, parts);
  if (!count(block, options, Parts{parts.count_ptr, {}})) count_windows(block, parts);
  alignas(64) int64_t row[n_tile_lanes];
  each_window(block, block.leaf, [&](const Window& w) {
    find_ends<is_last>(block, w, row);
    if (is_last) {
      for (int64_t l = 0; l < w.lanes(); ++l) row[l] = row[l] < 0 ? -1 : block.n - 1 - row[l];
    }
    take_ends(block, w, row, parts);
  });
  return true;
}

}  // namespace

bool first(const Block& block, const Options& options, const Parts& parts) {
  return end_cells<false>(block, options, parts);
}
bool last(const Block& block, const Options& options, const Parts& parts) {
  return end_cells<true>(block, options, parts);
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
