// Runs every kernel on every dtype, layout and kind of mask, and prints a hash of what each wrote: the same lines from
// every instruction set, processor and compiler. Buffers end where the cells do, and begin at odd addresses, so that a
// sanitizer sees every step beside them (tests/kernel_selftest.py).

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "pull.hpp"

namespace {

using namespace maskserve;

constexpr const char* dtype_names[n_dtypes] = {"f64", "f32", "f16", "bf16", "i8", "i16", "i32", "i64", "u8", "bool"};

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  bool one_in(uint64_t n) { return next() % n == 0; }
};

struct Hash {
  uint64_t value = 0xcbf29ce484222325u;  // FNV-1a
  void add(const void* bytes, size_t n) {
    for (size_t j = 0; j < n; ++j) value = (value ^ static_cast<const unsigned char*>(bytes)[j]) * 0x100000001b3u;
  }
};

struct FloatFormat {
  int mantissa_bits, exponent_bits;
};

bool is_float(Dtype dtype) { return dtype <= Dtype::bf16; }

FloatFormat format_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64: return {52, 11};
    case Dtype::f32: return {23, 8};
    case Dtype::f16: return {10, 5};
    default: return {7, 8};
  }
}

// The bits of a cell: tame ones are near 1 or small integers; junk is NaN, inf, or the largest of its dtype.
enum class Kind { tame, wild, junk };

uint64_t bits_of(Dtype dtype, Kind kind, Random& random) {
  const uint64_t r = random.next();
  if (dtype == Dtype::boolean) return r & 1;
  const int n_bits = 8 * static_cast<int>(cell_bytes(dtype));
  const uint64_t all = ~uint64_t{0} >> (64 - n_bits), sign = uint64_t{1} << (n_bits - 1);
  if (!is_float(dtype)) {
    if (kind == Kind::tame) return (r % 7) & all;
    if (kind == Kind::junk) return random.one_in(2) ? sign : sign - 1;
    return r & all;
  }
  const FloatFormat format = format_of(dtype);
  const uint64_t fraction = r & ((uint64_t{1} << format.mantissa_bits) - 1);
  const uint64_t bias = (uint64_t{1} << (format.exponent_bits - 1)) - 1, infinity = (2 * bias + 1) << format.mantissa_bits;
  const uint64_t signed_bit = r >> 63 ? sign : 0;
  if (kind == Kind::junk) {
    const uint64_t of[] = {infinity, infinity | 1, infinity | fraction, infinity - 1, 0};
    return of[r >> 60 & 3] | signed_bit;
  }
  if (kind == Kind::wild) {
    const uint64_t of[] = {signed_bit, signed_bit | 1, signed_bit | infinity, infinity | 1, signed_bit | (infinity - 1)};
    return of[random.next() % 5];
  }
  return signed_bit | (bias - 3 + random.next() % 6) << format.mantissa_bits | fraction;
}

struct Layout {
  const char* name;
  int order[3];  // which of (outer, n, inner) is outermost in memory, ...
  int64_t step;  // between neighbours in memory, in cells
};

constexpr Layout layouts[] = {
    {"dense", {0, 1, 2}, 1}, {"turned", {2, 1, 0}, 1}, {"columns", {0, 2, 1}, 1}, {"strided", {0, 1, 2}, 3},
};

enum class Masks { none, some, dense, sparse, all, nothing, broadcast, prefixes, bits };
constexpr Masks every_mask[] = {Masks::none, Masks::some, Masks::dense, Masks::sparse, Masks::all, Masks::nothing,
                                Masks::broadcast, Masks::prefixes, Masks::bits};
bool is_compact(Masks masks) { return masks == Masks::prefixes || masks == Masks::bits; }

struct Tensor {
  std::vector<unsigned char> room;  // one byte longer than its cells, which end where it ends
  Operand operand;
};

struct Shape {
  int64_t outer, n, inner;
  int64_t cells() const { return outer * n * inner; }
};

