// What crosses the boundary between the binding and the kernels: one block in, its parts out.
#pragma once

#include <cstdint>
#include <limits>

namespace maskserve {

enum class Dtype : int { f64, f32, f16, bf16, i8, i16, i32, i64, u8, boolean };
constexpr int n_dtypes = 10;
constexpr int64_t cell_bytes(Dtype dtype) {
  constexpr int64_t sizes[n_dtypes] = {8, 4, 2, 2, 1, 2, 4, 8, 1, 1};
  return sizes[static_cast<int>(dtype)];
}

// How a mask that has no byte for each cell says which count: of each `row` cells, side by side in a row-major tensor,
// as many from the first on as its length (int64) times `step`; or those whose bits are 1, the lowest bit of a byte first,
// `pitch` bits a row.
struct Compact {
  int64_t are_bits;  // else lengths
  int64_t row, pitch, step;
};

// A tensor seen as (outer, n, inner). Strides are in elements, never negative; 0 repeats.
struct Operand {
  const unsigned char* cells_ptr = nullptr;  // null: no mask, every cell counts
  int64_t stride_outer = 0;
  int64_t stride_n = 0;
  int64_t stride_inner = 0;
  const Compact* compact_ptr = nullptr;  // of a mask: `cells_ptr` are its lengths or bits, and strides count cells of it
  int64_t first = 0;                     // where it then begins

