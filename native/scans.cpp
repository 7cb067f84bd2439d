// Running sums: one cell after the other in a leaf, one leaf after the other.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "narrow.hpp"

template <class Cell, class Signed>
struct ToInteger {
  using Raw = typename Cell::Raw;
  using Out = int64_t;
  using Bits = uint64_t;
  int64_t hidden = 0;
  ALWAYS_INLINE int64_t operator()(Raw raw) const { return static_cast<int64_t>(static_cast<Signed>(raw)); }
};

inline void gather_integers(const Block& block, const Window& w, const unsigned char* keep_ptr, int64_t* out) {
  switch (block.dtype) {
    case Dtype::i8: return gather(block.data, w, keep_ptr, ToInteger<I8Cell, int8_t>(), out);
    case Dtype::i16: return gather(block.data, w, keep_ptr, ToInteger<I16Cell, int16_t>(), out);
    case Dtype::i32: return gather(block.data, w, keep_ptr, ToInteger<I32Cell, int32_t>(), out);
    case Dtype::i64: return gather(block.data, w, keep_ptr, ToInteger<I64Cell, int64_t>(), out);
    default: return gather(block.data, w, keep_ptr, ToInteger<U8Cell, uint8_t>(), out);
  }
}

struct ScanRoom {
  alignas(64) double cells[n_tile];
  alignas(64) int64_t integers[n_tile];
  alignas(64) unsigned char keep[n_tile];
  // of each lane: inside the leaf, and of the leaves before it
  alignas(64) double inside[n_tile_lanes], inside_error[n_tile_lanes];
  alignas(64) double before[n_tile_lanes], before_error[n_tile_lanes], leaf_errors[n_tile_lanes];
  alignas(64) int64_t running[n_tile_lanes];
};

// Four slices that lie side by side are walked at once: an addition waits for the one before it.
template <class Visit>
void each_scan_window(const Block& block, const Visit& visit) {
  if (block.inner > 1 || block.n <= n_short_group) return each_window(block, block.leaf, visit);
  Window window;
  window.columns = 1;
  for (window.o = 0; window.o < block.outer; window.o += 4) {
    window.groups = least(4, block.outer - window.o);
    visit(window);
  }
}

template <int lanes_known>
NEVER_INLINE void run_plain(ScanRoom& room, int64_t rows, int64_t given_lanes) {
  const int64_t lanes = lanes_known ? lanes_known : given_lanes;
  double* __restrict cells = room.cells;
  double* __restrict inside = room.inside;
  double* __restrict before = room.before;
  for (int64_t l = 0; l < lanes; ++l) inside[l] = 0.0;
  for (int64_t r = 0; r < rows; ++r, cells += lanes) {
    for (int64_t l = 0; l < lanes; ++l) {
      inside[l] += cells[l];
      cells[l] = inside[l] + before[l];
    }
  }
  for (int64_t l = 0; l < lanes; ++l) before[l] += inside[l];
}

// Sum2 as a scan: rounding errors are summed alongside and added last. False where a sum is inf or NaN.
NEVER_INLINE bool run_pairs(ScanRoom& room, int64_t rows, int64_t lanes) {
  double* __restrict cells = room.cells;
  double *__restrict inside = room.inside, *__restrict inside_error = room.inside_error;
  double *__restrict before = room.before, *__restrict before_error = room.before_error;
  double* __restrict leaf_errors = room.leaf_errors;
  uint64_t lost = 0;
  for (int64_t l = 0; l < lanes; ++l) inside[l] = inside_error[l] = 0.0;
  for (int64_t r = 0; r < rows; ++r, cells += lanes) {
    for (int64_t l = 0; l < lanes; ++l) {
      const double sum = inside[l] + cells[l];
      inside_error[l] += rounding_error(inside[l], cells[l], sum);
      inside[l] = sum;
      const double total = before[l] + sum;
      const double error = rounding_error(before[l], sum, total);
      cells[l] = total + (error + ((before_error[l] + leaf_errors[l]) + inside_error[l]));
      lost |= !is_finite(cells[l]);
    }
  }
  for (int64_t l = 0; l < lanes; ++l) {
    const double sum = before[l] + inside[l];
    before_error[l] += rounding_error(before[l], inside[l], sum);
    before[l] = sum;
    leaf_errors[l] += inside_error[l];
  }
  return !lost;
}

// False where a sum leaves int64.
bool run_integers(ScanRoom& room, int64_t rows, int64_t lanes) {
  int64_t* cells = room.integers;
  bool lost = false;
  for (int64_t r = 0; r < rows; ++r, cells += lanes) {
    for (int64_t l = 0; l < lanes; ++l) {
      lost |= __builtin_add_overflow(room.running[l], cells[l], &room.running[l]);
      cells[l] = room.running[l];
    }
  }
  return !lost;
}

bool scan_integers(ScanRoom& room, const Block& block, const Filled& filled, const Window& w,
                   const unsigned char* keep_ptr) {
  gather_integers(block, w, keep_ptr, room.integers);
  if (!run_integers(room, w.rows, w.lanes())) return false;
  if (filled.dtype == Dtype::i64) {
    write_mask(filled, w, keep_ptr);
    narrow_cells<ToI64>(filled, w, room.integers, keep_ptr);
    return true;
  }
  for (int64_t j = 0; j < w.cells(); ++j) room.cells[j] = static_cast<double>(room.integers[j]);
  return !write_doubles(filled, w, room.cells, keep_ptr);
}

bool is_integer(Dtype dtype) { return dtype > Dtype::bf16; }

}  // namespace

int cumulative_sum(const Block& block, const Filled& filled) {
  const std::unique_ptr<ScanRoom> room(new ScanRoom);
  int status = fill_done;
  each_scan_window(block, [&](Window& w) {
    const int64_t lanes = w.lanes();
    for (int64_t l = 0; l < lanes; ++l) {
      room->before[l] = room->before_error[l] = room->leaf_errors[l] = 0.0;
      room->running[l] = 0;
    }
    for (w.i = 0; w.i < block.n && status != fill_refused; w.i += block.leaf) {
      w.rows = least(block.leaf, block.n - w.i);
      const unsigned char* const keep_ptr = gather_mask(block.mask, w, room->keep);
      if (is_integer(block.dtype)) {
        if (!scan_integers(*room, block, filled, w, keep_ptr)) status = fill_refused;
        continue;
      }
      gather_doubles(block.dtype, block.data, w, keep_ptr, 0.0, room->cells);
      if (block.dtype != Dtype::f64) {
        lanes == 4 ? run_plain<4>(*room, w.rows, lanes) : run_plain<0>(*room, w.rows, lanes);
      } else if (!run_pairs(*room, w.rows, lanes)) {
        status = fill_refused;
        continue;
      }
      if (write_doubles(filled, w, room->cells, keep_ptr)) status = fill_overflowed;
    }
  });
  return status;
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