void lay(Tensor& tensor, const Shape& shape, const Layout& layout, int64_t bytes) {
  const int64_t sizes[3] = {shape.outer, shape.n, shape.inner};
  int64_t strides[3], step = layout.step, last = 0;
  for (int k = 2; k >= 0; --k) strides[layout.order[k]] = step, step *= sizes[layout.order[k]];
  for (int k = 0; k < 3; ++k) last += strides[k] * (sizes[k] > 0 ? sizes[k] - 1 : 0);
  tensor.room.assign(static_cast<size_t>(shape.cells() ? (last + 1) * bytes + 1 : 1), 0);
  tensor.operand = {tensor.room.data() + 1, strides[0], strides[1], strides[2]};
}

unsigned char* cell_ptr(const Tensor& tensor, int64_t o, int64_t i, int64_t c, int64_t bytes) {
  const Operand& at = tensor.operand;
  return const_cast<unsigned char*>(at.cells_ptr) +
         (o * at.stride_outer + i * at.stride_n + c * at.stride_inner) * bytes;
}

template <class Visit>
void each_cell(const Shape& shape, const Visit& visit) {
  for (int64_t o = 0; o < shape.outer; ++o) {
    for (int64_t i = 0; i < shape.n; ++i) {
      for (int64_t c = 0; c < shape.inner; ++c) visit(o, i, c);
    }
  }
}

struct Case {
  Tensor data, mask, weights;
  std::unique_ptr<Compact> compact;
  Block block;

  Case() = default;
  Case(const Shape& shape, Dtype dtype, const Layout& layout, Masks masks, bool wild, Random& random) {
    const int64_t bytes = cell_bytes(dtype);
    lay(data, shape, layout, bytes);
    if (is_compact(masks)) {
      begin_compact(shape, masks == Masks::bits, random);
    } else if (masks != Masks::none) {
      lay(mask, shape, layout, 1);
    }
    each_cell(shape, [&](int64_t o, int64_t i, int64_t c) {
      bool valid = true;
      switch (masks) {
        case Masks::none:
        case Masks::all: break;
        case Masks::some: valid = random.next() % 10 < 7; break;
        case Masks::dense: valid = !random.one_in(100); break;
        case Masks::sparse: valid = random.one_in(100); break;
        case Masks::nothing: valid = false; break;
        case Masks::broadcast: valid = (i * 7 + 3) % 5 < 3; break;  // of n alone
        case Masks::prefixes: valid = i < length_of(o); break;
        case Masks::bits: valid = (o + i / 64) % 3 == 0 || random.next() % 10 < 7; break;  // all of some rows
      }
      if (masks == Masks::bits && valid) set_bit((o * shape.n + i) * shape.inner + c);
      if (masks != Masks::none && !compact) *cell_ptr(mask, o, i, c, 1) = valid;
      const Kind kind = !valid ? Kind::junk : wild && random.one_in(50) ? Kind::wild : Kind::tame;
      const uint64_t bits = bits_of(dtype, kind, random);
      std::memcpy(cell_ptr(data, o, i, c, bytes), &bits, static_cast<size_t>(bytes));
    });
    block.data = data.operand;
    if (masks != Masks::none) block.mask = mask.operand;
    if (masks == Masks::broadcast) {
      std::vector<unsigned char> line(static_cast<size_t>(shape.n + 1));
      for (int64_t i = 0; i < shape.n; ++i) line[static_cast<size_t>(i + 1)] = (i * 7 + 3) % 5 < 3;
      mask.room.swap(line);
      block.mask = {mask.room.data() + 1, 0, 1, 0};
    }
    lay(weights, shape, layouts[0], cell_bytes(Dtype::f32));
    each_cell(shape, [&](int64_t o, int64_t i, int64_t c) {
      const uint64_t bits = bits_of(Dtype::f32, Kind::tame, random) & 0x7fffffffu;
      std::memcpy(cell_ptr(weights, o, i, c, 4), &bits, 4);
    });
    if (compact) {
      block.mask = {mask.room.data() + 1, shape.n * shape.inner, shape.inner, 1, compact.get(), 0};
    }
    block.weights = weights.operand, block.weights_dtype = Dtype::f32;
    block.omits_nan = wild && is_float(dtype) && random.one_in(2);
    block.dtype = dtype, block.outer = shape.outer, block.n = shape.n, block.inner = shape.inner;
    block.leaf = shape.inner == 1 ? 4096 : 64;
  }

