// States to results: values in double, rounded once to the result's dtype, and their validity.

#include <cmath>

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "elementary.hpp"

#include "powers.hpp"

#include "mantissas.hpp"

// The parts of states, under the names that the passes give them.
struct Reader {
  const int64_t* count_ptr;
  const void* part_ptr[n_parts];
  double correction;

  Reader(const States& states, const Options& options) : count_ptr(states.count_ptr), correction(options.correction) {
    for (int k = 0; k < n_parts; ++k) part_ptr[k] = states.part_ptr[k];
  }
  template <class T>
  ALWAYS_INLINE T part(int k, int64_t j) const {
    return static_cast<const T*>(part_ptr[k])[j];
  }
  ALWAYS_INLINE double number(int k, int64_t j) const { return part<double>(k, j); }
  ALWAYS_INLINE int64_t integer(int k, int64_t j) const { return part<int64_t>(k, j); }
  ALWAYS_INLINE double n(int64_t j) const { return static_cast<double>(count_ptr[j] > 1 ? count_ptr[j] : 1); }
  ALWAYS_INLINE double scale(int64_t j) const { return integer(2, j) ? 0x1p128 : 1.0; }
  ALWAYS_INLINE double limbs(int64_t j) const {
    return static_cast<double>(integer(0, j)) * 0x1p32 + static_cast<double>(integer(1, j));
  }
  ALWAYS_INLINE double variance(int64_t j) const {
    const double divisor = static_cast<double>(count_ptr[j]) - correction;
    return number(2, j) / (divisor > 0.0 ? divisor : 1.0);
  }
  ALWAYS_INLINE double log_sum(int64_t j) const {
    const double top = number(0, j), whole = top + logarithm(number(1, j));
    return top - top == 0.0 ? whole : top;  // SSE2 compares no 64-bit integers
  }
};

constexpr int64_t n_finished = 1024;  // results at a time: as doubles they stay in L1

struct Writer {
  int64_t n;
  unsigned char* values_ptr;
  const unsigned char* mask_ptr;

  // get(j) for each result; refused where a valid one becomes inf.
  template <class Get>
  int doubles(Dtype dtype, const Get& given) const {
    const Get get = given;
    bool overflowed = false;
    alignas(64) double values[n_finished];
    for (int64_t first = 0; first < n; first += n_finished) {
      Window w;
      w.rows = least(n_finished, n - first), w.columns = 1;
#pragma GCC ivdep
      for (int64_t j = 0; j < w.rows; ++j) values[j] = get(first + j);
      const Filled filled{values_ptr + first * cell_bytes(dtype), nullptr, {nullptr, w.rows, 1, 1}, dtype};
      overflowed |= write_doubles(filled, w, values, mask_ptr + first);
    }
    return overflowed ? fill_refused : fill_done;
  }

