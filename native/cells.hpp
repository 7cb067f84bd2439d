// Values on the way from a cell to a leaf result: how a cell is loaded and widened, and how one value absorbs another.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

// ---- values: absorb() is the one step of the tree -----------------------------------------------------------------

template <class T>
struct Sum {
  T sum;
  Sum() = default;
  explicit Sum(T value) : sum(value) {}
  template <class Narrow>
  explicit Sum(Sum<Narrow> narrow) : sum(narrow.sum) {}
};

template <class T>
ALWAYS_INLINE Sum<T> absorb(Sum<T> a, Sum<T> b) {
  return Sum<T>(static_cast<T>(a.sum + b.sum));
}

// An f64 cell nothing was added to yet: it needs no low part.
struct Lone {
  double value;
};

// hi + lo, the rounding errors of the additions being in lo.
struct Twofold {
  double hi, lo;
  Twofold() = default;
  Twofold(double high, double low) : hi(high), lo(low) {}
  explicit Twofold(Lone cell) : hi(cell.value), lo(0.0) {}
};

// Knuth's two-sum: the exact error of a + b, whatever their magnitudes.
ALWAYS_INLINE double rounding_error(double a, double b, double s) {
  const double bb = s - a;
  return (a - (s - bb)) + (b - bb);
}

ALWAYS_INLINE Twofold absorb(Twofold a, Twofold b) {
  const double s = a.hi + b.hi;
  return {s, (a.lo + b.lo) + rounding_error(a.hi, b.hi, s)};
}

ALWAYS_INLINE Twofold absorb(Lone a, Lone b) {
  const double s = a.value + b.value;
  return {s, rounding_error(a.value, b.value, s)};
}

ALWAYS_INLINE Twofold absorb(Twofold a, Lone b) { return absorb(a, Twofold(b)); }

// 64-bit integers: the two halves summed apart, so that no sum of a leaf overflows.
struct Halves {
  int64_t high, low;
  Halves() = default;
  Halves(int64_t high_half, int64_t low_half) : high(high_half), low(low_half) {}
};

ALWAYS_INLINE Halves absorb(Halves a, Halves b) { return {a.high + b.high, a.low + b.low}; }

// ---- lanes: many values side by side, one array for each member ---------------------------------------------------

template <class Value>
struct Lanes;

template <class T>
struct Lanes<Sum<T>> {
  T* sum;
  ALWAYS_INLINE Sum<T> get(int64_t j) const { return Sum<T>(sum[j]); }
  ALWAYS_INLINE void set(int64_t j, Sum<T> value) const { sum[j] = value.sum; }
  Lanes from(int64_t j) const { return {sum + j}; }
};

template <>
struct Lanes<Lone> {
  double* value;
  ALWAYS_INLINE Lone get(int64_t j) const { return {value[j]}; }
  ALWAYS_INLINE void set(int64_t j, Lone cell) const { value[j] = cell.value; }
  Lanes from(int64_t j) const { return {value + j}; }
};

template <>
struct Lanes<Twofold> {
  double *hi, *lo;
  ALWAYS_INLINE Twofold get(int64_t j) const { return {hi[j], lo[j]}; }
  ALWAYS_INLINE void set(int64_t j, Twofold value) const { hi[j] = value.hi, lo[j] = value.lo; }
  Lanes from(int64_t j) const { return {hi + j, lo + j}; }
};

template <>
struct Lanes<Halves> {
  int64_t *high, *low;
  ALWAYS_INLINE Halves get(int64_t j) const { return {high[j], low[j]}; }
  ALWAYS_INLINE void set(int64_t j, Halves value) const { high[j] = value.high, low[j] = value.low; }
  Lanes from(int64_t j) const { return {high + j, low + j}; }
};

// Room for n values; never initialised.
template <class Value, int n>
struct Room;

template <class T, int n>
struct Room<Sum<T>, n> {
  alignas(64) T sum[n];
  Lanes<Sum<T>> lanes() { return {sum}; }
};

template <int n>
struct Room<Lone, n> {
  alignas(64) double value[n];
  Lanes<Lone> lanes() { return {value}; }
};

template <int n>
struct Room<Twofold, n> {
  alignas(64) double hi[n], lo[n];
  Lanes<Twofold> lanes() { return {hi, lo}; }
};