  // Lengths of the outer dim, or no bit yet: rows of them end with a byte.
  void begin_compact(const Shape& shape, bool are_bits, Random& random) {
    const int64_t n_row = are_bits ? (shape.inner > 1 ? shape.inner : shape.n) : shape.n * shape.inner;
    compact.reset(new Compact{are_bits, n_row > 0 ? n_row : 1, (n_row + 7) / 8 * 8, shape.inner});
    const int64_t n_bytes = are_bits ? shape.cells() / compact->row * compact->pitch / 8 : 8 * shape.outer;
    mask.room.assign(static_cast<size_t>(n_bytes + 1), 0);
    for (int64_t o = 0; o < shape.outer && !are_bits; ++o) {
      const uint64_t length = random.next() % static_cast<uint64_t>(shape.n + 1);
      std::memcpy(mask.room.data() + 1 + 8 * o, &length, sizeof length);
    }
  }

  int64_t length_of(int64_t o) const {
    int64_t length;
    std::memcpy(&length, mask.room.data() + 1 + 8 * o, sizeof length);
    return length;
  }

  void set_bit(int64_t cell) {
    const int64_t bit = cell / compact->row * compact->pitch + cell % compact->row;
    mask.room[static_cast<size_t>(1 + bit / 8)] |= static_cast<unsigned char>(1 << bit % 8);
  }
};

template <class Visit>
void each_case(Dtype dtype, const std::vector<Shape>& shapes, const Visit& visit) {
  uint64_t seed = 1;
  for (const Shape& shape : shapes) {
    for (const Layout& layout : layouts) {
      for (const Masks masks : every_mask) {
        for (const bool wild : {false, true}) {
          Random random{seed++ * 1000 + static_cast<uint64_t>(dtype)};
          visit(Case(shape, dtype, layout, masks, wild, random));
        }
      }
    }
  }
}

constexpr double shares[] = {0.25, 0.5, 1.0};

Options some_options(const Block* block_ptr = nullptr) {
  Options options;
  options.correction = 1.0;
  options.eps = 1e-12;
  options.limit = 2;
  options.value = 1;
  options.q_ptr = shares, options.n_q = 3;
  options.omits_nan = block_ptr && block_ptr->omits_nan;
  return options;
}

bool is_one_of(const char* name, std::initializer_list<const char*> names) {
  for (const char* some : names) {
    if (!std::strcmp(name, some)) return true;
  }
  return false;
}

void add_all(Hash& hash, const std::vector<std::vector<uint64_t>>& words) {
  for (const auto& some : words) hash.add(some.data(), some.size() * sizeof(uint64_t));
}

void run_lift(int kernel, const Case& given, Hash& hash) {
  const size_t n = static_cast<size_t>(given.block.outer * given.block.inner);
  std::vector<std::vector<uint64_t>> words(n_parts + size_t{1}, std::vector<uint64_t>(n));
  Parts parts;
  parts.count_ptr = reinterpret_cast<int64_t*>(words[n_parts].data());
  for (int k = 0; k < n_parts; ++k) parts.part_ptr[k] = words[k].data();
  const bool walked = variant().lifts[kernel](given.block, some_options(&given.block), parts);
  hash.add(&walked, 1);
  if (walked) add_all(hash, words);
}

// The dtype that a kernel writes.
Dtype result_of(const char* fill, Dtype dtype) {
  if (is_one_of(fill, {"cumulative_largest", "cumulative_smallest", "fill_forward", "fill_backward", "fill_value"})) {
    return dtype;
  }
  if (is_one_of(fill, {"sorted", "top"})) return Dtype::i64;
  if (is_one_of(fill, {"rank"})) return Dtype::f64;
  return is_float(dtype) ? dtype : Dtype::f64;
}

