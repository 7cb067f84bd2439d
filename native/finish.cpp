// States to results: values in double, rounded once to the result's dtype, and their validity. Compiled once.
#define MASKSERVE_ISA any_processor

#include <cmath>

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "elementary.hpp"

#include "narrow.hpp"

#include "powers.hpp"

#include "mantissas.hpp"

double at_least_one(int64_t count) { return static_cast<double>(count > 1 ? count : 1); }

// The parts of states, under the names that the passes give them.
struct Reader {
  const States& states;
  const Options& options;
  template <class T>
  T part(int k, int64_t j) const {
    return static_cast<const T*>(states.part_ptr[k])[j];
  }
  double number(int k, int64_t j) const { return part<double>(k, j); }
  int64_t integer(int k, int64_t j) const { return part<int64_t>(k, j); }
  double n(int64_t j) const { return at_least_one(states.count_ptr[j]); }
  double scale(int64_t j) const { return integer(2, j) ? 0x1p128 : 1.0; }
  double limbs(int64_t j) const { return static_cast<double>(integer(0, j)) * 0x1p32 + static_cast<double>(integer(1, j)); }
  double variance(int64_t j) const {
    const double divisor = static_cast<double>(states.count_ptr[j]) - options.correction;
    return number(2, j) / (divisor > 0.0 ? divisor : 1.0);
  }
  double log_sum(int64_t j) const {
    const double top = number(0, j);
    return is_finite(top) ? top + logarithm(number(1, j)) : top;
  }
};

struct Writer {
  const States& states;
  const Limits& limits;
  unsigned char* values_ptr;
  unsigned char* mask_ptr;
  const double* weight_ptr = nullptr;

  bool valid(int64_t j) const {
    const int64_t count = states.count_ptr[j];
    if (weight_ptr && weight_ptr[j] == 0.0) return false;
    return count >= limits.min_count && static_cast<double>(count) > limits.needs;
  }

  // get(j) for each result; hidden ones 0. False where a finite value became inf.
  template <class To, class Get>
  bool rounded(const Get& get) const {
    bool fits = true;
    for (int64_t j = 0; j < states.n; ++j) {
      const double value = get(j);
      const double size = value < 0.0 ? -value : value;
      fits &= !(size >= To::overflow && is_finite(value));
      store(j, To::narrow(value));
    }
    return fits;
  }

  template <class Raw>
  void store(int64_t j, Raw raw) const {
    const bool is_valid = valid(j);
    mask_ptr[j] = is_valid;
    raw = is_valid ? raw : Raw{0};
    std::memcpy(values_ptr + j * static_cast<int64_t>(sizeof raw), &raw, sizeof raw);
  }

  template <class Get>
  int doubles(Dtype dtype, const Get& get) const {
    bool fits = false;
    switch (dtype) {
      case Dtype::f64: fits = rounded<ToF64>(get); break;
      case Dtype::f32: fits = rounded<ToF32>(get); break;
      case Dtype::f16: fits = rounded<ToF16>(get); break;
      case Dtype::bf16: fits = rounded<ToBF16>(get); break;
      default: break;
    }
    return fits ? fill_done : fill_refused;
  }

  // The first part as it is, a NaN made canonical; infinity 0: an integer.
  template <class Raw>
  int same(Raw infinity) const {
    for (int64_t j = 0; j < states.n; ++j) {
      Raw raw = static_cast<const Raw*>(states.part_ptr[0])[j];
      const Raw magnitude = static_cast<Raw>(raw & static_cast<Raw>(static_cast<Raw>(~Raw{0}) >> 1));
      if (infinity && magnitude > infinity) raw = static_cast<Raw>(infinity | ((infinity & -infinity) >> 1));
      store(j, raw);
    }
    return fill_done;
  }

  int same_of(Dtype dtype) const {
    switch (dtype) {
      case Dtype::f64: return same<uint64_t>(0x7ff0000000000000u);
      case Dtype::f32: return same<uint32_t>(0x7f800000u);
      case Dtype::f16: return same<uint16_t>(0x7c00u);
      case Dtype::bf16: return same<uint16_t>(0x7f80u);
      case Dtype::i64: return same<uint64_t>(0);
      case Dtype::i32: return same<uint32_t>(0);
      case Dtype::i16: return same<uint16_t>(0);
      default: return same<uint8_t>(0);
    }
  }

  // Products, exact; refused where one leaves int64. Beside 2^63 its estimate cannot tell, and the sign can: what wraps
  // there changes it.
  template <class Estimate>
  int whole_products(const Reader& of, const Estimate& estimate) const {
    bool fits = true;
    for (int64_t j = 0; j < states.n; ++j) {
      const int64_t wrapped = of.integer(3, j);
      const double about = estimate(j);
      const bool same_sign = (wrapped > 0) == (about > 0.0) && (wrapped < 0) == (about < 0.0);
      fits &= !valid(j) || (size_of(about) < 0x1p63 * (1 + 1e-9) && same_sign);
      store(j, static_cast<uint64_t>(wrapped));
    }
    return fits ? fill_done : fill_refused;
  }

