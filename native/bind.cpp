// The Python module: addresses and sizes in, a kernel run with the GIL released.

#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>

#include "block.hpp"

namespace nb = nanobind;

namespace {

using maskserve::Block;
using maskserve::Dtype;
using maskserve::Filled;
using maskserve::Operand;
using maskserve::Parts;

template <class T>
T* address(uint64_t value) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(value));
}

Operand operand(uint64_t cells_ptr, int64_t stride_outer, int64_t stride_n, int64_t stride_inner) {
  return {address<const unsigned char>(cells_ptr), stride_outer, stride_n, stride_inner};
}

void check(bool fits, const char* said) {
  if (!fits) throw std::invalid_argument(said);
}

Dtype dtype_of(int dtype) {
  check(dtype >= 0 && dtype < maskserve::n_dtypes, "dtype is an index into DTYPES");
  return static_cast<Dtype>(dtype);
}

// Plain integers: 20 of them are read in a tenth of a microsecond, so that a small block costs no more than its sum.
Block block_of(uint64_t data_ptr, uint64_t mask_ptr, int dtype, int64_t outer, int64_t n, int64_t inner,
               int64_t data_outer, int64_t data_n, int64_t data_inner, int64_t mask_outer, int64_t mask_n,
               int64_t mask_inner, int64_t leaf) {
  check(leaf == 64 || leaf == 4096, "leaf is 64 or 4096 cells");
  Block block;
  block.data = operand(data_ptr, data_outer, data_n, data_inner);
  block.mask = operand(mask_ptr, mask_outer, mask_n, mask_inner);
  block.dtype = dtype_of(dtype);
  block.outer = outer, block.n = n, block.inner = inner, block.leaf = leaf;
  return block;
}

bool lift(int kernel, uint64_t data_ptr, uint64_t mask_ptr, int dtype, int64_t outer, int64_t n, int64_t inner,
          int64_t data_outer, int64_t data_n, int64_t data_inner, int64_t mask_outer, int64_t mask_n,
          int64_t mask_inner, int64_t leaf, uint64_t count_ptr, uint64_t first_ptr, uint64_t second_ptr,
          uint64_t third_ptr) {
  check(kernel >= 0 && kernel < maskserve::n_lifts, "kernel is an index into LIFTS");
  const Block block = block_of(data_ptr, mask_ptr, dtype, outer, n, inner, data_outer, data_n, data_inner, mask_outer,
                               mask_n, mask_inner, leaf);
  const Parts parts{address<int64_t>(count_ptr),
                    {address<void>(first_ptr), address<void>(second_ptr), address<void>(third_ptr)}};
  const maskserve::Lift run = maskserve::variant().lifts[kernel];
  nb::gil_scoped_release released;
  return run(block, parts);
}

int fill(int kernel, uint64_t data_ptr, uint64_t mask_ptr, int dtype, int64_t outer, int64_t n, int64_t inner,
         int64_t data_outer, int64_t data_n, int64_t data_inner, int64_t mask_outer, int64_t mask_n,
         int64_t mask_inner, int64_t leaf, uint64_t values_ptr, uint64_t valid_ptr, int result, int64_t values_outer,
         int64_t values_n, int64_t values_inner) {
  check(kernel >= 0 && kernel < maskserve::n_fills, "kernel is an index into FILLS");
  const Block block = block_of(data_ptr, mask_ptr, dtype, outer, n, inner, data_outer, data_n, data_inner, mask_outer,
                               mask_n, mask_inner, leaf);
  const Filled filled{address<unsigned char>(values_ptr), address<unsigned char>(valid_ptr),
                      operand(0, values_outer, values_n, values_inner), dtype_of(result)};
  const maskserve::Fill run = maskserve::variant().fills[kernel];
  nb::gil_scoped_release released;
  return run(block, filled);
}

void median(uint64_t data_ptr, uint64_t mask_ptr, int dtype, int64_t outer, int64_t n, int64_t inner,
            int64_t data_outer, int64_t data_n, int64_t data_inner, int64_t mask_outer, int64_t mask_n,
            int64_t mask_inner, uint64_t values_ptr, uint64_t count_ptr) {
  const Block block = block_of(data_ptr, mask_ptr, dtype, outer, n, inner, data_outer, data_n, data_inner, mask_outer,
                               mask_n, mask_inner, 64);
  nb::gil_scoped_release released;
  maskserve::median(block, address<double>(values_ptr), address<int64_t>(count_ptr));
}

int finish(int kernel, int64_t n, uint64_t count_ptr, uint64_t first_ptr, uint64_t second_ptr, uint64_t third_ptr,
           double correction, int64_t min_count, double needs, int result, uint64_t values_ptr, uint64_t valid_ptr) {
  check(kernel >= 0 && kernel < maskserve::n_finishes, "kernel is an index into FINISHES");
  const maskserve::States states{n,
                                 address<const int64_t>(count_ptr),
                                 {address<const void>(first_ptr), address<const void>(second_ptr),
                                  address<const void>(third_ptr)},
                                 correction};
  const maskserve::Limits limits{min_count, needs};
  nb::gil_scoped_release released;
  return maskserve::finish(kernel, states, limits, dtype_of(result), address<unsigned char>(values_ptr),
                           address<unsigned char>(valid_ptr));
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
  m.attr("FILLS") = tuple_of(maskserve::fill_names);
  m.attr("FINISHES") = tuple_of(maskserve::finish_names);
  m.def("isa", [] { return maskserve::variant().name; });
  m.def("lift", &lift);
  m.def("fill", &fill);
  m.def("median", &median);
  m.def("finish", &finish);
}