  // A mask some cells on.
  __attribute__((always_inline)) void move_on(int64_t n_cells) {
    if (compact_ptr) {
      first += n_cells;
    } else if (cells_ptr) {
      cells_ptr += n_cells;
    }
  }
};

constexpr int n_parts = 5;  // beside the count, at most

// The states of n result cells: their parts as in Parts.
struct States {
  int64_t n;
  const int64_t* count_ptr;
  const void* part_ptr[n_parts];
};

struct Block {
  Operand data;
  Operand mask;  // bytes 0 or 1, or compact
  Operand weights;  // null: each cell counts once
  Dtype dtype = Dtype::f32;
  Dtype weights_dtype = Dtype::f32;
  int64_t outer = 0;
  int64_t n = 0;
  int64_t inner = 0;
  int64_t leaf = 0;  // 4096 or 64 cells of n
  bool omits_nan = false;  // a NaN counts as masked; of floats alone
  const States* states_ptr = nullptr;  // of its slices, where a normalization is given a part of their cells
  bool is_masked() const { return mask.cells_ptr || omits_nan; }
};

// Where the (outer, inner) results go, all contiguous: count (int64), then the parts of the pass (ops/passes.py) in
// their order, as double, int64 or, for the best cell, the data's own dtype. A null part is not asked for.
struct Parts {
  int64_t* count_ptr = nullptr;
  void* part_ptr[n_parts] = {};
};

// Where a block of the data's shape, or of k rows, goes: values of `dtype` and validity, at the strides of `values`.
struct Filled {
  unsigned char* values_ptr = nullptr;
  unsigned char* mask_ptr = nullptr;  // null without a mask
  Operand values;
  Dtype dtype = Dtype::f32;
  unsigned char* places_ptr = nullptr;  // int64, at the strides of `values`: where each cell stood; null: not asked for
};

// What a row's parameters say; each kernel reads its own.
struct Options {
  double ord = 2.0;         // of a norm
  double eps = 0.0;         // the least norm that cells are divided by
  double correction = 0.0;  // of a variance
  bool omits_nan = false;
  bool negates = false;     // the op of the negated cells: softmin
  bool wide = false;        // the result is f64
  uint64_t value = 0;       // the bits that masked cells become
  int64_t limit = std::numeric_limits<int64_t>::max();  // how many masked cells in a row are filled
  uint64_t flip = 0;        // what cells that are taken were changed by, bit by bit, and their results are not
  const double* q_ptr = nullptr;  // the shares of quantiles
  int64_t n_q = 0;
  int interpolation = 0;    // an index into interpolation_names
  int method = 0;           // of ranks, an index into method_names
  int64_t k = -1;           // how many cells of each slice; -1: all
  bool descending = false;  // of a sort
  bool largest = true;      // of the k cells
};

constexpr const char* interpolation_names[] = {"linear", "lower", "higher", "midpoint", "nearest"};

constexpr const char* method_names[] = {"average", "min", "max", "dense", "ordinal"};

// The results that a selection gives for each slice.
constexpr int64_t n_leading(const Options& options) { return options.n_q > 0 ? options.n_q : 1; }

// False, with nothing written, where the strides allow no walk at full speed: give a contiguous copy.
using Lift = bool (*)(const Block&, const Options&, const Parts&);

// fill_overflowed: a finite value became inf. fill_refused: the block needs the reference's way.
enum FillStatus : int { fill_done, fill_overflowed, fill_refused };
using Fill = int (*)(const Block&, const Options&, const Filled&);

// (leading, outer, inner) results of whole slices, as doubles, and how many valid cells each slice has.
using Select = void (*)(const Block&, const Options&, void* values_ptr, int64_t* count_ptr);

// Selection from a few slices too long for one block, side by side: (1, n, lanes) read in blocks of rows, in rounds.
// A round: sample every block; bracket; sift every block and absorb what was found; settle, which says whether it was
// the last. sample and sift may run in several threads, the others in one at a time.
struct Search {
  struct Found {
    virtual ~Found();
  };
  virtual ~Search();
  virtual Found* sample(const Block&, int64_t n_cells, uint64_t seed) const = 0;
  virtual Found* sift(const Block&) const = 0;
  virtual void absorb(const Found&) = 0;
  virtual void bracket() = 0;
  virtual bool settle() = 0;
  virtual void write(double* values_ptr, int64_t* count_ptr) const = 0;  // (leading, lanes) and (lanes)
};
// The states of cells, and those of the cells behind them, as one; `dtype` is that of the cells.
using Merge = void (*)(const States& left, const States& right, Dtype dtype, const Parts& both);

using Begin = Search* (*)(Dtype, const Options&, int64_t lanes);

// Every kernel, once: a new one is a line here and a function of its name.
#define MASKSERVE_LIFTS(each) \
  each(total) each(count) each(largest) each(smallest) each(truths) each(moments) each(exponentials) each(powers) \
  each(product) each(first) each(last) each(extent) each(weighted_total) each(weighted_moments)
#define MASKSERVE_FILLS(each) \
  each(softmax) each(log_softmax) each(normalize) each(standardize) each(cumulative_sum) each(cumulative_largest) \
  each(cumulative_smallest) each(cumulative_product) each(cumulative_logsumexp) each(fill_forward) each(fill_backward) \
  each(fill_value) each(sorted) each(top) each(rank)
#define MASKSERVE_SELECTIONS(each) each(median) each(quantile) each(mode) each(count_distinct)
#define MASKSERVE_SEARCHES(each) each(median) each(quantile)  // the selections that can be searches
#define MASKSERVE_MERGES(each) each(moments) each(largest) each(smallest)  // of the states of lifts

#define MASKSERVE_NAME(kernel) #kernel,
constexpr const char* lift_names[] = {MASKSERVE_LIFTS(MASKSERVE_NAME)};
constexpr const char* fill_names[] = {MASKSERVE_FILLS(MASKSERVE_NAME)};
constexpr const char* selection_names[] = {MASKSERVE_SELECTIONS(MASKSERVE_NAME)};
constexpr const char* search_names[] = {MASKSERVE_SEARCHES(MASKSERVE_NAME)};
constexpr const char* merge_names[] = {MASKSERVE_MERGES(MASKSERVE_NAME)};
#undef MASKSERVE_NAME
constexpr int n_lifts = sizeof lift_names / sizeof *lift_names;
constexpr int n_fills = sizeof fill_names / sizeof *fill_names;
constexpr int n_selections = sizeof selection_names / sizeof *selection_names;
constexpr int n_searches = sizeof search_names / sizeof *search_names;
constexpr int n_merges = sizeof merge_names / sizeof *merge_names;

// A result is valid where its count reaches `min_count` and exceeds `needs`.
struct Limits {
  int64_t min_count;
  double needs;
};

// `pair` and `limbs` are a sum's parts of f64 and of integers.
enum class Finish : int {
  sum, sum_pair, sum_limbs, mean, mean_pair, mean_limbs, var, std, same, count, at, any, all, logsumexp, norm,
  prod, ptp, weighted_sum, weighted_mean, weighted_var, weighted_std
};
constexpr const char* finish_names[] = {
    "sum", "sum_pair", "sum_limbs", "mean", "mean_pair", "mean_limbs", "var", "std",
    "same", "count", "at", "any", "all", "logsumexp", "norm", "prod", "ptp", "weighted_sum", "weighted_mean",
    "weighted_var", "weighted_std",
};
constexpr int n_finishes = sizeof finish_names / sizeof *finish_names;

struct Variant {
  const char* name;
  Lift lifts[n_lifts];
  Fill fills[n_fills];
  Select selections[n_selections];
  Begin searches[n_searches];
  // States to values of `dtype` and their validity; a FillStatus.
  int (*finish)(Finish, const States&, const Options&, const Limits&, Dtype, unsigned char* values_ptr,
                unsigned char* mask_ptr);
  // exp of n cells, as the kernels raise them: what merges their states must have the same bits.
  void (*raise)(const double* cells_ptr, double* raised_ptr, int64_t n);
  Merge merges[n_merges];
};

// The variant for this processor, or the one MASKSERVE_ISA names. Decided once.
const Variant& variant();

}  // namespace maskserve