  // The largest less the smallest integer; refused where that leaves the dtype.
  template <class Whole>
  int whole_ranges(const Reader& of) const {
    bool fits = true;
    for (int64_t j = 0; j < states.n; ++j) {
      Whole range;
      const bool overflows = __builtin_sub_overflow(of.part<Whole>(1, j), of.part<Whole>(0, j), &range);
      fits &= !valid(j) || (!overflows && range >= 0);
      store(j, static_cast<std::make_unsigned_t<Whole>>(range));
    }
    return fits ? fill_done : fill_refused;
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
    bool fits = true;
    for (int64_t j = 0; j < states.n; ++j) {
      const int64_t high = of.integer(0, j);
      fits &= high >= -(int64_t{1} << 31) && high < int64_t{1} << 31;
      store(j, (static_cast<uint64_t>(high) << 32) + static_cast<uint64_t>(of.integer(1, j)));
    }
    return fits ? fill_done : fill_refused;
  }
};

}  // namespace
}  // namespace MASKSERVE_ISA

int finish(int kernel, const States& states, const Options& options, const Limits& limits, Dtype dtype,
           unsigned char* values_ptr, unsigned char* mask_ptr) {
  using namespace MASKSERVE_ISA;
  const Reader of{states, options};
  Writer to{states, limits, values_ptr, mask_ptr};
  const auto nonzero = [](double weight) { return weight == 0.0 ? 1.0 : weight; };
  const auto weighted_variance = [=](int64_t j) { return of.number(3, j) / nonzero(of.number(0, j)); };
  const auto product = [=](int64_t j) { return scaled(of.number(0, j) + of.number(1, j), of.integer(2, j)); };
  switch (static_cast<Finish>(kernel)) {
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
    case Finish::same: return to.same_of(dtype);
    case Finish::count:
      for (int64_t j = 0; j < states.n; ++j) to.store(j, static_cast<uint64_t>(states.count_ptr[j]));
      return fill_done;
    case Finish::at:
      for (int64_t j = 0; j < states.n; ++j) to.store(j, static_cast<uint64_t>(of.integer(1, j)));
      return fill_done;
    case Finish::any:
      for (int64_t j = 0; j < states.n; ++j) to.store(j, static_cast<uint8_t>(of.integer(0, j) > 0));
      return fill_done;
    case Finish::all:
      for (int64_t j = 0; j < states.n; ++j) {
        to.store(j, static_cast<uint8_t>(of.integer(0, j) == states.count_ptr[j]));
      }
      return fill_done;
    case Finish::logsumexp: return to.doubles(dtype, [=](int64_t j) { return of.log_sum(j); });
    case Finish::prod:
      return dtype == Dtype::i64 ? to.whole_products(of, product) : to.doubles(dtype, product);
    case Finish::ptp: return to.ranges_of(of, dtype);
    case Finish::weighted_sum:
      to.weight_ptr = static_cast<const double*>(states.part_ptr[0]);
      return to.doubles(dtype, [=](int64_t j) {
        return (of.number(2, j) + of.number(3, j)) * (of.integer(4, j) ? 0x1p128 : 1.0);
      });
    case Finish::weighted_mean:
      to.weight_ptr = static_cast<const double*>(states.part_ptr[0]);
      return to.doubles(dtype, [=](int64_t j) {
        return (of.number(2, j) + of.number(3, j)) / nonzero(of.number(0, j) + of.number(1, j)) *
               (of.integer(4, j) ? 0x1p128 : 1.0);
      });
    case Finish::weighted_var:
      to.weight_ptr = static_cast<const double*>(states.part_ptr[0]);
      return to.doubles(dtype, weighted_variance);
    case Finish::weighted_std:
      to.weight_ptr = static_cast<const double*>(states.part_ptr[0]);
      return to.doubles(dtype, [=](int64_t j) { return std::sqrt(weighted_variance(j)); });
    case Finish::norm: {
      const Order order = order_of(options.ord);
      return to.doubles(dtype, [=](int64_t j) { return norm_of(order, of.number(0, j), of.number(1, j), of.number(2, j)); });
    }
  }
  return fill_refused;
}

void raise(const double* cells_ptr, double* raised_ptr, int64_t n) {
  for (int64_t j = 0; j < n; ++j) raised_ptr[j] = MASKSERVE_ISA::exponential(cells_ptr[j]);
}

}  // namespace maskserve
