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

namespace {

ALWAYS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#include "states.hpp"

#include "cells.hpp"

}  // namespace
}  // namespace MASKSERVE_ISA
}  // namespace maskserve
