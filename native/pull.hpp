// What crosses the boundary between the binding and the kernels of gradients.
#pragma once

#include "block.hpp"

namespace maskserve {

// What a gradient by the data is computed from, beside the block: each operand is seen as (outer, n, inner), what belongs
// to a slice with n repeated.
struct Above {
  Operand g;                 // of the result
  Operand gate;              // bytes 0 or 1: which results it has reached
  Operand out;               // the result
  Dtype dtype = Dtype::f32;  // of g and out
  Operand part[4];           // the states of a pass: their count as int64, the others as double
};

// Where it goes, and where it has reached (bfloat16 1 or 0; null: not asked for), both at `strides`.
struct Pulled {
  unsigned char* gradient_ptr = nullptr;  // of the block's dtype
  unsigned char* reach_ptr = nullptr;
  Operand strides;
};

// A FillStatus.
using Pull = int (*)(const Block&, const Options&, const Above&, const Pulled&);

// (outer, inner) counts of the valid cells, or `of_sizes` of their |cells|, that equal the result of their slice, NaN
// being one with NaN.
using Ties = void (*)(const Block&, const Above&, bool of_sizes, int64_t* count);

// Dense cells of `cell_bytes` where they are kept, 0 elsewhere: where bytes are 1, or where reaches, bfloat16, are above 0.
using Keep = void (*)(const unsigned char* cells_ptr, const void* keep_ptr, int64_t cell_bytes, int64_t n,
                      unsigned char* kept_ptr);

// Every kernel, once: a new one is a line here and a function of its name.
#define MASKSERVE_PULLS(each)                                                                             \
  each(pull_total) each(pull_mean) each(pull_var) each(pull_std) each(pull_logsumexp) each(pull_extreme)  \
  each(pull_norm) each(pull_softmax) each(pull_softmin) each(pull_log_softmax) each(pull_normalize)       \
  each(pull_standardize) each(pull_cumsum) each(pull_norm_of_order) each(pull_extent)                      \
  each(pull_product) each(pull_cumprod) each(pull_logcumsumexp)

#define MASKSERVE_NAME(kernel) #kernel,
constexpr const char* pull_names[] = {MASKSERVE_PULLS(MASKSERVE_NAME)};
#undef MASKSERVE_NAME
constexpr int n_pulls = sizeof pull_names / sizeof *pull_names;

struct PullVariant {
  Pull pulls[n_pulls];
  Ties ties;
  Keep keep;
  Keep keep_reached;
  void (*to_reach)(const unsigned char* mask_ptr, int64_t n, unsigned char* reach_ptr);
  void (*to_mask)(const unsigned char* reach_ptr, int64_t n, unsigned char* mask_ptr);
  // Whether all bytes are 0 or 1.
  bool (*are_bools)(const unsigned char* mask_ptr, int64_t outer, int64_t stride_outer, int64_t n, int64_t stride_n);
  // Rows of n bytes that are all the same.
  void (*spread_rows)(const unsigned char* first_ptr, int64_t rows, int64_t n, unsigned char* mask_ptr);
  // Sets the rows of cells that are not valid to 0.
  void (*hide_rows)(unsigned char* cells_ptr, const unsigned char* valid_ptr, int64_t rows, int64_t row_bytes);
  // Whether each of some rows of n bytes, n > 0, has one byte alone; the first of each.
  bool (*rows_alike)(const unsigned char* mask_ptr, int64_t rows, int64_t n, unsigned char* first_ptr);
  // The largest sum of squares of a row of n floats, `wide` where they are doubles; NaN where one is.
  double (*longest_row)(const unsigned char* cells_ptr, bool wide, int64_t rows, int64_t n);
  // The same of the valid rows, 0 without any; `together`: of all that follow each other as one row.
  double (*longest_valid)(const unsigned char* cells_ptr, const unsigned char* valid_ptr, bool wide, int64_t rows, int64_t n,
                          bool together);
  // Whether in each of some rows of n bytes the valid ones come first; how many they are.
  bool (*lengths_of)(const unsigned char* mask_ptr, int64_t rows, int64_t n, int64_t* lengths_ptr);
  // The bytes of some cells of a compact mask, side by side.
  void (*spread_mask)(const Operand& mask, int64_t at, int64_t n, unsigned char* out);
};

// The variant for this processor, as variant() chooses it.
const PullVariant& pull_variant();

}  // namespace maskserve
