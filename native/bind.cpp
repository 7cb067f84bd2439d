// The Python module: addresses and sizes in, a kernel run with the GIL released.

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "block.hpp"
#include "maps.hpp"
#include "pull.hpp"
#include "stored.hpp"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace nb = nanobind;

namespace {

using maskserve::Above;
using maskserve::Block;
using maskserve::Compact;
using maskserve::Dtype;
using maskserve::Filled;
using maskserve::Operand;
using maskserve::Options;
using maskserve::Parts;

template <class T>
T* address(uint64_t value) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(value));
}

Operand operand(uint64_t cells_ptr, int64_t stride_outer, int64_t stride_n, int64_t stride_inner) {
  return {address<const unsigned char>(cells_ptr), stride_outer, stride_n, stride_inner};
}

// A mask: bytes, or a compact one where there is a Compact.
Operand mask_operand(uint64_t cells_ptr, int64_t stride_outer, int64_t stride_n, int64_t stride_inner,
                     uint64_t compact_ptr, int64_t first) {
  Operand mask = operand(cells_ptr, stride_outer, stride_n, stride_inner);
  mask.compact_ptr = address<const Compact>(compact_ptr), mask.first = first;
  return mask;
}

void check(bool fits, const char* said) {
  if (!fits) throw std::invalid_argument(said);
}

Dtype dtype_of(int dtype) {
  check(dtype >= 0 && dtype < maskserve::n_dtypes, "dtype is an index into DTYPES");
  return static_cast<Dtype>(dtype);
}

// Plain integers: 20 of them are read in a tenth of a microsecond, so that a small block costs no more than its sum.
Block block_of(const Options& options, uint64_t data_ptr, uint64_t mask_ptr, int dtype, int64_t outer, int64_t n,
               int64_t inner,
               int64_t data_outer, int64_t data_n, int64_t data_inner, int64_t mask_outer, int64_t mask_n,
               int64_t mask_inner, uint64_t compact_ptr, int64_t mask_first, int64_t leaf) {
  check(leaf == 64 || leaf == 4096, "leaf is 64 or 4096 cells");
  Block block;
  block.data = operand(data_ptr, data_outer, data_n, data_inner);
  block.mask = mask_operand(mask_ptr, mask_outer, mask_n, mask_inner, compact_ptr, mask_first);
  block.dtype = dtype_of(dtype);
  block.outer = outer, block.n = n, block.inner = inner, block.leaf = leaf;
  block.omits_nan = options.omits_nan && block.dtype <= Dtype::bf16;
  return block;
}

bool lift(int kernel, const Options& options, uint64_t data_ptr, uint64_t mask_ptr, int dtype, int64_t outer,
          int64_t n, int64_t inner,
          int64_t data_outer, int64_t data_n, int64_t data_inner, int64_t mask_outer, int64_t mask_n,
          int64_t mask_inner, uint64_t compact_ptr, int64_t mask_first, int64_t leaf, uint64_t count_ptr,
          uint64_t first_ptr, uint64_t second_ptr,
          uint64_t third_ptr, uint64_t fourth_ptr, uint64_t fifth_ptr, uint64_t weights_ptr, int weights_dtype,
          int64_t weights_outer, int64_t weights_n, int64_t weights_inner) {
  check(kernel >= 0 && kernel < maskserve::n_lifts, "kernel is an index into LIFTS");
  Block block = block_of(options, data_ptr, mask_ptr, dtype, outer, n, inner, data_outer, data_n, data_inner,
                         mask_outer, mask_n,
                         mask_inner, compact_ptr, mask_first, leaf);
  block.weights = operand(weights_ptr, weights_outer, weights_n, weights_inner);
  block.weights_dtype = dtype_of(weights_dtype);
  const Parts parts{address<int64_t>(count_ptr),
                    {address<void>(first_ptr), address<void>(second_ptr), address<void>(third_ptr),
                     address<void>(fourth_ptr), address<void>(fifth_ptr)}};
  const maskserve::Lift run = maskserve::variant().lifts[kernel];
  nb::gil_scoped_release released;
  return run(block, options, parts);
}

