// What all kernels gather from any layout and dtype, and write back: compiled here and nowhere else.

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "narrow.hpp"

// ---- conversions ----------------------------------------------------------------------------------------------------

template <class Cell>
struct ToDouble {
  using Raw = typename Cell::Raw;
  using Out = double;
  using Bits = uint64_t;
  double hidden;
  ALWAYS_INLINE double operator()(Raw raw) const { return as_double(Cell::widen(raw)); }
};

template <class Cell>
NEVER_INLINE void gather_cells(const Operand& data, const Window& w, const unsigned char* keep_ptr, double hidden,
                               double* out) {
  gather(data, w, keep_ptr, ToDouble<Cell>{hidden}, out);
}

template <class Cell>
struct ToFloat {
  using Raw = typename Cell::Raw;
  using Out = float;
  using Bits = uint32_t;
  float hidden;
  ALWAYS_INLINE float operator()(Raw raw) const { return static_cast<float>(Cell::widen(raw).sum); }
};

template <class Cell, class Signed>
struct ToInteger {
  using Raw = typename Cell::Raw;
  using Out = int64_t;
  using Bits = uint64_t;
  int64_t hidden;
  ALWAYS_INLINE int64_t operator()(Raw raw) const { return static_cast<int64_t>(static_cast<Signed>(raw)); }
};

// Whether a finite cell became inf.
template <class To>
bool narrow_tile(const Filled& filled, const Window& w, const double* cells, const unsigned char* keep_ptr,
                 bool may_overflow) {
  narrow_cells<To>(filled, w, cells, keep_ptr);
  if (!may_overflow || To::overflow == infinity) return false;
  const auto overflows = [](double cell) {
    const double size = bits_as<double>(bits_as<uint64_t>(cell) & 0x7fffffffffffffffu);
    return static_cast<int64_t>(size >= To::overflow) & static_cast<int64_t>(size <= std::numeric_limits<double>::max());
  };
  int64_t any = 0;
  for (int64_t j = 0; j < w.cells(); ++j) any |= overflows(cells[j]);  // no branch: under the mask lies junk
  if (!any || !keep_ptr) return any != 0;
  any = 0;
  for (int64_t j = 0; j < w.cells(); ++j) any |= overflows(cells[j]) & keep_ptr[j];
  return any != 0;
}

// ---- compact masks --------------------------------------------------------------------------------------------------