template <int n>
struct Room<Halves, n> {
  alignas(64) int64_t high[n], low[n];
  Lanes<Halves> lanes() { return {high, low}; }
};

// ---- cells: the bits of one element, and what it widens to --------------------------------------------------------

template <class To, class From>
ALWAYS_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct F32Cell {
  using Raw = uint32_t;
  using Wide = Sum<double>;
  static ALWAYS_INLINE Wide widen(Raw raw) { return Wide(static_cast<double>(bits_as<float>(raw))); }
};

struct BF16Cell {
  using Raw = uint16_t;
  using Wide = Sum<double>;
  static ALWAYS_INLINE Wide widen(Raw raw) {
    return Wide(static_cast<double>(bits_as<float>(static_cast<uint32_t>(raw) << 16)));
  }
};

struct F16Cell {
  using Raw = uint16_t;
  using Wide = Sum<double>;
  // The exponent is rebiased as an integer. A subnormal is built one exponent up and has the implied leading one
  // subtracted again: no subnormal float32 is ever an operand (slow, and flushed to zero in some modes).
  static ALWAYS_INLINE Wide widen(Raw raw) {
    const uint32_t magnitude = raw & 0x7fffu;
    const uint32_t rebias = 112u << 23;
    uint32_t bits = (magnitude << 13) + rebias;
    bits += magnitude >= 0x7c00u ? rebias : 0u;
    bits += magnitude < 0x400u ? 1u << 23 : 0u;
    const float value = bits_as<float>(bits) - (magnitude < 0x400u ? 0x1p-14f : 0.0f);
    const uint32_t sign = static_cast<uint32_t>(raw & 0x8000u) << 16;
    return Wide(static_cast<double>(bits_as<float>(bits_as<uint32_t>(value) | sign)));
  }
};

struct F64Cell {
  using Raw = uint64_t;
  using Wide = Lone;
  static ALWAYS_INLINE Wide widen(Raw raw) { return {bits_as<double>(raw)}; }
};

// A cell of a shorter dtype, gathered: its sums need no low part.
struct DoubleCell {
  using Raw = uint64_t;
  using Wide = Sum<double>;
  static ALWAYS_INLINE Wide widen(Raw raw) { return Wide(bits_as<double>(raw)); }
};

constexpr double scale_down = 0x1p-128;

struct ScaledF64Cell {
  using Raw = uint64_t;
  using Wide = Lone;
  static ALWAYS_INLINE Wide widen(Raw raw) { return {bits_as<double>(raw) * scale_down}; }
};

template <class Bits, class Signed, class WideInt>
struct IntCell {
  using Raw = Bits;
  using Wide = Sum<WideInt>;
  static ALWAYS_INLINE Wide widen(Raw raw) { return Wide(static_cast<WideInt>(static_cast<Signed>(raw))); }
};

struct I64Cell {
  using Raw = uint64_t;
  using Wide = Halves;
  static ALWAYS_INLINE Wide widen(Raw raw) {
    return {static_cast<int64_t>(raw) >> 32, static_cast<int64_t>(raw & 0xffffffffu)};
  }
};

template <class Cell>
ALWAYS_INLINE typename Cell::Raw load_raw(const unsigned char* cells_ptr, int64_t j) {
  typename Cell::Raw raw;  // by memcpy: a cell may lie at any address
  std::memcpy(&raw, cells_ptr + j * static_cast<int64_t>(sizeof raw), sizeof raw);
  return raw;
}

// Cells that choose by themselves what lies under the mask: widen<masked>(raw, byte of the mask).
struct Chooses {};

// And are read with what is known of their lane, lanes[0].
struct OfLanes : Chooses {};

template <class Cell>
constexpr bool is_of_lanes = std::is_base_of_v<OfLanes, Cell>;

template <class Cell>
ALWAYS_INLINE Cell of_lane(const Cell& cell, int64_t lane) {
  if constexpr (is_of_lanes<Cell>) return Cell(cell.lanes + lane);
  return cell;
}