int fill(int kernel, const Options& options, uint64_t data_ptr, uint64_t mask_ptr, int dtype, int64_t outer,
         int64_t n, int64_t inner,
         int64_t data_outer, int64_t data_n, int64_t data_inner, int64_t mask_outer, int64_t mask_n,
         int64_t mask_inner, uint64_t compact_ptr, int64_t mask_first, int64_t leaf, uint64_t count_ptr,
         uint64_t first_ptr, uint64_t second_ptr,
         uint64_t third_ptr, uint64_t values_ptr, uint64_t valid_ptr, int result, int64_t values_outer,
         int64_t values_n, int64_t values_inner, uint64_t places_ptr) {
  check(kernel >= 0 && kernel < maskserve::n_fills, "kernel is an index into FILLS");
  Block block = block_of(options, data_ptr, mask_ptr, dtype, outer, n, inner, data_outer, data_n, data_inner,
                         mask_outer,
                         mask_n, mask_inner, compact_ptr, mask_first, leaf);
  const maskserve::States states{
      outer * inner,
      address<const int64_t>(count_ptr),
      {address<const void>(first_ptr), address<const void>(second_ptr), address<const void>(third_ptr)}};
  if (count_ptr) block.states_ptr = &states;
  const Filled filled{address<unsigned char>(values_ptr), address<unsigned char>(valid_ptr),
                      operand(0, values_outer, values_n, values_inner), dtype_of(result),
                      address<unsigned char>(places_ptr)};
  const maskserve::Fill run = maskserve::variant().fills[kernel];
  nb::gil_scoped_release released;
  return run(block, options, filled);
}

void pick(int kernel, const Options& options, uint64_t data_ptr, uint64_t mask_ptr, int dtype, int64_t outer, int64_t n,
          int64_t inner, int64_t data_outer, int64_t data_n, int64_t data_inner, int64_t mask_outer, int64_t mask_n,
          int64_t mask_inner, uint64_t compact_ptr, int64_t mask_first, uint64_t values_ptr, uint64_t count_ptr) {
  check(kernel >= 0 && kernel < maskserve::n_selections, "kernel is an index into SELECTIONS");
  const Block block = block_of(options, data_ptr, mask_ptr, dtype, outer, n, inner, data_outer, data_n, data_inner,
                               mask_outer,
                               mask_n, mask_inner, compact_ptr, mask_first, 64);
  const maskserve::Select run = maskserve::variant().selections[kernel];
  nb::gil_scoped_release released;
  run(block, options, address<void>(values_ptr), address<int64_t>(count_ptr));
}

// A search, and the lock under which its threads hand in what they found.
class SharedSearch {
 public:
  SharedSearch(int kernel, int dtype, const Options& given, int64_t lanes) : options(given) {
    check(kernel >= 0 && kernel < maskserve::n_searches, "kernel is an index into SEARCHES");
    search.reset(maskserve::variant().searches[kernel](dtype_of(dtype), options, lanes));
  }

  void sample(uint64_t data_ptr, uint64_t mask_ptr, int dtype, int64_t outer, int64_t n, int64_t inner,
              int64_t data_outer, int64_t data_n, int64_t data_inner, int64_t mask_outer, int64_t mask_n,
              int64_t mask_inner, uint64_t compact_ptr, int64_t mask_first, int64_t n_cells, uint64_t seed) {
    const Block block = block_of(options, data_ptr, mask_ptr, dtype, outer, n, inner, data_outer, data_n, data_inner,
                                 mask_outer, mask_n, mask_inner, compact_ptr, mask_first, 64);
    nb::gil_scoped_release released;
    absorb(search->sample(block, n_cells, seed));
  }

