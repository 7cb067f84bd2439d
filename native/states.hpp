// States: what a leaf, and any tree of leaves, is remembered as; one state is n_lanes results side by side.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

constexpr int n_lanes = 256;  // results computed side by side; a state of them is a few KB

template <class T>
ALWAYS_INLINE void copy_lanes(const T* from, int64_t n, void* to) {
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
}

// A NaN's sign and payload depend on the order of an addition's operands, which compilers choose.
inline void copy_canonical(const double* from, int64_t n, void* to) {
  double* out = static_cast<double*>(to);
  for (int64_t j = 0; j < n; ++j) out[j] = from[j] == from[j] ? from[j] : not_a_number;
}

struct CountState {
  alignas(64) int64_t count[n_lanes];

  void clear(int64_t n) {
    for (int64_t j = 0; j < n; ++j) count[j] = 0;
  }
  void join(const CountState& right, int64_t n) {
    for (int64_t j = 0; j < n; ++j) count[j] += right.count[j];
  }
  void write(const Parts&, int64_t, int64_t) const {}
};

struct PlainState {
  alignas(64) double total[n_lanes];

  void clear(int64_t n) {
    for (int64_t j = 0; j < n; ++j) total[j] = 0.0;
  }
  void join(const PlainState& right, int64_t n) {
    for (int64_t j = 0; j < n; ++j) total[j] += right.total[j];
  }
  void write(const Parts& parts, int64_t at, int64_t n) const {
    copy_canonical(total, n, static_cast<double*>(parts.part_ptr[0]) + at);
  }
};

// The sum is high * 2^32 + low with 0 <= low < 2^32.
struct LimbState {
  alignas(64) int64_t high[n_lanes];
  alignas(64) int64_t low[n_lanes];

  void clear(int64_t n) {
    for (int64_t j = 0; j < n; ++j) high[j] = low[j] = 0;
  }
  void join(const LimbState& right, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t sum = low[j] + right.low[j];
      high[j] = high[j] + right.high[j] + (sum >> 32);
      low[j] = sum & 0xffffffff;
    }
  }
  void write(const Parts& parts, int64_t at, int64_t n) const {
    copy_lanes(high, n, static_cast<int64_t*>(parts.part_ptr[0]) + at);
    copy_lanes(low, n, static_cast<int64_t*>(parts.part_ptr[1]) + at);
  }
};

constexpr int64_t scaled_exponent = 128;

ALWAYS_INLINE bool is_finite(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7ff0000000000000u) != 0x7ff0000000000000u;
}

// The sum is (hi + lo) * 2^exponent; the exponent is 0, or 128 where something overflowed on the way.
struct TwofoldState {
  alignas(64) double hi[n_lanes];
  alignas(64) double lo[n_lanes];
  alignas(64) int64_t exponent[n_lanes];

  void clear(int64_t n) {
    for (int64_t j = 0; j < n; ++j) hi[j] = lo[j] = 0.0, exponent[j] = 0;
  }

  bool all_finite(int64_t n) const {
    int64_t bad = 0;
    for (int64_t j = 0; j < n; ++j) bad |= !is_finite(hi[j]) | !is_finite(lo[j]);
    return bad == 0;
  }

  bool any_scaled(int64_t n) const {
    int64_t any = 0;
    for (int64_t j = 0; j < n; ++j) any |= exponent[j];
    return any != 0;
  }

  // Most joins need no scaling: try all lanes at once, and go lane by lane only where that met an infinity.
  void join(const TwofoldState& right, int64_t n) {
    TwofoldState sum;
    if (!any_scaled(n) && !right.any_scaled(n)) {
      for (int64_t j = 0; j < n; ++j) {
        const double s = hi[j] + right.hi[j];
        const double bb = s - hi[j];
        sum.lo[j] = (lo[j] + right.lo[j]) + ((hi[j] - (s - bb)) + (right.hi[j] - bb));
        sum.hi[j] = s;
      }
      if (sum.all_finite(n)) {
        copy_lanes(sum.hi, n, hi);
        copy_lanes(sum.lo, n, lo);
        return;
      }
    }
    for (int64_t j = 0; j < n; ++j) join_lane(right, j);
  }

  void join_lane(const TwofoldState& right, int64_t j) {
    const int64_t wanted = exponent[j] > right.exponent[j] ? exponent[j] : right.exponent[j];
    join_lane_at(right, j, wanted);
  }

  void join_lane_at(const TwofoldState& right, int64_t j, int64_t wanted) {
    const double scale_a = exponent[j] < wanted ? 0x1p-128 : 1.0;
    const double scale_b = right.exponent[j] < wanted ? 0x1p-128 : 1.0;
    const double a_hi = hi[j] * scale_a, a_lo = lo[j] * scale_a;
    const double b_hi = right.hi[j] * scale_b, b_lo = right.lo[j] * scale_b;
    const double s = a_hi + b_hi;
    const double bb = s - a_hi;
    const double error = (a_lo + b_lo) + ((a_hi - (s - bb)) + (b_hi - bb));
    if (wanted == 0 && !(is_finite(s) && is_finite(error))) return join_lane_at(right, j, scaled_exponent);
    hi[j] = s;
    lo[j] = is_finite(s) ? error : 0.0;
    exponent[j] = wanted;
  }

  void write(const Parts& parts, int64_t at, int64_t n) const {
    copy_canonical(hi, n, static_cast<double*>(parts.part_ptr[0]) + at);
    copy_canonical(lo, n, static_cast<double*>(parts.part_ptr[1]) + at);
    copy_lanes(exponent, n, static_cast<int64_t*>(parts.part_ptr[2]) + at);
  }
};
