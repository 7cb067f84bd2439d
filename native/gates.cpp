// Cells kept or set to 0 by a mask or a reach, and the one made of the other: dense, one pass.

#include "common.hpp"

#include "pull.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

constexpr int64_t n_some = 2048;  // cells whose masks stay in L1

// What keeps a cell: a byte 0 or 1, or a bfloat16 whose bits, as a signed integer, are above 0.
struct OfMask {
  using Raw = uint8_t;
  static ALWAYS_INLINE uint8_t keep(Raw raw) { return raw; }
};

struct OfReach {
  using Raw = uint16_t;
  static ALWAYS_INLINE uint8_t keep(Raw raw) { return static_cast<int16_t>(raw) > 0; }
};

template <class Of>
NEVER_INLINE void bytes_of(const unsigned char* from_ptr, int64_t n, unsigned char* to_ptr) {
  for (int64_t j = 0; j < n; ++j) {
    typename Of::Raw raw;
    std::memcpy(&raw, from_ptr + j * static_cast<int64_t>(sizeof raw), sizeof raw);
    to_ptr[j] = Of::keep(raw);
  }
}

template <class Bits>
NEVER_INLINE void keep_bits(const unsigned char* from_ptr, const unsigned char* keep_ptr, int64_t n, unsigned char* to_ptr) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    Bits bits;
    std::memcpy(&bits, from_ptr + j * static_cast<int64_t>(sizeof bits), sizeof bits);
    bits = static_cast<Bits>(bits & static_cast<Bits>(-static_cast<Bits>(keep_ptr[j])));
    std::memcpy(to_ptr + j * static_cast<int64_t>(sizeof bits), &bits, sizeof bits);
  }
}

void keep_some(const unsigned char* from_ptr, const unsigned char* keep_ptr, int64_t cell_bytes, int64_t n,
               unsigned char* to_ptr) {
  switch (cell_bytes) {
    case 1: return keep_bits<uint8_t>(from_ptr, keep_ptr, n, to_ptr);
    case 2: return keep_bits<uint16_t>(from_ptr, keep_ptr, n, to_ptr);
    case 4: return keep_bits<uint32_t>(from_ptr, keep_ptr, n, to_ptr);
    default: return keep_bits<uint64_t>(from_ptr, keep_ptr, n, to_ptr);
  }
}

constexpr int64_t n_long = 4096;  // cells of a row from which on floats are added up as floats, in half the time

// Adds the squares of n cells to as many lanes.
template <class Cell, class Sum>
ALWAYS_INLINE void add_squares(const unsigned char* cells_ptr, int64_t n, Sum* lanes) {
  for (int64_t l = 0; l < n; ++l) {
    Cell cell;
    std::memcpy(&cell, cells_ptr + l * static_cast<int64_t>(sizeof cell), sizeof cell);
    lanes[l] += static_cast<Sum>(cell) * static_cast<Sum>(cell);
  }
}

template <class Cell, class Sum, int64_t n_lanes>
double longest_of(const unsigned char* cells_ptr, int64_t rows, int64_t n) {
  constexpr int64_t cell_bytes = sizeof(Cell);
  const int64_t whole = n - n % n_lanes;
  Sum most = 0;
  for (int64_t r = 0; r < rows; ++r, cells_ptr += n * cell_bytes) {
    Sum lanes[n_lanes] = {};
    for (int64_t j = 0; j < whole; j += n_lanes) add_squares<Cell, Sum>(cells_ptr + j * cell_bytes, n_lanes, lanes);
    add_squares<Cell, Sum>(cells_ptr + whole * cell_bytes, n - whole, lanes);
    for (int64_t half = n_lanes / 2; half; half /= 2) {  // one after the other they would wait longer than the row takes
      for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    if (lanes[0] != lanes[0]) return lanes[0];
    if (lanes[0] > most) most = lanes[0];
  }
  return most;
}

}  // namespace

double longest_row(const unsigned char* cells_ptr, bool wide, int64_t rows, int64_t n) {
  if (wide) return longest_of<double, double, 32>(cells_ptr, rows, n);
  return n < n_long ? longest_of<float, double, 16>(cells_ptr, rows, n) : longest_of<float, float, 64>(cells_ptr, rows, n);
}