// A cell under the mask becomes +0 by an integer AND: whatever lay there, NaN too, is gone, with no branch.
template <class Cell, bool masked>
ALWAYS_INLINE typename Cell::Wide load_cell(const Cell& cell, const unsigned char* cells_ptr,
                                            const unsigned char* mask_ptr, int64_t j) {
  using Raw = typename Cell::Raw;
  const Raw raw = load_raw<Cell>(cells_ptr, j);
  if constexpr (std::is_base_of_v<Chooses, Cell>) {
    return cell.template widen<masked>(raw, masked ? mask_ptr[j] : 1);
  } else if constexpr (!masked) {
    return Cell::widen(raw);
  } else {
    return Cell::widen(static_cast<Raw>(raw & static_cast<Raw>(-static_cast<Raw>(mask_ptr[j]))));
  }
}

// 1 for a number, 0 for a NaN.
template <class RawBits>
struct ToNumber {
  using Raw = RawBits;
  using Out = uint8_t;
  using Bits = uint8_t;
  Raw infinity;
  uint8_t hidden = 0;
  ALWAYS_INLINE uint8_t operator()(Raw raw) const {
    return (raw & static_cast<Raw>(static_cast<Raw>(~Raw{0}) >> 1)) <= infinity;
  }
};

// visit(what tells the numbers of a floating dtype).
template <class Visit>
ALWAYS_INLINE void with_numbers(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::f64: return visit(ToNumber<uint64_t>{0x7ff0000000000000u});
    case Dtype::f32: return visit(ToNumber<uint32_t>{0x7f800000u});
    case Dtype::f16: return visit(ToNumber<uint16_t>{0x7c00u});
    default: return visit(ToNumber<uint16_t>{0x7f80u});
  }
}

template <class T>
ALWAYS_INLINE double as_double(Sum<T> value) {
  return static_cast<double>(value.sum);
}
ALWAYS_INLINE double as_double(Lone value) { return value.value; }
ALWAYS_INLINE double as_double(Halves value) {
  return static_cast<double>(static_cast<int64_t>(static_cast<uint64_t>(value.high) << 32 |
                                                  static_cast<uint64_t>(value.low)));
}

// As wide as a vector loop over doubles likes them.
using I8Cell = IntCell<uint8_t, int8_t, int32_t>;
using U8Cell = IntCell<uint8_t, uint8_t, int32_t>;
using I16Cell = IntCell<uint16_t, int16_t, int32_t>;
using I32Cell = IntCell<uint32_t, int32_t, int32_t>;

// visit(the cell type of a dtype).
template <class Visit>
ALWAYS_INLINE void with_cell(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::f64: return visit(F64Cell());
    case Dtype::f32: return visit(F32Cell());
    case Dtype::f16: return visit(F16Cell());
    case Dtype::bf16: return visit(BF16Cell());
    case Dtype::i8: return visit(I8Cell());
    case Dtype::i16: return visit(I16Cell());
    case Dtype::i32: return visit(I32Cell());
    case Dtype::i64: return visit(I64Cell());
    case Dtype::u8:
    case Dtype::boolean: return visit(U8Cell());
  }
}

// ---- what each dtype sums ------------------------------------------------------------------------------------------
// Near holds any sum of up to 64 cells, Far of a leaf: small integers are widened in steps.

struct F32Sum {
  using Cell = F32Cell;
  using Near = Sum<double>;
  using Far = Sum<double>;
  using State = PlainState;
};
struct DoubleSum : F32Sum {
  using Cell = DoubleCell;
};
struct F64Sum {
  using Cell = F64Cell;
  using Near = Twofold;
  using Far = Twofold;
  using State = TwofoldState;
};
struct ScaledF64Sum : F64Sum {
  using Cell = ScaledF64Cell;
};
template <class CellType>
struct IntSum {
  using Cell = CellType;
  using Near = typename Cell::Wide;
  using Far = Sum<int64_t>;
  using State = LimbState;
};
using I8Sum = IntSum<IntCell<uint8_t, int8_t, int16_t>>;
using U8Sum = IntSum<IntCell<uint8_t, uint8_t, int16_t>>;  // 64 * 255 < 2^15
using I16Sum = IntSum<IntCell<uint16_t, int16_t, int32_t>>;
using I32Sum = IntSum<IntCell<uint32_t, int32_t, int64_t>>;
struct I64Sum {
  using Cell = I64Cell;
  using Near = Halves;
  using Far = Halves;
  using State = LimbState;
};
struct MaskSum {
  using Cell = IntCell<uint8_t, uint8_t, uint8_t>;  // bytes 0 or 1: 64 of them fit a byte
  using Near = Sum<uint8_t>;
  using Far = Sum<int64_t>;
  using State = CountState;
};
