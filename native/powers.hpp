// Sums of powers of |cell|, the common orders alone, and the norms that they are.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

enum class Order { zero, half, one, two, three, inverse, inverse_square, largest, smallest };

inline Order order_of(double ord) {
  if (ord == 0.0) return Order::zero;
  if (ord == 0.5) return Order::half;
  if (ord == 1.0) return Order::one;
  if (ord == 3.0) return Order::three;
  if (ord == -1.0) return Order::inverse;
  if (ord == -2.0) return Order::inverse_square;
  if (ord == infinity) return Order::largest;
  if (ord == -infinity) return Order::smallest;
  return Order::two;
}

constexpr bool is_inverse(Order order) {
  return order == Order::inverse || order == Order::inverse_square || order == Order::smallest;
}
constexpr bool is_extreme(Order order) { return order == Order::largest || order == Order::smallest; }

ALWAYS_INLINE double size_of(double x) { return bits_as<double>(bits_as<uint64_t>(x) & 0x7fffffffffffffffu); }

template <Order order>
ALWAYS_INLINE double power(double size) {
  if constexpr (order == Order::zero) return size != 0.0 ? 1.0 : 0.0;
  if constexpr (order == Order::half) return __builtin_sqrt(size);
  if constexpr (order == Order::two) return size * size;
  if constexpr (order == Order::three) return size * size * size;
  if constexpr (order == Order::inverse) return 1.0 / size;
  if constexpr (order == Order::inverse_square) return 1.0 / (size * size);
  return size;
}

// (total + low)^(1 / ord) * scale.
ALWAYS_INLINE double norm_of(Order order, double total, double low, double scale) {
  switch (order) {
    case Order::one: return (total + low) * scale;
    case Order::inverse: return 1.0 / (total + low) * scale;
    case Order::half: return (is_finite(total) ? total * total + 2.0 * total * low : total) * scale;
    case Order::two:
    case Order::inverse_square: {
      const double plain = __builtin_sqrt(total), corrected = plain + low / (2.0 * plain);
      const double better = plain > 0.0 && is_finite(plain) ? corrected : plain;
      return (order == Order::two ? better : 1.0 / better) * scale;
    }
    case Order::three: {  // one step of Newton's method makes good what the root was rounded by
      const double plain = __builtin_cbrt(total);
      const double better = plain - plain * ((plain * plain * plain - total) - low) / (3.0 * total);
      return (total > 0.0 && is_finite(better) ? better : plain) * scale;
    }
    default: return total;
  }
}