  void sift(uint64_t data_ptr, uint64_t mask_ptr, int dtype, int64_t outer, int64_t n, int64_t inner,
            int64_t data_outer, int64_t data_n, int64_t data_inner, int64_t mask_outer, int64_t mask_n,
            int64_t mask_inner, uint64_t compact_ptr, int64_t mask_first) {
    const Block block = block_of(options, data_ptr, mask_ptr, dtype, outer, n, inner, data_outer, data_n, data_inner,
                                 mask_outer, mask_n, mask_inner, compact_ptr, mask_first, 64);
    nb::gil_scoped_release released;
    absorb(search->sift(block));
  }

  void bracket() {
    nb::gil_scoped_release released;
    search->bracket();
  }

  bool settle() {
    nb::gil_scoped_release released;
    return search->settle();
  }

  void write(uint64_t values_ptr, uint64_t count_ptr) const {
    search->write(address<double>(values_ptr), address<int64_t>(count_ptr));
  }

 private:
  void absorb(maskserve::Search::Found* given) {
    const std::unique_ptr<maskserve::Search::Found> found(given);
    const std::lock_guard<std::mutex> held(lock);
    search->absorb(*found);
  }

  const Options& options;
  std::unique_ptr<maskserve::Search> search;
  std::mutex lock;
};

int finish(int kernel, const Options& options, int64_t n, uint64_t count_ptr, uint64_t first_ptr, uint64_t second_ptr,
           uint64_t third_ptr, uint64_t fourth_ptr, uint64_t fifth_ptr, int64_t min_count, double needs, int result, uint64_t values_ptr, uint64_t valid_ptr) {
  check(kernel >= 0 && kernel < maskserve::n_finishes, "kernel is an index into FINISHES");
  const maskserve::States states{
      n,
      address<const int64_t>(count_ptr),
      {address<const void>(first_ptr), address<const void>(second_ptr), address<const void>(third_ptr),
       address<const void>(fourth_ptr), address<const void>(fifth_ptr)}};
  const maskserve::Limits limits{min_count, needs};
  nb::gil_scoped_release released;
  return maskserve::variant().finish(static_cast<maskserve::Finish>(kernel), states, options, limits, dtype_of(result),
                                     address<unsigned char>(values_ptr), address<unsigned char>(valid_ptr));
}

// The integers of a call with many operands, one after another.
class Numbers {
 public:
  explicit Numbers(const nb::tuple& given) : given_ptr(given.ptr()) {}
  uint64_t next() {
    check(at < PyTuple_GET_SIZE(given_ptr), "a number is missing");
    const uint64_t value = PyLong_AsUnsignedLongLongMask(PyTuple_GET_ITEM(given_ptr, at++));
    if (PyErr_Occurred()) throw nb::python_error();
    return value;
  }
  int64_t size() { return static_cast<int64_t>(next()); }
  int dtype() { return static_cast<int>(next()); }
  Operand strided() {
    const uint64_t ptr = next();
    const int64_t outer = size(), n = size();
    return operand(ptr, outer, n, size());
  }
  Operand mask() {
    Operand made = strided();
    made.compact_ptr = address<const Compact>(next()), made.first = size();
    return made;
  }

 private:
  PyObject* given_ptr;
  Py_ssize_t at = 0;
};

// (data, mask, dtype, outer, n, inner, leaf): of an operand its address and three strides, of a mask also a Compact and
// where it begins.
Block block_of(Numbers& numbers) {
  Block block;
  block.data = numbers.strided(), block.mask = numbers.mask();
  block.dtype = dtype_of(numbers.dtype());
  block.outer = numbers.size(), block.n = numbers.size(), block.inner = numbers.size(), block.leaf = numbers.size();
  check(block.leaf == 64 || block.leaf == 4096, "leaf is 64 or 4096 cells");
  return block;
}

