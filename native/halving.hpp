// Sums along the rows of a dense (rows, lanes) array by halving: row i absorbs row i + h, for h = ..., 4, 2, 1.
// The sums are left in the first row. Included inside the namespace of one instruction set; see common.hpp.

inline int64_t first_half(int64_t rows) {
  int64_t h = 1;
  while (2 * h < rows) h *= 2;
  return h;
}

ALWAYS_INLINE void absorb_rows(double* to, const double* given, int64_t n) {
  const double* const from = given;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) to[j] += from[j];
}

inline void halve_from(double* sums, int64_t h, int64_t rows, int64_t lanes) {
  for (; h > 0; rows = h, h /= 2) absorb_rows(sums, sums + h * lanes, (rows - h) * lanes);
}

inline NEVER_INLINE void halve(double* sums, int64_t rows, int64_t lanes) {
  if (rows > 1) halve_from(sums, first_half(rows), rows, lanes);
}

// The same with the cells kept.
inline NEVER_INLINE void halve_into(const double* cells, int64_t rows, int64_t lanes, double* __restrict sums) {
  if (rows <= 1) {
    std::memcpy(sums, cells, static_cast<size_t>(rows * lanes) * sizeof(double));
    return;
  }
  const int64_t h = first_half(rows), n = (rows - h) * lanes;
  for (int64_t j = 0; j < n; ++j) sums[j] = cells[j] + cells[h * lanes + j];
  std::memcpy(sums + n, cells + n, static_cast<size_t>(h * lanes - n) * sizeof(double));
  halve_from(sums, h / 2, h, lanes);
}

// The sums as unevaluated pairs (Knuth's two-sum): sums and lows.
inline NEVER_INLINE void halve_pairs(double* sums, double* lows, int64_t rows, int64_t lanes) {
  for (int64_t j = 0; j < rows * lanes; ++j) lows[j] = 0.0;
  if (rows <= 1) return;
  for (int64_t h = first_half(rows); h > 0; rows = h, h /= 2) {
    const double *const from = sums + h * lanes, *const from_low = lows + h * lanes;
    const int64_t n = (rows - h) * lanes;
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      const double s = sums[j] + from[j];
      lows[j] = (lows[j] + from_low[j]) + rounding_error(sums[j], from[j], s);
      sums[j] = s;
    }
  }
}
