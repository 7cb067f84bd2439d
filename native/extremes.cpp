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

#include "best_of_tiles.hpp"

#include "best_of_columns.hpp"

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

// ---- states that are joined -----------------------------------------------------------------------------------------

// The right side's cell is taken where it is better, not where it is as good: so the first place is kept, and of zeros
// that are equal by place the one that is better as a value.
template <class Key>
void merge_best(const States& left, const States& right, const Key& key, const Parts& both) {
  using Raw = typename Key::Raw;
  const auto* const left_best = static_cast<const Raw*>(left.part_ptr[0]);
  const auto* const right_best = static_cast<const Raw*>(right.part_ptr[0]);
  Raw* const best = static_cast<Raw*>(both.part_ptr[0]);
#pragma GCC ivdep
  for (int64_t i = 0; i < left.n; ++i) {
    const auto a = key(left_best[i]), b = key(right_best[i]);
    best[i] = key.cell(b > a ? b : a);
    both.count_ptr[i] = left.count_ptr[i] + right.count_ptr[i];
  }
}

template <class Key>
void merge_first(const States& left, const States& right, const Key& key, const Parts& both) {
  using Raw = typename Key::Raw;
  const auto* const left_best = static_cast<const Raw*>(left.part_ptr[0]);
  const auto* const right_best = static_cast<const Raw*>(right.part_ptr[0]);
  const auto* const left_at = static_cast<const int64_t*>(left.part_ptr[1]);
  const auto* const right_at = static_cast<const int64_t*>(right.part_ptr[1]);
  Raw* const best = static_cast<Raw*>(both.part_ptr[0]);
  int64_t* const at = static_cast<int64_t*>(both.part_ptr[1]);
#pragma GCC ivdep
  for (int64_t i = 0; i < left.n; ++i) {
    const int64_t left_count = left.count_ptr[i], right_count = right.count_ptr[i];
    const bool is_better = level<Key>(key(right_best[i])) > level<Key>(key(left_best[i]));
    const bool is_taken = (right_count > 0) & ((left_count == 0) | is_better);
    best[i] = choose<Raw>(static_cast<Raw>(-static_cast<Raw>(is_taken)), right_best[i], left_best[i]);
    at[i] = is_taken ? right_at[i] : left_at[i];
    both.count_ptr[i] = left_count + right_count;
  }
}

void merge_extremes(const States& left, const States& right, Dtype dtype, bool largest, const Parts& both) {
  with_key(dtype, largest, [&](const auto& key) {
    both.part_ptr[1] ? merge_first(left, right, key, both) : merge_best(left, right, key, both);
  });
}

}  // namespace

void merge_largest(const States& left, const States& right, Dtype dtype, const Parts& both) {
  merge_extremes(left, right, dtype, true, both);
}
void merge_smallest(const States& left, const States& right, Dtype dtype, const Parts& both) {
  merge_extremes(left, right, dtype, false, both);
}

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
