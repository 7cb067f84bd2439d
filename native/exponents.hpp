// Mantissas and binary exponents, these as doubles: SSE2 and AVX2 convert no int64.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

// frexp: x = mantissa * 2^exponent with the mantissa in [1/2, 1); 0, inf and NaN have exponent 0.
ALWAYS_INLINE double split(double x, double& exponent) {
  const bool is_tiny = (bits_as<uint64_t>(x) & 0x7ff0000000000000u) == 0;
  const double normal = is_tiny ? x * 0x1p54 : x;
  const uint64_t bits = bits_as<uint64_t>(normal), biased = bits >> 52 & 0x7ffu;
  const bool is_plain = biased == 0 || biased == 0x7ffu;
  const double integer = bits_as<double>(biased | 0x4330000000000000u) - 0x1p52;
  exponent = is_plain ? 0.0 : integer - (is_tiny ? 1076.0 : 1022.0);
  return is_plain ? x : bits_as<double>((bits & 0x800fffffffffffffu) | 0x3fe0000000000000u);
}

// 2^k for integers |k| <= 1022.
ALWAYS_INLINE double power_of_two(double k) {
  return bits_as<double>((bits_as<uint64_t>(k + 0x1.8p52) + 1023) << 52);
}

// x * 2^exponent, rounded once, for 2^-600 < |x| < 1, 0, inf and NaN.
ALWAYS_INLINE double scaled_by(double x, double exponent) {
  const double within = exponent < -2000.0 ? -2000.0 : exponent > 2000.0 ? 2000.0 : exponent;
  const double half = (within * 0.5 + 0x1.8p52) - 0x1.8p52;
  return x * power_of_two(half) * power_of_two(within - half);
}