void run_fill(int kernel, const Case& given, Hash& hash) {
  const Block& block = given.block;
  Options options = some_options(&block);
  if (is_one_of(fill_names[kernel], {"top"})) options.k = block.n / 2;
  const int64_t rows = options.k >= 0 ? options.k : block.n;
  const Dtype result = result_of(fill_names[kernel], block.dtype);
  const size_t n = static_cast<size_t>(block.outer * rows * block.inner);
  const size_t bytes = n * static_cast<size_t>(cell_bytes(result));
  std::vector<uint64_t> values((bytes + 7) / 8), places(n);
  std::vector<unsigned char> valid(n);
  Filled filled;
  filled.values_ptr = reinterpret_cast<unsigned char*>(values.data());
  filled.mask_ptr = valid.data();
  filled.places_ptr = reinterpret_cast<unsigned char*>(places.data());
  filled.values = {nullptr, rows * block.inner, block.inner, 1};
  filled.dtype = result;
  const int status = variant().fills[kernel](block, options, filled);
  hash.add(&status, sizeof status);
  if (status == fill_refused) return;
  hash.add(values.data(), bytes);
  hash.add(valid.data(), n);
  hash.add(places.data(), n * sizeof(uint64_t));
}

// The lift whose states a normalization takes; null where the fill is none.
const char* lift_of(const char* fill) {
  if (is_one_of(fill, {"softmax", "log_softmax"})) return "exponentials";
  if (is_one_of(fill, {"normalize"})) return "powers";
  return is_one_of(fill, {"standardize"}) ? "moments" : nullptr;
}

// In blocks of a third of the rows, from the states of whole slices.
void run_fill_by_states(int kernel, const Case& given, Hash& hash) {
  const Block& block = given.block;
  int lift = 0;
  while (std::strcmp(lift_names[lift], lift_of(fill_names[kernel]))) ++lift;
  const int64_t n_states = block.outer * block.inner;
  std::vector<std::vector<uint64_t>> words(n_parts + size_t{1}, std::vector<uint64_t>(static_cast<size_t>(n_states)));
  Parts parts;
  States states{n_states, parts.count_ptr = reinterpret_cast<int64_t*>(words[n_parts].data()), {}};
  for (int k = 0; k < n_parts; ++k) states.part_ptr[k] = parts.part_ptr[k] = words[static_cast<size_t>(k)].data();
  const Options options = some_options(&block);
  if (!variant().lifts[lift](block, options, parts)) return;
  const Dtype result = result_of(fill_names[kernel], block.dtype);
  const int64_t step = block.n / 3 + 1, bytes = cell_bytes(block.dtype), result_bytes = cell_bytes(result);
  const size_t n = static_cast<size_t>(n_states * block.n);
  std::vector<unsigned char> values(n * static_cast<size_t>(result_bytes)), valid(n);
  for (int64_t i = 0; i < block.n; i += step) {
    Block some = block;
    some.states_ptr = &states;
    some.n = block.n - i < step ? block.n - i : step;
    some.data.cells_ptr += i * block.data.stride_n * bytes;
    some.mask.move_on(i * block.mask.stride_n);
    Filled filled;
    filled.values_ptr = values.data() + i * block.inner * result_bytes;
    filled.mask_ptr = valid.data() + i * block.inner;
    filled.values = {nullptr, block.n * block.inner, block.inner, 1};
    filled.dtype = result;
    const int status = variant().fills[kernel](some, options, filled);
    hash.add(&status, sizeof status);
  }
  hash.add(values.data(), values.size());
  hash.add(valid.data(), n);
}

void canonical(std::vector<double>& values) {  // which NaN it is, finish() decides
  for (double& value : values) value = value == value ? value : 0x1.8p1000;
}

void run_selection(int kernel, const Case& given, Hash& hash) {
  const size_t n = static_cast<size_t>(given.block.outer * given.block.inner);
  std::vector<double> values(n * 3);
  std::vector<int64_t> count(n);
  variant().selections[kernel](given.block, some_options(&given.block), values.data(), count.data());
  canonical(values);
  hash.add(values.data(), values.size() * sizeof(double));
  hash.add(count.data(), n * sizeof(int64_t));
}