// (g, gate, out, their dtype, four parts).
Above above_of(Numbers& numbers) {
  Above above;
  above.g = numbers.strided(), above.gate = numbers.strided(), above.out = numbers.strided();
  above.dtype = dtype_of(numbers.dtype());
  for (Operand& part : above.part) part = numbers.strided();
  return above;
}

// A block, what comes from above, then (gradient, reach, three strides).
int pull(int kernel, const Options& options, const nb::tuple& given) {
  check(kernel >= 0 && kernel < maskserve::n_pulls, "kernel is an index into PULLS");
  Numbers numbers(given);
  const Block block = block_of(numbers);
  const Above above = above_of(numbers);
  maskserve::Pulled pulled;
  pulled.gradient_ptr = address<unsigned char>(numbers.next());
  pulled.reach_ptr = address<unsigned char>(numbers.next());
  pulled.strides.stride_outer = numbers.size(), pulled.strides.stride_n = numbers.size();
  pulled.strides.stride_inner = numbers.size();
  const maskserve::Pull run = maskserve::pull_variant().pulls[kernel];
  nb::gil_scoped_release released;
  return run(block, options, above, pulled);
}

// A block, what comes from above, then where the counts go.
void ties(bool of_sizes, const nb::tuple& given) {
  Numbers numbers(given);
  const Block block = block_of(numbers);
  const Above above = above_of(numbers);
  int64_t* const count_ptr = address<int64_t>(numbers.next());
  nb::gil_scoped_release released;
  maskserve::pull_variant().ties(block, above, of_sizes, count_ptr);
}

// Dense cells where `keep` says so, 0 elsewhere; `reached`: it is a reach, else a mask.
void keep(bool reached, uint64_t cells_ptr, uint64_t keep_ptr, int64_t cell_bytes, int64_t n, uint64_t kept_ptr) {
  check(cell_bytes == 1 || cell_bytes == 2 || cell_bytes == 4 || cell_bytes == 8, "a cell has 1, 2, 4 or 8 bytes");
  const maskserve::PullVariant& variant = maskserve::pull_variant();
  const maskserve::Keep run = reached ? variant.keep_reached : variant.keep;
  nb::gil_scoped_release released;
  run(address<const unsigned char>(cells_ptr), address<const void>(keep_ptr), cell_bytes, n,
      address<unsigned char>(kept_ptr));
}

void to_reach(uint64_t mask_ptr, int64_t n, uint64_t reach_ptr) {
  nb::gil_scoped_release released;
  maskserve::pull_variant().to_reach(address<const unsigned char>(mask_ptr), n, address<unsigned char>(reach_ptr));
}

void to_mask(uint64_t reach_ptr, int64_t n, uint64_t mask_ptr) {
  nb::gil_scoped_release released;
  maskserve::pull_variant().to_mask(address<const unsigned char>(reach_ptr), n, address<unsigned char>(mask_ptr));
}

bool are_bools(uint64_t mask_ptr, int64_t outer, int64_t stride_outer, int64_t n, int64_t stride_n) {
  nb::gil_scoped_release released;
  return maskserve::pull_variant().are_bools(address<const unsigned char>(mask_ptr), outer, stride_outer, n, stride_n);
}

void spread_rows(uint64_t first_ptr, int64_t rows, int64_t n, uint64_t mask_ptr) {
  nb::gil_scoped_release released;
  maskserve::pull_variant().spread_rows(address<const unsigned char>(first_ptr), rows, n, address<unsigned char>(mask_ptr));
}

void hide_rows(uint64_t cells_ptr, uint64_t valid_ptr, int64_t rows, int64_t row_bytes) {
  nb::gil_scoped_release released;
  maskserve::pull_variant().hide_rows(address<unsigned char>(cells_ptr), address<const unsigned char>(valid_ptr), rows,
                                      row_bytes);
}

