// What every kernel starts from. The kernels are compiled once for each instruction set (CMakeLists.txt), with the same
// bits from each: plain additions in a fixed tree, no fused multiply-add, no reassociation.
//
// Everything lives in a namespace of the instruction set, and no inline function of the standard library is called
// that the linker could share: it would keep one copy of it, perhaps the one for AVX-512, for every processor.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "block.hpp"

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define NEVER_INLINE __attribute__((noinline))

namespace maskserve {
namespace MASKSERVE_ISA {

// The valid cells that are no NaN.
bool count_numbers(const Block& block, const Parts& parts);

// Rows [i, i + rows) of the groups [o, o + groups) x the columns [c, c + columns).
struct Window {
  int64_t o = 0, groups = 1, i = 0, rows = 0, c = 0, columns = 0;
  int64_t lanes() const { return groups * columns; }
  int64_t cells() const { return rows * lanes(); }
};

enum class Walk { dense, columns };

// A window's cells and which of them count, null where all do: both start at the window, and are walked as `walk` says.
struct Leaf {
  Walk walk;
  int64_t most_rows;
  Window tile;
  Operand data, keep;
};

// ---- totals.cpp: what variances share with sums ---------------------------------------------------------------------

void count_leaf(const Leaf& leaf, int64_t* count);

// Sums over counts, or 1 where there is none; of i64 rounded towards 0.
void leaf_means(Dtype dtype, const Leaf& leaf, const int64_t* count, double* mean);
void leaf_means_of_doubles(const Leaf& leaf, const int64_t* count, double* mean);  // cells of shorter dtypes, gathered

// ---- tiles.cpp: what all kernels gather and write, compiled once for each instruction set ---------------------------

// The bytes of `n` cells of a compact mask, side by side from one on.
void spread_mask(const Operand& mask, int64_t at, int64_t n, unsigned char* out);

// How many of `n` cells of a compact mask count, side by side from one on.
int64_t count_run(const Operand& mask, int64_t at, int64_t n);

// What the cells of a window say together: `some` may be said of any window.
enum class Kept { none, some, all };
Kept kept_of(const Operand& mask, const Window& w);

// The mask of a window as dense bytes: where they lie, or copied to `copy_ptr`; null without a mask.
const unsigned char* gather_mask(const Operand& mask, const Window& w, unsigned char* copy_ptr);

// Bytes 0 for NaN, 1 for all else.
void gather_numbers(Dtype dtype, const Operand& data, const Window& w, unsigned char* out);

// Which cells of a window count, as dense bytes: its mask, and no NaN where those are omitted; null where all do.
const unsigned char* gather_keep(const Block& block, const Window& w, unsigned char* copy_ptr);

// The same of a mask and what gather_numbers() found.
void combine_keep(const unsigned char* mask_ptr, const unsigned char* numbers_ptr, int64_t n, unsigned char* out);

// The cells of a window as doubles; what lies under the mask is `hidden`.
void gather_doubles(Dtype dtype, const Operand& data, const Window& w, const unsigned char* keep_ptr, double hidden,
                    double* out);

// The same as floats, of cells that are no wider.
void gather_floats(Dtype dtype, const Operand& data, const Window& w, const unsigned char* keep_ptr, float hidden,
                   float* out);

// The integer cells of a window; what lies under the mask is `hidden`.
void gather_integers(const Block& block, const Window& w, const unsigned char* keep_ptr, int64_t hidden, int64_t* out);

// count[lane] += the bytes of its rows, each 0 or 1.
void count_lanes(const unsigned char* bytes_ptr, int64_t n_cells, int64_t lanes, int64_t* count);

void write_mask(const Filled& filled, const Window& w, const unsigned char* keep_ptr);

// Doubles rounded once to the dtype of the result, hidden cells 0, and their validity, unless `filled` has no mask;
// whether a finite cell became inf.
bool write_doubles(const Filled& filled, const Window& w, const double* cells, const unsigned char* keep_ptr,
                   bool may_overflow = true);

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

ALWAYS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The number of a window's first cell in an operand, and where it lies.
ALWAYS_INLINE int64_t first_cell(const Operand& operand, const Window& w) {
  return w.o * operand.stride_outer + w.i * operand.stride_n + w.c * operand.stride_inner;
}
ALWAYS_INLINE const unsigned char* window_ptr(const Operand& operand, const Window& w, int64_t cell_bytes) {
  return operand.cells_ptr + first_cell(operand, w) * cell_bytes;
}

// visit(first cell, cells) for runs of a window's cells, group by group and row by row, in as long ones as can be, until
// one is answered with false; false where neighbours do not lie side by side.
template <class Visit>
ALWAYS_INLINE bool each_dense_run(const Operand& mask, const Window& w, const Visit& visit) {
  if (w.columns != 1 && mask.stride_inner != 1) return false;
  const int64_t first = first_cell(mask, w), n_group = w.rows * w.columns;
  const bool are_groups = w.rows == 1 || mask.stride_n == w.columns;
  if (are_groups && (w.groups == 1 || mask.stride_outer == n_group)) return visit(first, w.cells()), true;
  const int64_t n_runs = are_groups ? 1 : w.rows, n = are_groups ? n_group : w.columns;
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int64_t i = 0; i < n_runs; ++i) {
      if (!visit(first + g * mask.stride_outer + i * mask.stride_n, n)) return true;
    }
  }
  return true;
}

// Whether a cell of a mask counts.
ALWAYS_INLINE unsigned char mask_cell(const Operand& mask, int64_t at) {
  if (!mask.compact_ptr) return mask.cells_ptr[at];
  unsigned char cell;
  spread_mask(mask, at, 1, &cell);
  return cell;
}

#include "states.hpp"

#include "cells.hpp"

}  // namespace
}  // namespace MASKSERVE_ISA
}  // namespace maskserve
