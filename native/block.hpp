// What crosses the boundary between the binding and the kernels: one block in, its parts out.
#pragma once

#include <cstdint>

namespace maskserve {

enum class Dtype : int { f64, f32, f16, bf16, i8, i16, i32, i64, u8, boolean };
constexpr int n_dtypes = 10;

// A tensor seen as (outer, n, inner). Strides are in elements, never negative; 0 repeats.
struct Operand {
  const unsigned char* cells_ptr = nullptr;  // null: no mask, every cell counts
  int64_t stride_outer = 0;
  int64_t stride_n = 0;
  int64_t stride_inner = 0;
};

struct Block {
  Operand data;
  Operand mask;  // bytes 0 or 1
  Dtype dtype = Dtype::f32;
  int64_t outer = 0;
  int64_t n = 0;
  int64_t inner = 0;
  int64_t leaf = 0;  // 4096 or 64 cells of n
};

// Where the (outer, inner) results go, all contiguous 8-byte elements: count (int64), then by dtype
//   f32 f16 bf16: total (double)
//   f64:          total, low (double), exponent (int64)
//   integers:     high, low (int64)
struct Parts {
  int64_t* count_ptr = nullptr;
  void* part_ptr[3] = {nullptr, nullptr, nullptr};
};

// False, with nothing written, where the strides allow no walk at full speed: give a contiguous copy.
using Kernel = bool (*)(const Block&, const Parts&);

struct Variant {
  const char* name;
  Kernel total;
  Kernel count;
};

// The variant for this processor, or the one MASKSERVE_ISA names. Decided once.
const Variant& variant();

}  // namespace maskserve