bool rows_alike(uint64_t mask_ptr, int64_t rows, int64_t n, uint64_t first_ptr) {
  nb::gil_scoped_release released;
  return maskserve::pull_variant().rows_alike(address<const unsigned char>(mask_ptr), rows, n,
                                              address<unsigned char>(first_ptr));
}

double longest_row(uint64_t cells_ptr, bool wide, int64_t rows, int64_t n) {
  nb::gil_scoped_release released;
  return maskserve::pull_variant().longest_row(address<const unsigned char>(cells_ptr), wide, rows, n);
}

double longest_valid(uint64_t cells_ptr, uint64_t valid_ptr, bool wide, int64_t rows, int64_t n, bool together) {
  nb::gil_scoped_release released;
  return maskserve::pull_variant().longest_valid(address<const unsigned char>(cells_ptr),
                                                 address<const unsigned char>(valid_ptr), wide, rows, n, together);
}

bool lengths_of(uint64_t mask_ptr, int64_t rows, int64_t n, uint64_t lengths_ptr) {
  nb::gil_scoped_release released;
  return maskserve::pull_variant().lengths_of(address<const unsigned char>(mask_ptr), rows, n,
                                              address<int64_t>(lengths_ptr));
}

void spread_mask(uint64_t cells_ptr, uint64_t compact_ptr, int64_t first, int64_t n, uint64_t out_ptr) {
  nb::gil_scoped_release released;
  maskserve::pull_variant().spread_mask(mask_operand(cells_ptr, 0, 0, 1, compact_ptr, first), 0, n,
                                        address<unsigned char>(out_ptr));
}

constexpr uintptr_t huge_page = uintptr_t{1} << 21;

// Huge pages for memory that is about to be written as a whole, where the system leaves that to programs.
void will_write([[maybe_unused]] uint64_t first_ptr, [[maybe_unused]] int64_t n_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t first = static_cast<uintptr_t>(first_ptr), start = (first + huge_page - 1) & ~(huge_page - 1);
  const uintptr_t stop = (first + static_cast<uintptr_t>(n_bytes)) & ~(huge_page - 1);
  if (first && start < stop) madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE);
#endif
}

constexpr int64_t at_end = -1;

// `n_bytes` of a file from each of `starts` on, one after the other in memory: 0, an errno, or at_end where the file is
// shorter. A call from Python for each run would give the interpreter away and wait for it, run by run.
int64_t read_runs(int descriptor, const std::vector<int64_t>& starts, int64_t n_bytes, uint64_t into_ptr) {
  nb::gil_scoped_release released;
  char* into = address<char>(into_ptr);
  for (const int64_t start : starts) {
    for (int64_t done = 0; done < n_bytes;) {
      const ssize_t n = pread(descriptor, into + done, static_cast<size_t>(n_bytes - done), start + done);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return n < 0 ? errno : at_end;
      done += n;
    }
    into += n_bytes;
  }
  return 0;
}

// (address, guard) of a range of a file as memory; address 0: it is to be read.
std::pair<uint64_t, int> map_range(int descriptor, int64_t start, int64_t n_bytes) {
  nb::gil_scoped_release released;
  const maskserve::Mapped mapped = maskserve::map_range(descriptor, start, n_bytes);
  return {reinterpret_cast<uint64_t>(mapped.ptr), mapped.guard};
}

bool unmap_range(uint64_t ptr, int guard, int64_t n_bytes) {
  nb::gil_scoped_release released;
  return maskserve::unmap_range({address<const unsigned char>(ptr), guard}, n_bytes);
}

void raise(uint64_t cells_ptr, uint64_t raised_ptr, int64_t n) {
  nb::gil_scoped_release released;
  maskserve::variant().raise(address<const double>(cells_ptr), address<double>(raised_ptr), n);
}

using Pointers = std::array<uint64_t, 1 + maskserve::n_parts>;  // for the count, then for each part; 0 where there is none

