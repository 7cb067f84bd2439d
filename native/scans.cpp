// Running sums: one cell after the other in a leaf, one leaf after the other.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "narrow.hpp"

struct ScanRoom {
  alignas(64) double cells[n_tile];
  alignas(64) int64_t integers[n_tile];
  alignas(64) unsigned char keep[n_tile];
  // of each lane: inside the leaf, and of the leaves before it
  alignas(64) double inside[n_tile_lanes], inside_error[n_tile_lanes];
  alignas(64) double before[n_tile_lanes], before_error[n_tile_lanes], leaf_errors[n_tile_lanes];
  alignas(64) int64_t running[n_tile_lanes];
};

// Slices that are long and lie one after the other.
bool has_long_rows(const Block& block) { return block.inner == 1 && block.n > n_short_group; }

// Four such slices are walked at once: an addition waits for the one before it.
template <class Visit>
void each_scan_window(const Block& block, const Visit& visit) {
  if (!has_long_rows(block)) return each_window(block, block.leaf, visit);
  Window window;
  window.columns = 1;
  for (window.o = 0; window.o < block.outer; window.o += 4) {
    window.groups = least(4, block.outer - window.o);
    visit(window);
  }
}

NEVER_INLINE void run_plain(ScanRoom& room, int64_t rows, int64_t lanes) {
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

constexpr int64_t n_rows_at_once = 8;  // an addition waits for the one before it, of the same row

// The rows of (n_rows, n), each a slice.
template <int n_rows>
NEVER_INLINE void run_rows(double* cells, int64_t n, double* before) {
  double inside[n_rows] = {};
  for (int64_t j = 0; j < n; ++j) {
    for (int k = 0; k < n_rows; ++k) {
      inside[k] += cells[k * n + j];
      cells[k * n + j] = inside[k] + before[k];
    }
  }
  for (int k = 0; k < n_rows; ++k) before[k] += inside[k];
}

// Rows as they lie: nothing is turned. A fill status.
int scan_rows(ScanRoom& room, const Block& block, const Filled& filled) {
  const int64_t most = least(n_rows_at_once, n_tile / least(block.leaf, block.n));
  const unsigned char* keep_ptr[n_rows_at_once];
  int status = fill_done;
  Window w;
  w.columns = 1;
  for (int64_t o = 0; o < block.outer; o += most) {
    const int64_t n_rows = least(most, block.outer - o);
    for (int64_t k = 0; k < n_rows; ++k) room.before[k] = 0.0;
    for (w.i = 0; w.i < block.n; w.i += block.leaf) {
      const int64_t n = w.rows = least(block.leaf, block.n - w.i);
      for (int64_t k = 0; k < n_rows; ++k) {
        w.o = o + k;
        keep_ptr[k] = gather_keep(block, w, room.keep + k * n);
        gather_doubles(block.dtype, block.data, w, keep_ptr[k], 0.0, room.cells + k * n);
      }
      int64_t k = 0;
      for (; k + 8 <= n_rows; k += 8) run_rows<8>(room.cells + k * n, n, room.before + k);
      for (; k + 4 <= n_rows; k += 4) run_rows<4>(room.cells + k * n, n, room.before + k);
      for (; k < n_rows; ++k) run_rows<1>(room.cells + k * n, n, room.before + k);
      for (k = 0; k < n_rows; ++k) {
        w.o = o + k;
        if (write_doubles(filled, w, room.cells + k * n, keep_ptr[k])) status = fill_overflowed;
      }
    }
  }
  return status;
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
  gather_integers(block, w, keep_ptr, 0, room.integers);
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

int cumulative_sum(const Block& block, const Options&, const Filled& filled) {
  const std::unique_ptr<ScanRoom> room(new ScanRoom);
  const bool is_plain = !is_integer(block.dtype) && block.dtype != Dtype::f64;
  if (is_plain && has_long_rows(block) && block.data.stride_n == 1) return scan_rows(*room, block, filled);
  int status = fill_done;
  each_scan_window(block, [&](Window& w) {
    const int64_t lanes = w.lanes();
    for (int64_t l = 0; l < lanes; ++l) {
      room->before[l] = room->before_error[l] = room->leaf_errors[l] = 0.0;
      room->running[l] = 0;
    }
    for (w.i = 0; w.i < block.n && status != fill_refused; w.i += block.leaf) {
      w.rows = least(block.leaf, block.n - w.i);
      const unsigned char* const keep_ptr = gather_keep(block, w, room->keep);
      if (is_integer(block.dtype)) {
        if (!scan_integers(*room, block, filled, w, keep_ptr)) status = fill_refused;
        continue;
      }
      gather_doubles(block.dtype, block.data, w, keep_ptr, 0.0, room->cells);
      if (block.dtype != Dtype::f64) {
        run_plain(*room, w.rows, lanes);
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
