// Products: mantissas, exponents, and products whose rounding error is kept.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

constexpr uint64_t exponent_bits = 0x7ff0000000000000u;

struct Mantissa {
  double mantissa;  // in [1/2, 1); 0, inf and NaN are their own
  int64_t exponent;
};

// x = mantissa * 2^exponent; the exponent of 0, inf and NaN means nothing. Of subnormal cells only if they `may_be`.
template <bool may_be_subnormal>
ALWAYS_INLINE Mantissa mantissa_of(double x) {
  int64_t lifted = 0;
  if constexpr (may_be_subnormal) {
    const bool is_small = (bits_as<uint64_t>(x) & exponent_bits) == 0;
    x = is_small ? x * 0x1p54 : x;
    lifted = is_small ? 54 : 0;
  }
  const uint64_t bits = bits_as<uint64_t>(x), exponent = bits & exponent_bits;
  const bool is_plain = exponent != 0 && exponent != exponent_bits;
  const uint64_t half = (bits & ~exponent_bits) | 0x3fe0000000000000u;
  return {bits_as<double>(is_plain ? half : bits), static_cast<int64_t>(exponent >> 52) - 1022 - lifted};
}

// 2^exponent, from -1022 to 1023.
ALWAYS_INLINE double two_to(int64_t exponent) {
  return bits_as<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

// x * 2^exponent, rounded once.
inline double scaled(double x, int64_t exponent) {
  const int64_t within = exponent < -2200 ? -2200 : exponent > 2200 ? 2200 : exponent;  // beyond, nothing finite is left
  const int64_t third = within >= 0 ? within / 3 : -((2 - within) / 3);
  return x * two_to(within - 2 * third) * two_to(third) * two_to(third);
}

ALWAYS_INLINE double top_half(double x) {
  const double spread = 134217729.0 * x;  // 2^27 + 1: halves the digits (Dekker, Numerische Mathematik 18, 1971)
  return spread - (spread - x);
}

// a * b less `product`, its rounded value; 0 where a half of a or b overflows.
ALWAYS_INLINE double product_error(double a, double b, double product) {
  const double a_top = top_half(a), b_top = top_half(b);
  const double a_rest = a - a_top, b_rest = b - b_top;
  const double error = (((a_top * b_top - product) + a_top * b_rest) + a_rest * b_top) + a_rest * b_rest;
  return is_finite(error) ? error : 0.0;
}