double longest_valid(const unsigned char* cells_ptr, const unsigned char* valid_ptr, bool wide, int64_t rows, int64_t n,
                     bool together) {
  const int64_t row_bytes = n * (wide ? 8 : 4);
  double most = 0;
  for (int64_t r = 0, end; r < rows; r = end) {
    for (end = r + 1; end < rows && valid_ptr[end] == valid_ptr[r];) ++end;
    if (!valid_ptr[r]) continue;
    const unsigned char* const first_ptr = cells_ptr + r * row_bytes;
    const double found =
        together ? longest_row(first_ptr, wide, 1, (end - r) * n) : longest_row(first_ptr, wide, end - r, n);
    if (found != found) return found;
    if (found > most) most = found;
  }
  return most;
}

void keep(const unsigned char* cells_ptr, const void* keep_ptr, int64_t cell_bytes, int64_t n, unsigned char* kept_ptr) {
  keep_some(cells_ptr, static_cast<const unsigned char*>(keep_ptr), cell_bytes, n, kept_ptr);
}

void keep_reached(const unsigned char* cells_ptr, const void* keep_ptr, int64_t cell_bytes, int64_t n,
                  unsigned char* kept_ptr) {
  alignas(64) unsigned char bytes[n_some];
  const unsigned char* const reach_ptr = static_cast<const unsigned char*>(keep_ptr);
  for (int64_t j = 0; j < n; j += n_some) {
    const int64_t some = least(n_some, n - j);
    bytes_of<OfReach>(reach_ptr + 2 * j, some, bytes);
    keep_some(cells_ptr + j * cell_bytes, bytes, cell_bytes, some, kept_ptr + j * cell_bytes);
  }
}

void to_reach(const unsigned char* mask_ptr, int64_t n, unsigned char* reach_ptr) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    const uint16_t bits = static_cast<uint16_t>(-static_cast<uint16_t>(mask_ptr[j]) & 0x3f80u);
    std::memcpy(reach_ptr + 2 * j, &bits, sizeof bits);
  }
}

void to_mask(const unsigned char* reach_ptr, int64_t n, unsigned char* mask_ptr) {
  bytes_of<OfReach>(reach_ptr, n, mask_ptr);
}

bool are_bools(const unsigned char* mask_ptr, int64_t outer, int64_t stride_outer, int64_t n, int64_t stride_n) {
  for (int64_t o = 0; o < outer; ++o) {
    const unsigned char* const row_ptr = mask_ptr + o * stride_outer;
    unsigned char together = 0;
    if (stride_n == 1) {
      for (int64_t j = 0; j < n; ++j) together = static_cast<unsigned char>(together | row_ptr[j]);
    } else {
      for (int64_t j = 0; j < n; ++j) together = static_cast<unsigned char>(together | row_ptr[j * stride_n]);
    }
    if (together > 1) return false;
  }
  return true;
}

void spread_rows(const unsigned char* first_ptr, int64_t rows, int64_t n, unsigned char* mask_ptr) {
  for (int64_t r = 0; r < rows; ++r) std::memset(mask_ptr + r * n, first_ptr[r], static_cast<size_t>(n));
}

void hide_rows(unsigned char* cells_ptr, const unsigned char* valid_ptr, int64_t rows, int64_t row_bytes) {
  for (int64_t r = 0; r < rows; ++r) {
    if (!valid_ptr[r]) std::memset(cells_ptr + r * row_bytes, 0, static_cast<size_t>(row_bytes));
  }
}

bool lengths_of(const unsigned char* mask_ptr, int64_t rows, int64_t n, int64_t* lengths_ptr) {
  for (int64_t r = 0; r < rows; ++r, mask_ptr += n) {
    int64_t length = 0, valid = 0;
    while (length < n && mask_ptr[length]) ++length;
    for (int64_t j = length; j < n; ++j) valid += mask_ptr[j];
    if (valid) return false;
    lengths_ptr[r] = length;
  }
  return true;
}

bool rows_alike(const unsigned char* mask_ptr, int64_t rows, int64_t n, unsigned char* first_ptr) {
  for (int64_t r = 0; r < rows; ++r, mask_ptr += n) {
    const unsigned char first = mask_ptr[0];
    unsigned char differs = 0;
    for (int64_t j = 0; j < n; ++j) differs = static_cast<unsigned char>(differs | (mask_ptr[j] ^ first));
    if (differs) return false;
    first_ptr[r] = first;
  }
  return true;
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