using Widths = std::array<int64_t, 1 + maskserve::n_parts>;  // bytes of a cell of each

Parts parts_of(const Pointers& at) {
  Parts parts{address<int64_t>(at[0]), {}};
  for (int k = 0; k < maskserve::n_parts; ++k) parts.part_ptr[k] = address<void>(at[1 + k]);
  return parts;
}

maskserve::States states_at(int64_t n, const Pointers& at) {
  maskserve::States states{n, address<const int64_t>(at[0]), {}};
  for (int k = 0; k < maskserve::n_parts; ++k) states.part_ptr[k] = address<const void>(at[1 + k]);
  return states;
}

void merge(int kernel, int dtype, int64_t n, const Pointers& left, const Pointers& right, const Pointers& both) {
  check(kernel >= 0 && kernel < maskserve::n_merges, "kernel is an index into MERGES");
  const Parts parts = parts_of(both);
  const maskserve::States left_states = states_at(n, left), right_states = states_at(n, right);
  nb::gil_scoped_release released;
  maskserve::variant().merges[kernel](left_states, right_states, dtype_of(dtype), parts);
}

// (positions, cells, mask, how many), dtype, leaf, then (outer, n, inner) and the sizes of its blocks: blocks [first, last)
// spread out and lifted, one after the other, without the interpreter. False where the kernel has no walk.
bool lift_stored(int kernel, const Options& options, const nb::tuple& given, int64_t first, int64_t last,
                 const Pointers& parts_at, const Widths& part_bytes) {
  check(kernel >= 0 && kernel < maskserve::n_lifts, "kernel is an index into LIFTS");
  Numbers numbers(given);
  maskserve::Stored stored;
  stored.positions_ptr = address<const int64_t>(numbers.next());
  stored.cells_ptr = address<const unsigned char>(numbers.next());
  stored.mask_ptr = address<const unsigned char>(numbers.next());
  stored.n_stored = numbers.size();
  Block like;
  like.dtype = dtype_of(numbers.dtype()), like.leaf = numbers.size();
  check(like.leaf == 64 || like.leaf == 4096, "leaf is 64 or 4096 cells");
  like.omits_nan = options.omits_nan && like.dtype <= Dtype::bf16;
  maskserve::Grid grid;
  grid.outer = numbers.size(), grid.n = numbers.size(), grid.inner = numbers.size();
  grid.height = numbers.size(), grid.run = numbers.size(), grid.width = numbers.size();
  check(grid.fits() && (grid.run == grid.n || grid.run % like.leaf == 0), "blocks are rows, or runs of leaves of one");
  check(0 <= first && first <= last && last <= grid.n_blocks(), "blocks are those of the grid");
  const Parts parts = parts_of(parts_at);
  nb::gil_scoped_release released;
  return maskserve::lift_stored(maskserve::variant().lifts[kernel], options, stored, grid, like, first, last, parts,
                                part_bytes.data());
}

constexpr int64_t n_reduced_cells = 1 << 16;  // of as many slices at a time as have these, so that states stay in L2

