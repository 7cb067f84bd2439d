// Doubles rounded once, to nearest even, to the dtype of a result and written at any strides; hidden cells 0, NaN
// quiet and positive. Included inside the namespace of one instruction set; see common.hpp.

struct ToF64 {
  using Raw = uint64_t;
  static constexpr double overflow = infinity;
  static ALWAYS_INLINE Raw narrow(double v) { return v == v ? bits_as<uint64_t>(v) : 0x7ff8000000000000u; }
};

struct ToF32 {
  using Raw = uint32_t;
  static constexpr double overflow = 0x1.ffffffp127;  // from here on the nearest is inf
  static ALWAYS_INLINE Raw narrow(double v) { return v == v ? bits_as<uint32_t>(static_cast<float>(v)) : 0x7fc00000u; }
};

// v as the nearest multiple of the last place that a float of `digits` bits after the first has, from 2^least_exponent.
template <int digits, int least_exponent>
ALWAYS_INLINE double rounded_to(double v) {
  const uint64_t exponent = bits_as<uint64_t>(v) & 0x7ff0000000000000u;
  constexpr uint64_t lowest = static_cast<uint64_t>(1023 + least_exponent) << 52;
  const uint64_t at_least = static_cast<int64_t>(exponent) > static_cast<int64_t>(lowest) ? exponent : lowest;
  const double shift = 1.5 * bits_as<double>(at_least + (static_cast<uint64_t>(52 - digits) << 52));
  return (v + shift) - shift;
}

struct ToF16 {
  using Raw = uint16_t;
  static constexpr double overflow = 65520.0;
  static ALWAYS_INLINE Raw narrow(double v) {
    const uint32_t sign = static_cast<uint32_t>(bits_as<uint64_t>(v) >> 48) & 0x8000u;
    const double size = bits_as<double>(bits_as<uint64_t>(v) & 0x7fffffffffffffffu);
    const float f = static_cast<float>(rounded_to<10, -14>(size < overflow ? size : 0.0));
    const uint32_t normal = (bits_as<uint32_t>(f) >> 13) - (112u << 10);
    const uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(f < 0x1p-14f ? f * 0x1p24f : 0.0f));
    const uint32_t finite = f < 0x1p-14f ? subnormal : normal;
    return static_cast<Raw>(v != v ? 0x7e00u : sign | (size < overflow ? finite : 0x7c00u));
  }
};

struct ToBF16 {
  using Raw = uint16_t;
  static constexpr double overflow = 0x1.ffp127;
  static ALWAYS_INLINE Raw narrow(double v) {
    const uint32_t sign = static_cast<uint32_t>(bits_as<uint64_t>(v) >> 48) & 0x8000u;
    const double size = bits_as<double>(bits_as<uint64_t>(v) & 0x7fffffffffffffffu);
    const float f = static_cast<float>(rounded_to<7, -126>(size < overflow ? size : 0.0));
    return static_cast<Raw>(v != v ? 0x7fc0u : sign | (size < overflow ? bits_as<uint32_t>(f) >> 16 : 0x7f80u));
  }
};

struct ToI64 {
  using Raw = uint64_t;
  static constexpr double overflow = infinity;
  static ALWAYS_INLINE Raw narrow(int64_t v) { return static_cast<uint64_t>(v); }
};

template <class To, class Wide, bool is_masked, bool is_dense>
NEVER_INLINE void narrow_run(const Wide* from, const unsigned char* keep_ptr, int64_t n, int64_t tile_stride,
                             unsigned char* to_ptr, int64_t stride, const To& given) {
  using Raw = typename To::Raw;
  const To to = given;
  const int64_t step = is_dense ? 1 : stride, tile_step = is_dense ? 1 : tile_stride;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    Raw raw = to.narrow(from[j * tile_step]);
    if constexpr (is_masked) raw = static_cast<Raw>(raw & static_cast<Raw>(-static_cast<Raw>(keep_ptr[j * tile_step])));
    std::memcpy(to_ptr + j * step * static_cast<int64_t>(sizeof raw), &raw, sizeof raw);
  }
}

// The window whose turn() undoes that of `w`.
inline Window turned_back(const Window& w) {
  Window back = w;
  back.groups = w.rows, back.rows = w.groups;
  return back;
}

template <class To, class Wide>
void narrow_cells(const Filled& filled, const Window& w, const Wide* cells, const unsigned char* keep_ptr,
                  const To& to = To()) {
  constexpr int64_t cell_bytes = sizeof(typename To::Raw);
  if (is_run(filled.values, w)) {
    using Raw = typename To::Raw;
    alignas(64) Raw narrowed[n_tile];
    unsigned char* const all_ptr = reinterpret_cast<unsigned char*>(narrowed);
    if (keep_ptr) {
      narrow_run<To, Wide, true, true>(cells, keep_ptr, w.cells(), 1, all_ptr, 1, to);
    } else {
      narrow_run<To, Wide, false, true>(cells, nullptr, w.cells(), 1, all_ptr, 1, to);
    }
    unsigned char* const to_ptr = filled.values_ptr + w.o * filled.values.stride_outer * cell_bytes;
    return turn(narrowed, turned_back(w), reinterpret_cast<Raw*>(to_ptr));
  }
  each_run(filled.values, w, [&](int64_t first, int64_t at, int64_t n, int64_t stride, int64_t tile_stride) {
    unsigned char* const to_ptr = filled.values_ptr + first * cell_bytes;
    const bool dense = stride == 1 && tile_stride == 1;
    if (keep_ptr) {
      (dense ? narrow_run<To, Wide, true, true> : narrow_run<To, Wide, true, false>)(
          cells + at, keep_ptr + at, n, tile_stride, to_ptr, stride, to);
    } else {
      (dense ? narrow_run<To, Wide, false, true> : narrow_run<To, Wide, false, false>)(
          cells + at, nullptr, n, tile_stride, to_ptr, stride, to);
    }
  });
}
