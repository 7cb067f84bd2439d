// exp and log in double precision: plain loops over them are vectors, with the same bits from every instruction set.
// Below 1 ulp. Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

constexpr double ln2_high = 0x1.62e42feep-1;  // 32 bits: a product with an exponent is exact
constexpr double ln2_low = 0x1.a39ef35793c76p-33;

// 2^k for -1022 <= k <= 1023.
ALWAYS_INLINE double power_of_two(int64_t k) { return bits_as<double>(static_cast<uint64_t>(k + 1023) << 52); }

// exp(x) = 2^k exp(r), |r| <= ln(2) / 2: Taylor's series to r^13, its error below 2^-57. The two powers of two round
// once at most, where the result is subnormal, and reach 0 and inf by themselves.
ALWAYS_INLINE double exponential(double x) {
  const double clamped = x < -800.0 ? -800.0 : x > 800.0 ? 800.0 : x;  // NaN stays
  constexpr double round_to_integer = 0x1.8p52;
  const double shifted = clamped * 0x1.71547652b82fep0 + round_to_integer;
  const double k = shifted - round_to_integer;
  const double high = clamped - k * ln2_high, low = k * ln2_low;
  const double r = high - low;
  const double r_error = (high - r) - low;
  double series = 1.0 / 6227020800.0;
  series = series * r + 1.0 / 479001600.0;
  series = series * r + 1.0 / 39916800.0;
  series = series * r + 1.0 / 3628800.0;
  series = series * r + 1.0 / 362880.0;
  series = series * r + 1.0 / 40320.0;
  series = series * r + 1.0 / 5040.0;
  series = series * r + 1.0 / 720.0;
  series = series * r + 1.0 / 120.0;
  series = series * r + 1.0 / 24.0;
  series = series * r + 1.0 / 6.0;
  series = series * r + 0.5;
  const double y = 1.0 + (r + (series * (r * r) + r_error));
  // k + 4096 > 0, so that a logical shift halves it: AVX2 has no arithmetic one
  const uint64_t biased = bits_as<uint64_t>(shifted) - bits_as<uint64_t>(round_to_integer) + 4096;
  const uint64_t half = biased >> 1, rest = biased - half;
  return y * bits_as<double>((half - 2048 + 1023) << 52) * bits_as<double>((rest - 2048 + 1023) << 52);
}

// exp(x) for x <= 0 to 2^-34, and 2^-1010 for all below it: half the steps, for what is rounded to float32 or less. The
// polynomial is 1 + r + r^2 p(r), p fitted for the least relative error.
ALWAYS_INLINE double quick_exponential(double x) {
  const double clamped = x < -700.0 ? -700.0 : x;  // NaN stays
  constexpr double round_to_integer = 0x1.8p52;
  const double shifted = clamped * 0x1.71547652b82fep0 + round_to_integer;
  const double r = clamped - (shifted - round_to_integer) * 0x1.62e42fefa39efp-1;
  double series = 0x1.9f085a86b2c3ep-13;
  series = series * r + 0x1.6d8d525635662p-10;
  series = series * r + 0x1.1112714545ef4p-7;
  series = series * r + 0x1.55548d7480e7ep-5;
  series = series * r + 0x1.5555544292901p-3;
  series = series * r + 0x1.0000003a461d0p-1;
  const double y = 1.0 + (r + series * (r * r));
  // k stands in the last bits of `shifted`; y is in [0.7, 1.5], and its exponent has room for k > -1022
  return y * bits_as<double>((bits_as<uint64_t>(shifted) << 52) + (static_cast<uint64_t>(1023) << 52));
}

// log(x) - large for finite x > 0, where large is the log of a power of two to 32 bits: fdlibm's e_log.c, with s^2 the
// square of f / (2 + f).
ALWAYS_INLINE double logarithm_rest(double x, double& large) {
  const double scaled = x < 0x1p-1022 ? x * 0x1p54 : x;
  const uint64_t bits = bits_as<uint64_t>(scaled);
  const uint64_t shifted = bits - 0x3fe6a09e667f3bcdu;  // sqrt(1/2): the fraction is in [sqrt(1/2), sqrt(2))
  const int64_t exponent = static_cast<int64_t>(shifted) >> 52;
  const double fraction = bits_as<double>(bits - (static_cast<uint64_t>(exponent) << 52));
  const double k = static_cast<double>(exponent) - (x < 0x1p-1022 ? 54.0 : 0.0);
  const double f = fraction - 1.0, s = f / (2.0 + f), z = s * s, w = z * z;
  const double odd = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
  const double even = z * (6.666666666666735130e-01 +
                           w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
  const double half_square = 0.5 * f * f;
  large = k * ln2_high;
  return f - (half_square - (s * (half_square + (odd + even)) + k * ln2_low));
}

// log(x) for x >= 0.
ALWAYS_INLINE double logarithm(double x) {
  double large;
  const double rest = logarithm_rest(x, large), value = large + rest;
  if (x == 0.0) return -std::numeric_limits<double>::infinity();
  return x <= std::numeric_limits<double>::max() ? value : x;  // inf and NaN
}