// In blocks of a third of the rows.
void run_search(int kernel, const Case& given, Hash& hash) {
  const Block& block = given.block;
  if (block.outer != 1 || block.inner < 1 || block.inner > 8 || block.n < 1) return;
  const Options options = some_options(&block);
  const std::unique_ptr<Search> search(variant().searches[kernel](block.dtype, options, block.inner));
  const int64_t step = block.n / 3 + 1, bytes = cell_bytes(block.dtype);
  const auto each_block = [&](const auto& visit) {
    for (int64_t i = 0; i < block.n; i += step) {
      Block some = block;
      some.n = block.n - i < step ? block.n - i : step;
      some.data.cells_ptr += i * block.data.stride_n * bytes;
      some.mask.move_on(i * block.mask.stride_n);
      const std::unique_ptr<Search::Found> found(visit(some));
      search->absorb(*found);
    }
  };
  uint64_t seed = 0;
  for (bool settled = false; !settled;) {
    each_block([&](const Block& some) { return search->sample(some, 16, seed++); });
    search->bracket();
    each_block([&](const Block& some) { return search->sift(some); });
    settled = search->settle();
  }
  std::vector<double> values(static_cast<size_t>(3 * block.inner));
  std::vector<int64_t> count(static_cast<size_t>(block.inner));
  search->write(values.data(), count.data());
  canonical(values);
  hash.add(values.data(), values.size() * sizeof(double));
  hash.add(count.data(), count.size() * sizeof(int64_t));
}

void run_pull(int kernel, const Case& given, Hash& hash) {
  const Block& block = given.block;
  const bool of_slices = is_one_of(pull_names[kernel], {"pull_softmax", "pull_softmin", "pull_log_softmax", "pull_normalize",
                                                        "pull_standardize", "pull_cumsum"});
  const Shape shape{block.outer, of_slices ? block.n : 1, block.inner};
  const int64_t bytes = cell_bytes(block.dtype);
  Random random{11};
  Tensor g, out, gate;
  for (Tensor* tensor : {&g, &out, &gate}) lay(*tensor, shape, layouts[0], tensor == &gate ? 1 : bytes);
  each_cell(shape, [&](int64_t o, int64_t i, int64_t c) {
    for (Tensor* tensor : {&g, &out}) {
      const uint64_t bits = bits_of(block.dtype, Kind::tame, random);
      std::memcpy(cell_ptr(*tensor, o, i, c, bytes), &bits, static_cast<size_t>(bytes));
    }
    *cell_ptr(gate, o, i, c, 1) = !random.one_in(5);
  });
  Above above{g.operand, gate.operand, out.operand, block.dtype, {}};
  if (!of_slices) above.g.stride_n = above.gate.stride_n = above.out.stride_n = 0;
  const size_t n_slices = static_cast<size_t>(block.outer * block.inner);
  std::vector<int64_t> count(n_slices);
  std::vector<std::vector<double>> states(3, std::vector<double>(n_slices));
  for (int64_t& some : count) some = static_cast<int64_t>(random.next() % 5);
  for (auto& some : states) {
    for (double& state : some) state = static_cast<double>(random.next() % 1000) / 64.0 + 0.5;
  }
  above.part[0] = {reinterpret_cast<const unsigned char*>(count.data()), block.inner, 0, 1};
  for (int k = 0; k < 3; ++k) {
    above.part[k + 1] = {reinterpret_cast<const unsigned char*>(states[static_cast<size_t>(k)].data()), block.inner, 0, 1};
  }
  const size_t n = n_slices * static_cast<size_t>(block.n);
  std::vector<uint64_t> gradient((n * static_cast<size_t>(bytes) + 7) / 8);
  std::vector<uint16_t> reach(n);
  Pulled pulled;
  pulled.gradient_ptr = reinterpret_cast<unsigned char*>(gradient.data());
  pulled.reach_ptr = reinterpret_cast<unsigned char*>(reach.data());
  pulled.strides = {nullptr, block.n * block.inner, block.inner, 1};
  const int status = pull_variant().pulls[kernel](block, some_options(&block), above, pulled);
  hash.add(&status, sizeof status);
  if (status == fill_refused) return;
  hash.add(gradient.data(), n * static_cast<size_t>(bytes));
  hash.add(reach.data(), n * sizeof(uint16_t));
}