  // get(j) for each result as it is; refused where a valid one `wraps`.
  template <class Raw, class Get, class Wraps>
  int exact(const Get& given, const Wraps& given_wraps) const {
    const Get get = given;
    const Wraps wraps = given_wraps;
    const unsigned char* const keep_ptr = mask_ptr;
    unsigned char* const to_ptr = values_ptr;
    unsigned char wrapped = 0;
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      const Raw raw = static_cast<Raw>(get(j) & static_cast<Raw>(-static_cast<Raw>(keep_ptr[j])));
      std::memcpy(to_ptr + j * static_cast<int64_t>(sizeof raw), &raw, sizeof raw);
      wrapped |= static_cast<unsigned char>(keep_ptr[j] & static_cast<unsigned char>(wraps(j)));
    }
    return wrapped ? fill_refused : fill_done;
  }

  template <class Raw, class Get>
  int exact(const Get& get) const {
    return exact<Raw>(get, [](int64_t) { return false; });
  }

  // The first part as it is, a NaN made canonical; infinity 0: an integer.
  template <class Raw>
  int same(const Reader& of, Raw infinity) const {
    const Raw quiet_nan = static_cast<Raw>(infinity | ((infinity & -infinity) >> 1));
    const Raw most = infinity ? infinity : static_cast<Raw>(~Raw{0});
    return exact<Raw>([=](int64_t j) {
      const Raw raw = of.part<Raw>(0, j);
      return static_cast<Raw>(raw & static_cast<Raw>(static_cast<Raw>(~Raw{0}) >> 1)) > most ? quiet_nan : raw;
    });
  }

  int same_of(const Reader& of, Dtype dtype) const {
    switch (dtype) {
      case Dtype::f64: return same<uint64_t>(of, 0x7ff0000000000000u);
      case Dtype::f32: return same<uint32_t>(of, 0x7f800000u);
      case Dtype::f16: return same<uint16_t>(of, 0x7c00u);
      case Dtype::bf16: return same<uint16_t>(of, 0x7f80u);
      case Dtype::i64: return same<uint64_t>(of, 0);
      case Dtype::i32: return same<uint32_t>(of, 0);
      case Dtype::i16: return same<uint16_t>(of, 0);
      default: return same<uint8_t>(of, 0);
    }
  }

  // Products, exact; refused where one leaves int64. Beside 2^63 its estimate cannot tell, and the sign can: what wraps
  // there changes it.
  template <class Estimate>
  int whole_products(const Reader& of, const Estimate& estimate) const {
    return exact<uint64_t>([=](int64_t j) { return static_cast<uint64_t>(of.integer(3, j)); }, [=](int64_t j) {
      const int64_t wrapped = of.integer(3, j);
      const double about = estimate(j);
      const bool same_sign = (wrapped > 0) == (about > 0.0) && (wrapped < 0) == (about < 0.0);
      return !(size_of(about) < 0x1p63 * (1 + 1e-9) && same_sign);
    });
  }

  // The largest less the smallest integer; refused where that leaves the dtype.
  template <class Whole>
  int whole_ranges(const Reader& of) const {
    using Raw = std::make_unsigned_t<Whole>;
    const auto range = [=](int64_t j) { return static_cast<Raw>(of.part<Raw>(1, j) - of.part<Raw>(0, j)); };
    return exact<Raw>(range, [=](int64_t j) {
      return std::is_signed_v<Whole> && static_cast<Whole>(range(j)) < 0;  // of largest >= smallest
    });
  }

  template <class Cell>
  int ranges(const Reader& of, Dtype dtype) const {
    using Raw = typename Cell::Raw;
    return doubles(dtype, [=](int64_t j) {
      return as_double(Cell::widen(of.part<Raw>(1, j))) - as_double(Cell::widen(of.part<Raw>(0, j)));
    });
  }

  int ranges_of(const Reader& of, Dtype dtype) const {
    switch (dtype) {
      case Dtype::f64: return ranges<F64Cell>(of, dtype);
      case Dtype::f32: return ranges<F32Cell>(of, dtype);
      case Dtype::f16: return ranges<F16Cell>(of, dtype);
      case Dtype::bf16: return ranges<BF16Cell>(of, dtype);
      case Dtype::i64: return whole_ranges<int64_t>(of);
      case Dtype::i32: return whole_ranges<int32_t>(of);
      case Dtype::i16: return whole_ranges<int16_t>(of);
      case Dtype::i8: return whole_ranges<int8_t>(of);
      default: return whole_ranges<uint8_t>(of);
    }
  }

  // Exact sums; refused where one leaves int64.
  int integers(const Reader& of) const {
    const auto sum = [=](int64_t j) {
      return (static_cast<uint64_t>(of.integer(0, j)) << 32) + static_cast<uint64_t>(of.integer(1, j));
    };
    return exact<uint64_t>(sum, [=](int64_t j) {
      const int64_t high = of.integer(0, j);
      return high < -(int64_t{1} << 31) || high >= int64_t{1} << 31;
    });
  }
};

// The count from which a result is valid.
int64_t fewest(const Limits& limits) {
  constexpr double most = 0x1p62;
  const double needs = limits.needs < -most ? -most : limits.needs > most ? most : limits.needs;
  const int64_t above = static_cast<int64_t>(std::floor(needs)) + 1;
  return limits.min_count > above ? limits.min_count : above;
}

NEVER_INLINE void write_validity(const int64_t* count_ptr, int64_t n, int64_t fewest, unsigned char* mask_ptr) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) mask_ptr[j] = count_ptr[j] >= fewest;
}

bool is_weighted(Finish kernel) {
  return kernel == Finish::weighted_sum || kernel == Finish::weighted_mean || kernel == Finish::weighted_var ||
         kernel == Finish::weighted_std;
}

}  // namespace

