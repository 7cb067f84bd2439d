// What gradients share: results read one a lane, and where a gradient and its reach are written.
// Included inside the namespace of one instruction set, after tiles.hpp and narrow.hpp; see common.hpp.

// bfloat16 1 or 0.
struct ToReach {
  using Raw = uint16_t;
  static ALWAYS_INLINE Raw narrow(unsigned char v) { return static_cast<Raw>(-static_cast<Raw>(v) & 0x3f80u); }
};

inline Window first_row(const Window& w) {
  Window row = w;
  row.i = 0, row.rows = 1;
  return row;
}

// What belongs to the slices of a window, a lane each.
inline void read_lanes(Dtype dtype, const Operand& results, const Window& w, double* out) {
  gather_doubles(dtype, results, first_row(w), nullptr, 0.0, out);
}

inline Filled at_strides(const Pulled& pulled, unsigned char* first_ptr, Dtype dtype) {
  return {first_ptr, nullptr, pulled.strides, dtype};
}

// Gradients where `reached`, 0 elsewhere; and the reach itself.
inline NEVER_INLINE void write_pulled(const Pulled& pulled, Dtype dtype, const Window& w, const double* gradients,
                                      const unsigned char* reached) {
  const Filled filled = at_strides(pulled, pulled.gradient_ptr, dtype);
  write_doubles(filled, w, gradients, reached, false);
  if (!pulled.reach_ptr) return;
  narrow_cells<ToReach>(at_strides(pulled, pulled.reach_ptr, dtype), w, reached, nullptr);
}

ALWAYS_INLINE bool is_nan(double value) { return value != value; }