struct SomeStates {
  static constexpr int64_t n = 300;
  std::vector<int64_t> count = std::vector<int64_t>(n);
  std::vector<std::vector<uint64_t>> words{n_parts, std::vector<uint64_t>(n)};

  explicit SomeStates(uint64_t seed) {
    Random random{seed};
    for (int64_t& some : count) some = static_cast<int64_t>(random.next() % 5);
    for (auto& some : words) {
      for (uint64_t& word : some) word = bits_of(Dtype::f64, random.one_in(20) ? Kind::wild : Kind::tame, random);
    }
  }

  States states() const {
    States states{n, count.data(), {}};
    for (int k = 0; k < n_parts; ++k) states.part_ptr[k] = words[k].data();
    return states;
  }
};

void run_merge(int kernel, Dtype dtype, Hash& hash) {
  const SomeStates left(8), right(9);
  SomeStates both(10);
  Parts parts{both.count.data(), {}};
  for (int k = 0; k < n_parts; ++k) parts.part_ptr[k] = both.words[k].data();
  variant().merges[kernel](left.states(), right.states(), dtype, parts);
  hash.add(both.count.data(), both.count.size() * sizeof(int64_t));
  for (const auto& words : both.words) hash.add(words.data(), words.size() * sizeof(uint64_t));
}

void run_finish(int kernel, Dtype result, Hash& hash) {
  const SomeStates some(7);
  const size_t n = static_cast<size_t>(some.n);
  std::vector<uint64_t> values(n);
  std::vector<unsigned char> valid(n);
  const int status = variant().finish(static_cast<Finish>(kernel), some.states(), some_options(), {1, 0.0}, result,
                            reinterpret_cast<unsigned char*>(values.data()), valid.data());
  hash.add(&status, sizeof status);
  if (status == fill_refused) return;
  hash.add(values.data(), n * static_cast<size_t>(cell_bytes(result)));
  hash.add(valid.data(), n);
}

void say(const char* kind, const char* kernel, const char* dtype, const Hash& hash) {
  std::printf("%s %s %s %016llx\n", kind, kernel, dtype, static_cast<unsigned long long>(hash.value));
  std::fflush(stdout);
}

// Lanes are 64, 256 and 512 wide, leaves 64 and 4096 cells, tiles 16384.
std::vector<Shape> some_shapes(bool quick) {
  std::vector<Shape> shapes;
  const auto add = [&](int64_t outer, int64_t n, int64_t inner) { shapes.push_back({outer, n, inner}); };
  for (const int64_t n : {0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 511, 512, 513}) add(2, n, 1), add(1, n, 5);
  for (const int64_t columns : {0, 1, 63, 64, 65, 255, 256, 257}) add(1, 3, columns), add(columns, 3, 1);
  add(0, 5, 2), add(3, 70, 17);
  if (quick) return shapes;
  for (const int64_t n : {4095, 4096, 4097, 12289}) add(2, n, 1), add(1, n, 3);
  add(1, 130, 600), add(300, 3, 3), add(1, 20000, 1), add(700, 12, 1);
  return shapes;
}

#ifdef __linux__
// Beyond 2^31 cells: pages of zeros that were never touched, and one cell, the last.
void run_large() {
  constexpr int64_t n = (int64_t{1} << 31) + 5000;
  void* const room_ptr = mmap(nullptr, static_cast<size_t>(n), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room_ptr == MAP_FAILED) {
    std::printf("large: no address space\n");
    std::exit(1);
  }
  auto* const cells_ptr = static_cast<unsigned char*>(room_ptr);
  cells_ptr[n - 1] = 1;
  Case given;
  const float one = 1.0f;
  given.block.weights = {reinterpret_cast<const unsigned char*>(&one), 0, 0, 0};
  given.block.data = {cells_ptr, n, 1, 1};
  given.block.dtype = Dtype::i8, given.block.outer = given.block.inner = 1, given.block.n = n, given.block.leaf = 4096;
  for (int kernel = 0; kernel < n_lifts; ++kernel) {
    Hash hash;
    run_lift(kernel, given, hash);
    say("large lift", lift_names[kernel], "i8", hash);
  }
}
#endif