// Eight bits to bytes at a time: bit k is left alone in byte k, and what is not 0 there becomes 1.
NEVER_INLINE void spread_bytes(const unsigned char* __restrict bits_ptr, int64_t n_bytes, unsigned char* __restrict out) {
  int64_t done = 0;
#ifdef __AVX512BW__  // where bits are masks as they are
  for (; done + 8 <= n_bytes; done += 8) {
    uint64_t bits;
    std::memcpy(&bits, bits_ptr + done, sizeof bits);
    _mm512_storeu_si512(out + 8 * done, _mm512_maskz_set1_epi8(bits, 1));
  }
#endif
#pragma GCC ivdep
  for (int64_t k = done; k < n_bytes; ++k) {
    const uint64_t apart = (bits_ptr[k] * 0x0101010101010101u) & 0x8040201008040201u;
    const uint64_t bytes = ((apart + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
    std::memcpy(out + 8 * k, &bytes, sizeof bytes);
  }
}

void spread_bits(const unsigned char* bits_ptr, int64_t first, int64_t n, unsigned char* out) {
  const auto some = [&](int64_t count) {
    for (int64_t j = 0; j < count; ++j, ++first) *out++ = bits_ptr[first >> 3] >> (first & 7) & 1;
    n -= count;
  };
  some(least(n, -first & 7));
  const int64_t n_bytes = n / 8;
  spread_bytes(bits_ptr + (first >> 3), n_bytes, out);
  first += 8 * n_bytes, out += 8 * n_bytes, n -= 8 * n_bytes;
  some(n);
}

// visit(up to 64 bits, as many ones) for bits side by side, the first one lowest; false where one was answered with it.
template <class Visit>
ALWAYS_INLINE bool each_word(const unsigned char* bits_ptr, int64_t first, int64_t n, const Visit& visit) {
  const auto part = [&](int64_t some) {  // as far as a word reaches
    const int64_t shift = first & 7;
    uint64_t word = 0;
    std::memcpy(&word, bits_ptr + (first >> 3), static_cast<size_t>((shift + some + 7) >> 3));
    first += some, n -= some;
    const uint64_t whole = ~uint64_t{0} >> (64 - some);
    return visit(word >> shift & whole, whole);
  };
  if (first & 7 && n > 0 && !part(least(n, 8 - (first & 7)))) return false;
  for (; n >= 64; first += 64, n -= 64) {  // bytes from here on
    uint64_t word;
    std::memcpy(&word, bits_ptr + (first >> 3), sizeof word);
    if (!visit(word, ~uint64_t{0})) return false;
  }
  return n <= 0 || part(n);
}

// visit(first bit, cells, -1) for cells side by side whose bits are, or visit(.., cells, how many of the first ones count);
// false where one was answered with it.
template <class Visit>
ALWAYS_INLINE bool each_mask_part(const Operand& mask, int64_t at, int64_t n, const Visit& visit) {
  const Compact& how = *mask.compact_ptr;
  const int64_t from = mask.first + at;
  if (how.are_bits && how.pitch == how.row) return visit(from, n, int64_t{-1});  // rows end with their bytes
  int64_t row = from / how.row, cell = from - row * how.row;
  for (; n > 0; ++row, cell = 0) {
    const int64_t some = least(n, how.row - cell);
    int64_t left = -1;
    if (!how.are_bits) {
      std::memcpy(&left, mask.cells_ptr + row * static_cast<int64_t>(sizeof left), sizeof left);
      left = left * how.step - cell;
      if (left < 0) left = 0;
    }
    if (!visit(row * how.pitch + cell, some, left)) return false;
    n -= some;
  }
  return true;
}

// A window of a compact mask, as gather_mask() gives it.
void spread_window(const Operand& mask, const Window& w, unsigned char* copy_ptr) {
  if (is_run(mask, w)) {
    alignas(64) unsigned char cells[n_tile];
    spread_mask(mask, first_cell(mask, w), w.cells(), cells);
    return turn(cells, w, copy_ptr);
  }
  each_run(mask, w, [&](int64_t first, int64_t at, int64_t n, int64_t stride, int64_t tile_stride) {
    if (stride == 1 && tile_stride == 1) return spread_mask(mask, first, n, copy_ptr + at);
    for (int64_t j = 0; j < n; ++j) copy_ptr[at + j * tile_stride] = mask_cell(mask, first + j * stride);
  });
}

}  // namespace

void spread_mask(const Operand& mask, int64_t at, int64_t n, unsigned char* out) {
  each_mask_part(mask, at, n, [&](int64_t first, int64_t some, int64_t length) {
    if (length < 0) {
      spread_bits(mask.cells_ptr, first, some, out);
    } else {
      const int64_t kept = least(length, some);
      std::memset(out, 1, static_cast<size_t>(kept));
      std::memset(out + kept, 0, static_cast<size_t>(some - kept));
    }
    out += some;
    return true;
  });
}

int64_t count_run(const Operand& mask, int64_t at, int64_t n) {
  int64_t count = 0;
  each_mask_part(mask, at, n, [&](int64_t first, int64_t some, int64_t length) {
    if (length >= 0) return count += least(length, some), true;
    return each_word(mask.cells_ptr, first, some, [&](uint64_t word, uint64_t) {
      count += __builtin_popcountll(word);
      return true;
    });
  });
  return count;
}

Kept kept_of(const Operand& mask, const Window& w) {
  if (!mask.compact_ptr || !w.cells()) return Kept::some;
  bool any = false, all = true;
  const bool is_dense = each_dense_run(mask, w, [&](int64_t at, int64_t n) {
    return each_mask_part(mask, at, n, [&](int64_t first, int64_t some, int64_t length) {
      if (length >= 0) {
        any |= length > 0, all &= length >= some;
        return !any || all;
      }
      const auto says = [&](uint64_t word, uint64_t whole) {
        any |= word != 0, all &= word == whole;
        return !any || all;
      };
      const auto end = [&](int64_t at_end) { return says(mask.cells_ptr[at_end >> 3] >> (at_end & 7) & 1, 1); };
      return end(first) && end(first + some - 1) && each_word(mask.cells_ptr, first, some, says);  // padding: at once
    });
  });
  return !is_dense || (any && !all) ? Kept::some : any ? Kept::all : Kept::none;
}

const unsigned char* gather_mask(const Operand& mask, const Window& w, unsigned char* copy_ptr) {
  if (!mask.cells_ptr) return nullptr;
  if (mask.compact_ptr) return spread_window(mask, w, copy_ptr), copy_ptr;
  const unsigned char* dense_ptr = nullptr;
  if (is_run(mask, w)) {
    turn(window_ptr(mask, w, 1), w, copy_ptr);
    return copy_ptr;
  }
  each_run(mask, w, [&](int64_t first, int64_t at, int64_t n, int64_t stride, int64_t tile_stride) {
    const unsigned char* from_ptr = mask.cells_ptr + first;
    if (n == w.cells() && stride == 1 && tile_stride == 1) {
      dense_ptr = from_ptr;
    } else if (stride == 1 && tile_stride == 1) {
      prefetch(from_ptr + cells_ahead(mask, w, n), n);
      std::memcpy(copy_ptr + at, from_ptr, static_cast<size_t>(n));
    } else if (stride == 0 && tile_stride == 1) {
      std::memset(copy_ptr + at, *from_ptr, static_cast<size_t>(n));
    } else {
      for (int64_t j = 0; j < n; ++j) copy_ptr[at + j * tile_stride] = from_ptr[j * stride];
    }
  });
  return dense_ptr ? dense_ptr : copy_ptr;
}

void gather_numbers(Dtype dtype, const Operand& data, const Window& w, unsigned char* out) {
  with_numbers(dtype, [&](const auto& is_number) { gather(data, w, nullptr, is_number, out); });
}

void combine_keep(const unsigned char* mask_ptr, const unsigned char* numbers_ptr, int64_t n, unsigned char* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = (mask_ptr ? mask_ptr[j] : uint8_t{1}) & numbers_ptr[j];
}

const unsigned char* gather_keep(const Block& block, const Window& w, unsigned char* copy_ptr) {
  const unsigned char* const mask_ptr = gather_mask(block.mask, w, copy_ptr);
  if (!block.omits_nan) return mask_ptr;
  alignas(64) unsigned char numbers[n_tile];
  gather_numbers(block.dtype, block.data, w, numbers);
  combine_keep(mask_ptr, numbers, w.cells(), copy_ptr);
  return copy_ptr;
}

void gather_doubles(Dtype dtype, const Operand& data, const Window& w, const unsigned char* keep_ptr, double hidden,
                    double* out) {
  with_cell(dtype, [&](auto cell) { gather_cells<decltype(cell)>(data, w, keep_ptr, hidden, out); });
}

void gather_floats(Dtype dtype, const Operand& data, const Window& w, const unsigned char* keep_ptr, float hidden,
                   float* out) {
  switch (dtype) {
    case Dtype::f32: return gather(data, w, keep_ptr, ToFloat<F32Cell>{hidden}, out);
    case Dtype::f16: return gather(data, w, keep_ptr, ToFloat<F16Cell>{hidden}, out);
    case Dtype::bf16: return gather(data, w, keep_ptr, ToFloat<BF16Cell>{hidden}, out);
    case Dtype::i8: return gather(data, w, keep_ptr, ToFloat<I8Cell>{hidden}, out);
    case Dtype::i16: return gather(data, w, keep_ptr, ToFloat<I16Cell>{hidden}, out);
    default: return gather(data, w, keep_ptr, ToFloat<U8Cell>{hidden}, out);
  }
}

void gather_integers(const Block& block, const Window& w, const unsigned char* keep_ptr, int64_t hidden,
                            int64_t* out) {
  switch (block.dtype) {
    case Dtype::i8: return gather(block.data, w, keep_ptr, ToInteger<I8Cell, int8_t>{hidden}, out);
    case Dtype::i16: return gather(block.data, w, keep_ptr, ToInteger<I16Cell, int16_t>{hidden}, out);
    case Dtype::i32: return gather(block.data, w, keep_ptr, ToInteger<I32Cell, int32_t>{hidden}, out);
    case Dtype::i64: return gather(block.data, w, keep_ptr, ToInteger<I64Cell, int64_t>{hidden}, out);
    default: return gather(block.data, w, keep_ptr, ToInteger<U8Cell, uint8_t>{hidden}, out);
  }
}

void count_lanes(const unsigned char* given_ptr, int64_t n_cells, int64_t lanes, int64_t* __restrict count) {
  const int64_t period = period_of(lanes);
  alignas(64) uint8_t few[n_tile_lanes];
  const unsigned char* bytes_ptr = given_ptr;
  for (int64_t start = 0; start < n_cells;) {
    const int64_t stop = least(n_cells, start + 255 * period);
    std::memset(few, 0, sizeof few);
    for (; start < stop; start += period) {
      const int64_t n = least(period, stop - start);
      for (int64_t j = 0; j < n; ++j) few[j] = static_cast<uint8_t>(few[j] + bytes_ptr[start + j]);
    }
    if (lanes == 1) {
      int64_t sum = 0;
      for (int64_t j = 0; j < period; ++j) sum += few[j];
      count[0] += sum;
    } else {
      for (int64_t k = 0; k < period; k += lanes) {
        for (int64_t l = 0; l < lanes; ++l) count[l] += few[k + l];
      }
    }
  }
}

void write_mask(const Filled& filled, const Window& w, const unsigned char* keep_ptr) {
  if (!keep_ptr || !filled.mask_ptr) return;
  if (is_run(filled.values, w)) {
    return turn(keep_ptr, turned_back(w), filled.mask_ptr + w.o * filled.values.stride_outer);
  }
  each_run(filled.values, w, [&](int64_t first, int64_t at, int64_t n, int64_t stride, int64_t tile_stride) {
    unsigned char* const to_ptr = filled.mask_ptr + first;
    if (stride == 1 && tile_stride == 1) {
      std::memcpy(to_ptr, keep_ptr + at, static_cast<size_t>(n));
    } else {
      for (int64_t j = 0; j < n; ++j) to_ptr[j * stride] = keep_ptr[at + j * tile_stride];
    }
  });
}

bool write_doubles(const Filled& filled, const Window& w, const double* cells, const unsigned char* keep_ptr,
                   bool may_overflow) {
  write_mask(filled, w, keep_ptr);
  switch (filled.dtype) {
    case Dtype::f64: return narrow_tile<ToF64>(filled, w, cells, keep_ptr, may_overflow);
    case Dtype::f32: return narrow_tile<ToF32>(filled, w, cells, keep_ptr, may_overflow);
    case Dtype::f16: return narrow_tile<ToF16>(filled, w, cells, keep_ptr, may_overflow);
    default: return narrow_tile<ToBF16>(filled, w, cells, keep_ptr, may_overflow);
  }
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
