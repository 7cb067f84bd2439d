// Keys: signed integers that are larger where the cell is better.
// A float's bits with the magnitude of negative ones inverted are ordered as the floats are, -0 below +0. For the
// smallest cell all bits are inverted. NaN is the largest key, which no other cell has.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

template <class RawBits, bool is_float_>
struct ToKey {
  using Raw = RawBits;
  using Out = std::make_signed_t<Raw>;
  using Bits = Raw;
  static constexpr bool is_float = is_float_;
  static constexpr Raw sign = static_cast<Raw>(Raw{1} << (8 * sizeof(Raw) - 1));
  static constexpr Out nan_key = static_cast<Out>(sign - 1);

  Raw flip;      // all ones for the smallest
  Raw bias;      // the sign bit for unsigned integers
  Raw infinity;  // the bits of +inf
  Out hidden = 0;

  ALWAYS_INLINE Out operator()(Raw raw) const {
    if constexpr (!is_float) return static_cast<Out>(raw ^ bias ^ flip);
    const Raw magnitude = static_cast<Raw>(raw & (sign - 1));
    const Raw ordered = static_cast<Raw>(raw ^ inverted(raw) ^ flip);
    const Raw is_nan = static_cast<Raw>(-static_cast<Raw>(static_cast<Out>(magnitude) > static_cast<Out>(infinity)));
    return static_cast<Out>(choose<Raw>(is_nan, static_cast<Raw>(nan_key), ordered));
  }

  // The cell of a key; NaN is quiet and positive.
  ALWAYS_INLINE Raw cell(Out key) const {
    const Raw raw = static_cast<Raw>(static_cast<Raw>(key) ^ flip);
    if constexpr (!is_float) return static_cast<Raw>(raw ^ bias);
    const Raw quiet = static_cast<Raw>((infinity & -infinity) >> 1);  // the top bit of the mantissa
    if (key == nan_key) return static_cast<Raw>(infinity | quiet);
    return static_cast<Raw>(raw ^ inverted(raw));
  }

  static ALWAYS_INLINE Raw inverted(Raw raw) {
    return static_cast<Raw>(static_cast<Raw>(-static_cast<Raw>(raw >> (8 * sizeof(Raw) - 1))) & (sign - 1));
  }
};

// What stands for a masked cell, and for no cells: -inf or the smallest integer for the largest cell; the opposite.
template <class Raw>
ToKey<Raw, true> float_key(bool largest, Raw infinity) {
  ToKey<Raw, true> key{static_cast<Raw>(largest ? Raw{0} : ~Raw{0}), 0, infinity};
  key.hidden = key(static_cast<Raw>(largest ? infinity | key.sign : infinity));
  return key;
}

template <class Raw>
ToKey<Raw, false> integer_key(bool largest, Raw least_cell, Raw most_cell) {
  ToKey<Raw, false> key{static_cast<Raw>(largest ? Raw{0} : ~Raw{0}),
                        static_cast<Raw>(least_cell == 0 ? Raw{1} << (8 * sizeof(Raw) - 1) : Raw{0}), 0};
  key.hidden = key(largest ? least_cell : most_cell);
  return key;
}

template <class Raw>
ToKey<Raw, false> signed_key(bool largest) {
  const Raw least_cell = static_cast<Raw>(Raw{1} << (8 * sizeof(Raw) - 1));
  return integer_key<Raw>(largest, least_cell, static_cast<Raw>(least_cell - 1));
}

// visit(the key of a dtype's cells).
template <class Visit>
auto with_key(Dtype dtype, bool largest, const Visit& visit) {
  switch (dtype) {
    case Dtype::f64: return visit(float_key<uint64_t>(largest, 0x7ff0000000000000u));
    case Dtype::f32: return visit(float_key<uint32_t>(largest, 0x7f800000u));
    case Dtype::f16: return visit(float_key<uint16_t>(largest, 0x7c00u));
    case Dtype::bf16: return visit(float_key<uint16_t>(largest, 0x7f80u));
    case Dtype::i8: return visit(signed_key<uint8_t>(largest));
    case Dtype::i16: return visit(signed_key<uint16_t>(largest));
    case Dtype::i32: return visit(signed_key<uint32_t>(largest));
    case Dtype::i64: return visit(signed_key<uint64_t>(largest));
    case Dtype::u8: return visit(integer_key<uint8_t>(largest, 0, 255));
    default: return visit(integer_key<uint8_t>(largest, 0, 1));
  }
}

// Keys for selection and order: at least 16 bits wide, smallest cell first, masked ones last. `joins_zeros`: -0 has the
// key of +0.
template <class Key, bool joins_zeros>
struct Ordered {
  using Raw = typename Key::Raw;
  using Out = std::conditional_t<sizeof(Raw) == 1, int16_t, typename Key::Out>;
  using Bits = std::make_unsigned_t<Out>;
  static constexpr bool is_float = Key::is_float;
  static constexpr Out nan_key = Key::nan_key;
  Key key;
  Out hidden = std::numeric_limits<Out>::max();

  ALWAYS_INLINE Out operator()(Raw raw) const {
    const auto k = key(raw);
    if constexpr (!is_float || !joins_zeros) return k;
    return static_cast<Out>(k + (k == -1));  // the key of -0 is -1, of +0 it is 0
  }

  // The cell as a double.
  ALWAYS_INLINE double value(Out k) const {
    const auto own = static_cast<typename Key::Out>(k);
    if constexpr (!is_float) return static_cast<double>(static_cast<int64_t>(own) + (key.bias ? 128 : 0));
    const Raw raw = key.cell(own);
    if constexpr (sizeof(Raw) == 8) return bits_as<double>(raw);
    if constexpr (sizeof(Raw) == 4) return as_double(F32Cell::widen(raw));
    if constexpr (sizeof(Raw) == 2) {
      return key.infinity == 0x7c00u ? as_double(F16Cell::widen(raw)) : as_double(BF16Cell::widen(raw));
    }
  }
};

// visit(the order of a dtype's cells): dtypes that share keys share code.
template <bool joins_zeros, class Visit>
auto with_order(Dtype dtype, const Visit& visit) {
  return with_key(dtype == Dtype::boolean ? Dtype::u8 : dtype, true,
                  [&](const auto& key) { return visit(Ordered<std::decay_t<decltype(key)>, joins_zeros>{key}); });
}