// One kernel on f32, `repeats` times: what one more of them costs is what the kernel does.
int run_again(const char* name, const Shape& shape, int repeats) {
  Random random{1};
  const Case given(shape, Dtype::f32, layouts[0], Masks::some, false, random);
  std::vector<uint64_t> room(static_cast<size_t>(n_parts + 1) * static_cast<size_t>(shape.cells()));
  const auto part_ptr = [&](int64_t k) { return room.data() + k * shape.cells(); };
  Parts parts{reinterpret_cast<int64_t*>(part_ptr(n_parts)), {}};
  for (int k = 0; k < n_parts - 1; ++k) parts.part_ptr[k] = part_ptr(k);
  if (is_one_of(name, {"largest", "smallest"})) parts.part_ptr[1] = nullptr;  // the cell, not where it stands
  const Filled filled{reinterpret_cast<unsigned char*>(part_ptr(0)), reinterpret_cast<unsigned char*>(part_ptr(1)),
                      {nullptr, shape.n * shape.inner, shape.inner, 1}, Dtype::f32};
  for (int k = 0; k < repeats; ++k) {
    for (int kernel = 0; kernel < n_lifts; ++kernel) {
      if (!std::strcmp(name, lift_names[kernel])) variant().lifts[kernel](given.block, some_options(), parts);
    }
    for (int kernel = 0; kernel < n_fills; ++kernel) {
      if (!std::strcmp(name, fill_names[kernel])) variant().fills[kernel](given.block, some_options(), filled);
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 7 && !std::strcmp(argv[1], "--again")) {
    return run_again(argv[2], {std::atoll(argv[3]), std::atoll(argv[4]), std::atoll(argv[5])}, std::atoi(argv[6]));
  }
  bool quick = false, large = false;
  for (int k = 1; k < argc; ++k) {
    quick |= !std::strcmp(argv[k], "--quick");
    large |= !std::strcmp(argv[k], "--large");
  }
  std::fprintf(stderr, "kernels: %s\n", variant().name);
#ifdef __linux__
  if (large) {
    run_large();
    return 0;
  }
#endif
  const std::vector<Shape> shapes = some_shapes(quick);
  for (int d = 0; d < n_dtypes; ++d) {
    const Dtype dtype = static_cast<Dtype>(d);
    const auto run_all = [&](const char* kind, const char* const* names, int n, auto run) {
      for (int kernel = 0; kernel < n; ++kernel) {
        Hash hash;
        each_case(dtype, shapes, [&](const Case& given) { run(kernel, given, hash); });
        say(kind, names[kernel], dtype_names[d], hash);
      }
    };
    for (int kernel = 0; kernel < n_fills; ++kernel) {
      Hash hash;
      if (!lift_of(fill_names[kernel])) continue;
      each_case(dtype, shapes, [&](const Case& given) { run_fill_by_states(kernel, given, hash); });
      say("fill by states", fill_names[kernel], dtype_names[d], hash);
    }
    run_all("lift", lift_names, n_lifts, run_lift);
    run_all("fill", fill_names, n_fills, run_fill);
    run_all("select", selection_names, n_selections, run_selection);
    run_all("search", search_names, n_searches, run_search);
    if (is_float(dtype)) run_all("pull", pull_names, n_pulls, run_pull);
    for (int kernel = 0; kernel < n_merges; ++kernel) {
      Hash hash;
      run_merge(kernel, dtype, hash);
      say("merge", merge_names[kernel], dtype_names[d], hash);
    }
    for (int kernel = 0; kernel < n_finishes; ++kernel) {
      Hash hash;
      run_finish(kernel, dtype, hash);
      say("finish", finish_names[kernel], dtype_names[d], hash);
    }
  }
  return 0;
}