int finish(Finish kernel, const States& states, const Options& options, const Limits& limits, Dtype dtype,
           unsigned char* values_ptr, unsigned char* mask_ptr) {
  const Reader of(states, options);
  const Writer to{states.n, values_ptr, mask_ptr};
  write_validity(states.count_ptr, states.n, fewest(limits), mask_ptr);
  if (is_weighted(kernel)) {
    for (int64_t j = 0; j < states.n; ++j) mask_ptr[j] &= of.number(0, j) != 0.0;
  }
  const auto nonzero = [](double weight) { return weight == 0.0 ? 1.0 : weight; };
  const auto weighted_variance = [=](int64_t j) { return of.number(3, j) / nonzero(of.number(0, j)); };
  const auto product = [=](int64_t j) { return scaled(of.number(0, j) + of.number(1, j), of.integer(2, j)); };
  switch (kernel) {
    case Finish::sum: return to.doubles(dtype, [=](int64_t j) { return of.number(0, j); });
    case Finish::sum_pair:
      return to.doubles(dtype, [=](int64_t j) { return (of.number(0, j) + of.number(1, j)) * of.scale(j); });
    case Finish::sum_limbs:
      if (dtype == Dtype::i64) return to.integers(of);
      return to.doubles(dtype, [=](int64_t j) { return of.limbs(j); });
    case Finish::mean: return to.doubles(dtype, [=](int64_t j) { return of.number(0, j) / of.n(j); });
    case Finish::mean_pair:
      return to.doubles(dtype, [=](int64_t j) { return (of.number(0, j) + of.number(1, j)) / of.n(j) * of.scale(j); });
    case Finish::mean_limbs: return to.doubles(dtype, [=](int64_t j) { return of.limbs(j) / of.n(j); });
    case Finish::var: return to.doubles(dtype, [=](int64_t j) { return of.variance(j); });
    case Finish::std: return to.doubles(dtype, [=](int64_t j) { return std::sqrt(of.variance(j)); });
    case Finish::same: return to.same_of(of, dtype);
    case Finish::count: return to.exact<uint64_t>([=](int64_t j) { return static_cast<uint64_t>(of.count_ptr[j]); });
    case Finish::at: return to.exact<uint64_t>([=](int64_t j) { return static_cast<uint64_t>(of.integer(1, j)); });
    case Finish::any: return to.exact<uint8_t>([=](int64_t j) { return static_cast<uint8_t>(of.integer(0, j) > 0); });
    case Finish::all:
      return to.exact<uint8_t>([=](int64_t j) { return static_cast<uint8_t>(of.integer(0, j) == of.count_ptr[j]); });
    case Finish::logsumexp: return to.doubles(dtype, [=](int64_t j) { return of.log_sum(j); });
    case Finish::prod:
      return dtype == Dtype::i64 ? to.whole_products(of, product) : to.doubles(dtype, product);
    case Finish::ptp: return to.ranges_of(of, dtype);
    case Finish::weighted_sum:
      return to.doubles(dtype, [=](int64_t j) {
        return (of.number(2, j) + of.number(3, j)) * (of.integer(4, j) ? 0x1p128 : 1.0);
      });
    case Finish::weighted_mean:
      return to.doubles(dtype, [=](int64_t j) {
        return (of.number(2, j) + of.number(3, j)) / nonzero(of.number(0, j) + of.number(1, j)) *
               (of.integer(4, j) ? 0x1p128 : 1.0);
      });
    case Finish::weighted_var:
      return to.doubles(dtype, weighted_variance);
    case Finish::weighted_std:
      return to.doubles(dtype, [=](int64_t j) { return std::sqrt(weighted_variance(j)); });
    case Finish::norm: {
      const Order order = order_of(options.ord);
      const auto norms = [&](auto known) {  // a vector loop where the order is known
        return to.doubles(dtype, [=](int64_t j) {
          return norm_of(known ? Order::two : order, of.number(0, j), of.number(1, j), of.number(2, j));
        });
      };
      return order == Order::two ? norms(std::true_type()) : norms(std::false_type());
    }
  }
  return fill_refused;
}

void raise(const double* cells_ptr, double* raised_ptr, int64_t n) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) raised_ptr[j] = exponential(cells_ptr[j]);
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