// lift (or, of kernel n_lifts + k, selection k) and finish in one call: states are memory traffic, and in a small tensor
// the calls are what takes time. A status; where it is not fill_done, what was written means nothing.
int reduce(int kernel, int finish, const Options& options, int n_held, uint64_t data_ptr, uint64_t mask_ptr,
           int dtype, int64_t outer, int64_t n,
           int64_t inner, int64_t data_outer, int64_t data_n, int64_t data_inner, int64_t mask_outer, int64_t mask_n,
           int64_t mask_inner, uint64_t compact_ptr, int64_t mask_first, int64_t leaf, int64_t min_count,
           double needs, int result, uint64_t values_ptr,
           uint64_t valid_ptr, int64_t leading_stride) {
  check(kernel >= 0 && kernel < maskserve::n_lifts + maskserve::n_selections,
        "kernel is an index into LIFTS + SELECTIONS");
  check(finish >= 0 && finish < maskserve::n_finishes, "finish is an index into FINISHES");
  check(n_held >= 1 && n_held <= maskserve::n_parts + 1, "a state has a count and up to five parts");
  Block block = block_of(options, data_ptr, mask_ptr, dtype, outer, n, inner, data_outer, data_n, data_inner,
                         mask_outer, mask_n,
                         mask_inner, compact_ptr, mask_first, leaf);
  const Dtype result_dtype = dtype_of(result);
  const int64_t cell_bytes = maskserve::cell_bytes(block.dtype);
  nb::gil_scoped_release released;
  // a few outer rows at a time or, where one is too long, a part of its columns
  const int64_t width = n * inner > n_reduced_cells ? std::min(inner, std::max<int64_t>(n_reduced_cells / n, 64)) : inner;
  const int64_t height = width < inner ? 1 : std::min(outer, n_reduced_cells / std::max<int64_t>(n * inner, 1) + 1);
  const bool is_selection = kernel >= maskserve::n_lifts;
  const int64_t leading = is_selection ? maskserve::n_leading(options) : 1;
  const size_t n_states = static_cast<size_t>(height * width);
  const std::unique_ptr<int64_t[]> room(new int64_t[n_states * static_cast<size_t>(n_held - 1 + leading) + 1]);
  const Block all = block;
  for (int64_t o = 0; o < outer; o += height) {
    for (int64_t c = 0; c < inner; c += width) {
      block.outer = std::min(height, outer - o), block.inner = std::min(width, inner - c);
      block.data.cells_ptr = all.data.cells_ptr + (o * data_outer + c * data_inner) * cell_bytes;
      block.mask = all.mask;
      block.mask.move_on(o * mask_outer + c * mask_inner);
      const int64_t n_results = block.outer * block.inner;
      Parts parts;
      maskserve::States states{n_results, parts.count_ptr = room.get(), {}};
      for (int k = 0; k + 1 < n_held; ++k) states.part_ptr[k] = parts.part_ptr[k] = room.get() + (k + 1) * n_results;
      if (is_selection) {
        maskserve::variant().selections[kernel - maskserve::n_lifts](block, options, parts.part_ptr[0], room.get());
      } else if (!maskserve::variant().lifts[kernel](block, options, parts)) {
        return maskserve::fill_refused;
      }
      for (int64_t q = 0; q < leading; ++q) {
        const int64_t first = q * leading_stride + o * inner + c;
        const int status = maskserve::variant().finish(
            static_cast<maskserve::Finish>(finish), states, options, {min_count, needs}, result_dtype,
            address<unsigned char>(values_ptr) + first * maskserve::cell_bytes(result_dtype),
            address<unsigned char>(valid_ptr) + first);
        if (status != maskserve::fill_done) return status;
        if (q + 1 < leading) states.part_ptr[0] = static_cast<const int64_t*>(states.part_ptr[0]) + n_results;
      }
    }
  }
  return maskserve::fill_done;
}

// Options with memory of their own for lists.
struct OwnedOptions : Options {
  std::vector<double> shares;
};

void set_q(OwnedOptions& options, nb::object q) {
  options.shares.clear();
  if (nb::isinstance<nb::tuple>(q)) {
    for (nb::handle share : nb::cast<nb::tuple>(q)) options.shares.push_back(nb::cast<double>(share));
  } else {
    options.shares.push_back(nb::cast<double>(q));
  }
  options.q_ptr = options.shares.data();
  options.n_q = static_cast<int64_t>(options.shares.size());
}

template <size_t n>
int index_in(const char* const (&names)[n], const std::string& name) {
  for (size_t k = 0; k < n; ++k) {
    if (name == names[k]) return static_cast<int>(k);
  }
  throw std::invalid_argument("no kernel knows " + name);
}

