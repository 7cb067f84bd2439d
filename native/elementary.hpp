// exp and log in double precision: plain loops over them are vectors, with the same bits from every instruction set.
// Below 1 ulp. Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

constexpr double ln2_high = 0x1.62e42feep-1;  // 32 bits: a product with an exponent is exact
constexpr double ln2_low = 0x1.a39ef35793c76p-33;

constexpr double round_to_integer = 0x1.8p52;

// exp(r) - 1 - r for |r| <= ln(2) / 2: r^2 / 2 + r^3 p(r), p fitted for the least relative error of exp(r), 2^-57. Odd
// and even powers apart: a chain half as long.
ALWAYS_INLINE double series_of(double r) {
  const double square = r * r;
  double odd = 0x1.ad202c3a3f01cp-26;
  double even = 0x1.289f81b8b23ecp-22;
  odd = odd * square + 0x1.71df55223be7dp-19;
  even = even * square + 0x1.a019ab35a72e4p-16;
  odd = odd * square + 0x1.a01a011c37fe1p-13;
  even = even * square + 0x1.6c16c17cc0c0bp-10;
  odd = odd * square + 0x1.111111112882cp-7;
  even = even * square + 0x1.555555555320ep-5;
  odd = odd * square + 0x1.5555555555501p-3;
  even = even * square + 0.5;
  return (odd * r + even) * square;
}

// exp(x) = 2^k exp(r). The two powers of two round once at most, where the result is subnormal, and reach 0 and inf by
// themselves.
ALWAYS_INLINE double exponential(double x) {
  const double clamped = x < -800.0 ? -800.0 : x > 800.0 ? 800.0 : x;  // NaN stays
  const double shifted = clamped * 0x1.71547652b82fep0 + round_to_integer;
  const double k = shifted - round_to_integer;
  const double high = clamped - k * ln2_high, low = k * ln2_low;
  const double r = high - low;
  const double r_error = (high - r) - low;
  const double y = 1.0 + (r + (series_of(r) + r_error));
  // k + 4096 > 0, so that a logical shift halves it: AVX2 has no arithmetic one
  const uint64_t biased = bits_as<uint64_t>(shifted) - bits_as<uint64_t>(round_to_integer) + 4096;
  const uint64_t half = biased >> 1, rest = biased - half;
  return y * bits_as<double>((half - 2048 + 1023) << 52) * bits_as<double>((rest - 2048 + 1023) << 52);
}

// 2^k where k stands in the last bits of `shifted`, -1022 <= k <= 1023.
ALWAYS_INLINE double power_in(double shifted) {
  return bits_as<double>((bits_as<uint64_t>(shifted) << 52) + (static_cast<uint64_t>(1023) << 52));
}

constexpr double least_below = -600.0;

// exp(x) for x <= 0, and 2^-866 for all below it, far from the subnormals: for sums whose largest term is 1.
ALWAYS_INLINE double exponential_below(double x) {
  const double clamped = x < least_below ? least_below : x;  // NaN stays
  const double shifted = clamped * 0x1.71547652b82fep0 + round_to_integer;
  const double k = shifted - round_to_integer;
  const double r = (clamped - k * ln2_high) - k * ln2_low;
  return (1.0 + (r + series_of(r))) * power_in(shifted);
}

// exp(x) for x <= 0 to 2^-34, and exp(least) for all below it: half the steps, for what is rounded to float32 or less.
// The polynomial is 1 + r + r^2 p(r), p fitted for the least relative error.
ALWAYS_INLINE double quick_exponential(double x, double least = -700.0) {
  const double clamped = x < least ? least : x;  // NaN stays
  const double shifted = clamped * 0x1.71547652b82fep0 + round_to_integer;
  const double r = clamped - (shifted - round_to_integer) * 0x1.62e42fefa39efp-1;
  const double square = r * r;
  const double high = 0x1.9f085a86b2c3ep-13 * r + 0x1.6d8d525635662p-10;
  const double middle = 0x1.1112714545ef4p-7 * r + 0x1.55548d7480e7ep-5;
  const double low = 0x1.5555544292901p-3 * r + 0x1.0000003a461d0p-1;
  const double y = 1.0 + (r + ((high * square + middle) * square + low) * square);
  return y * power_in(shifted);  // y is in [0.7, 1.5], and its exponent has room for k > -1022
}

// log(x) - large for finite x > 0, where large is the log of a power of two to 32 bits: fdlibm's e_log.c, with s^2 the
// square of f / (2 + f).
ALWAYS_INLINE double logarithm_rest(double x, double& large) {
  const double scaled = x < 0x1p-1022 ? x * 0x1p54 : x;
  const uint64_t bits = bits_as<uint64_t>(scaled);
  const uint64_t shifted = bits - 0x3fe6a09e667f3bcdu;  // sqrt(1/2): the fraction is in [sqrt(1/2), sqrt(2))
  // the exponent + 1024 is never negative: SSE2 and AVX2 have no arithmetic shift, and no conversion to double
  const uint64_t exponent = (shifted + (static_cast<uint64_t>(1024) << 52)) >> 52;
  const double fraction = bits_as<double>((shifted & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu);
  const double k = (bits_as<double>(exponent | 0x4330000000000000u) - (0x1p52 + 1024.0)) - (x < 0x1p-1022 ? 54.0 : 0.0);
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
  const double end = x == 0.0 ? -infinity : x;  // inf and NaN stay
  return (x > 0.0) & (x <= std::numeric_limits<double>::max()) ? value : end;
}
