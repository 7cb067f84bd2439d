// The Python module: addresses and sizes in, a kernel run with the GIL released.

#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>

#include "block.hpp"

namespace nb = nanobind;

namespace {

using maskserve::Block;
using maskserve::Operand;
using maskserve::Parts;

template <class T>
T* address(uint64_t value) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(value));
}

Operand operand(uint64_t cells_ptr, int64_t stride_outer, int64_t stride_n, int64_t stride_inner) {
  return {address<const unsigned char>(cells_ptr), stride_outer, stride_n, stride_inner};
}

bool run(maskserve::Kernel kernel, const Block& block, const Parts& parts) {
  if (block.leaf != 64 && block.leaf != 4096) throw std::invalid_argument("leaf is 64 or 4096 cells");
  nb::gil_scoped_release released;
  return kernel(block, parts);
}

// Plain integers: 17 of them are read in a tenth of a microsecond, so that a small block costs no more than its sum.
bool total(uint64_t data_ptr, uint64_t mask_ptr, int dtype, int64_t outer, int64_t n, int64_t inner,
           int64_t data_outer, int64_t data_n, int64_t data_inner, int64_t mask_outer, int64_t mask_n,
           int64_t mask_inner, int64_t leaf, uint64_t count_ptr, uint64_t first_ptr, uint64_t second_ptr,
           uint64_t third_ptr) {
  if (dtype < 0 || dtype >= maskserve::n_dtypes) throw std::invalid_argument("dtype is an index into DTYPES");
  Block block;
  block.data = operand(data_ptr, data_outer, data_n, data_inner);
  block.mask = operand(mask_ptr, mask_outer, mask_n, mask_inner);
  block.dtype = static_cast<maskserve::Dtype>(dtype);
  block.outer = outer, block.n = n, block.inner = inner, block.leaf = leaf;
  const Parts parts{address<int64_t>(count_ptr),
                    {address<void>(first_ptr), address<void>(second_ptr), address<void>(third_ptr)}};
  return run(maskserve::variant().total, block, parts);
}

bool count(uint64_t mask_ptr, int64_t outer, int64_t n, int64_t inner, int64_t mask_outer, int64_t mask_n,
           int64_t mask_inner, int64_t leaf, uint64_t count_ptr) {
  Block block;
  block.mask = operand(mask_ptr, mask_outer, mask_n, mask_inner);
  block.outer = outer, block.n = n, block.inner = inner, block.leaf = leaf;
  return run(maskserve::variant().count, block, Parts{address<int64_t>(count_ptr), {}});
}

}  // namespace

NB_MODULE(_native, m) {
  m.attr("DTYPES") = nb::make_tuple("f64", "f32", "f16", "bf16", "i8", "i16", "i32", "i64", "u8", "bool");
  m.def("isa", [] { return maskserve::variant().name; });
  m.def("total", &total);
  m.def("count", &count);
}