template <size_t n>
nb::tuple tuple_of(const char* const (&names)[n]) {
  nb::list list;
  for (const char* name : names) list.append(name);
  return nb::tuple(list);
}

}  // namespace

NB_MODULE(_native, m) {
  m.attr("DTYPES") = nb::make_tuple("f64", "f32", "f16", "bf16", "i8", "i16", "i32", "i64", "u8", "bool");
  m.attr("LIFTS") = tuple_of(maskserve::lift_names);
  m.attr("MERGES") = tuple_of(maskserve::merge_names);
  m.attr("FILLS") = tuple_of(maskserve::fill_names);
  m.attr("SELECTIONS") = tuple_of(maskserve::selection_names);
  m.attr("SEARCHES") = tuple_of(maskserve::search_names);
  m.attr("PULLS") = tuple_of(maskserve::pull_names);
  m.attr("FINISHES") = tuple_of(maskserve::finish_names);
  nb::class_<Options>(m, "AnyOptions");
  nb::class_<OwnedOptions, Options>(m, "Options")
      .def(nb::init<>())
      .def_rw("ord", &OwnedOptions::ord)
      .def_rw("eps", &OwnedOptions::eps)
      .def_rw("correction", &OwnedOptions::correction)
      .def_rw("omits_nan", &OwnedOptions::omits_nan)
      .def_rw("negates", &OwnedOptions::negates)
      .def_rw("wide", &OwnedOptions::wide)
      .def_rw("value", &OwnedOptions::value)
      .def_rw("limit", &OwnedOptions::limit)
      .def_rw("flip", &OwnedOptions::flip)
      .def_prop_rw("q", [](const OwnedOptions& o) { return o.n_q; }, set_q)
      .def_prop_rw(
          "interpolation", [](const OwnedOptions& o) { return maskserve::interpolation_names[o.interpolation]; },
          [](OwnedOptions& o, const std::string& name) {
            o.interpolation = index_in(maskserve::interpolation_names, name);
          })
      .def_prop_rw(
          "method", [](const OwnedOptions& o) { return maskserve::method_names[o.method]; },
          [](OwnedOptions& o, const std::string& name) { o.method = index_in(maskserve::method_names, name); })
      .def_rw("k", &OwnedOptions::k)
      .def_rw("descending", &OwnedOptions::descending)
      .def_rw("largest", &OwnedOptions::largest);
  nb::class_<SharedSearch>(m, "Search")
      .def(nb::init<int, int, const Options&, int64_t>(), nb::keep_alive<1, 4>())
      .def("sample", &SharedSearch::sample)
      .def("bracket", &SharedSearch::bracket)
      .def("sift", &SharedSearch::sift)
      .def("settle", &SharedSearch::settle)
      .def("write", &SharedSearch::write);
  m.def("isa", [] { return maskserve::variant().name; });
  m.def("lift", &lift);
  m.def("lift_stored", &lift_stored);
  m.def("fill", &fill);
  m.def("select", &pick);
  nb::set_leak_warnings(false);  // options live in caches of plans until the interpreter ends
  m.def("pull", &pull);
  m.def("ties", &ties);
  m.def("keep", &keep);
  m.def("to_reach", &to_reach);
  m.def("to_mask", &to_mask);
  m.def("are_bools", &are_bools);
  m.def("spread_rows", &spread_rows);
  m.def("hide_rows", &hide_rows);
  m.def("rows_alike", &rows_alike);
  m.def("longest_row", &longest_row);
  m.def("longest_valid", &longest_valid);
  m.def("lengths_of", &lengths_of);
  m.def("spread_mask", &spread_mask);
  m.def("will_write", &will_write);
  m.def("read_runs", &read_runs);
  m.def("map_range", &map_range);
  m.def("unmap_range", &unmap_range);
  m.def("raise_", raise);
  m.def("merge", &merge);
  m.def("finish", &finish);
  m.def("reduce", &reduce);
}
