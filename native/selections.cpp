// The middle valid cell of each slice, by counting the leading bits of ordered keys. Compiled once: little of it would
// be a vector, and it calls the standard library's algorithms.
#define MASKSERVE_ISA any_processor

#include <algorithm>
#include <vector>

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "keys.hpp"

constexpr int64_t n_counted = 4096;  // keys from which counting beats partitioning
constexpr int n_radix_bits = 11;

// The k-th smallest of n keys; leaves them in any order.
template <class K>
K nth_key(K* keys, int64_t n, int64_t k, std::vector<K>& rest) {
  using U = std::make_unsigned_t<K>;
  constexpr int n_bits = 8 * sizeof(K);
  constexpr U sign = static_cast<U>(U{1} << (n_bits - 1));
  const K* from = keys;
  for (int high = n_bits; n > n_counted && high > 0;) {
    const int width = std::min(n_radix_bits, high), shift = high - width;
    const U low_bits = static_cast<U>((U{1} << width) - 1);
    uint32_t counts[1 << n_radix_bits] = {};
    const auto bucket_of = [=](K key) { return static_cast<U>((static_cast<U>(key ^ sign) >> shift) & low_bits); };
    for (int64_t j = 0; j < n; ++j) ++counts[bucket_of(from[j])];
    U bucket = 0;
    while (k >= counts[bucket]) k -= counts[bucket++];
    rest.resize(std::max(rest.size(), static_cast<size_t>(n) + 1));
    int64_t n_rest = 0;
    for (int64_t j = 0; j < n; ++j) {
      const K key = from[j];
      rest[n_rest] = key;
      n_rest += bucket_of(key) == bucket;
    }
    from = rest.data(), n = n_rest, high = shift;
  }
  K* const last = const_cast<K*>(from);
  std::nth_element(last, last + k, last + n);
  return last[k];
}

template <class Key>
double value_of(const Key& key, Dtype dtype, typename Key::Out k) {
  const typename Key::Raw raw = key.cell(k);
  if constexpr (sizeof raw == 8) {
    return dtype == Dtype::f64 ? bits_as<double>(raw) : static_cast<double>(static_cast<int64_t>(raw));
  } else if constexpr (sizeof raw == 4) {
    return dtype == Dtype::f32 ? as_double(F32Cell::widen(raw)) : as_double(I32Cell::widen(raw));
  } else if constexpr (sizeof raw == 2) {
    return dtype == Dtype::f16    ? as_double(F16Cell::widen(raw))
           : dtype == Dtype::bf16 ? as_double(BF16Cell::widen(raw))
                                  : as_double(I16Cell::widen(raw));
  } else {
    return dtype == Dtype::i8 ? as_double(I8Cell::widen(raw)) : as_double(U8Cell::widen(raw));
  }
}

template <class Key>
double middle(const Key& key, Dtype dtype, typename Key::Out* keys, int64_t n, std::vector<typename Key::Out>& rest) {
  using K = typename Key::Out;
  if (n == 0) return 0.0;
  if constexpr (Key::is_float) {
    K most = keys[0];
    for (int64_t j = 1; j < n; ++j) most = std::max(most, keys[j]);
    if (most == key.nan_key) return std::numeric_limits<double>::quiet_NaN();
  }
  const K lower_key = nth_key(keys, n, (n - 1) / 2, rest);
  K upper_key = lower_key;
  if (n % 2 == 0) {
    int64_t n_lower = 0;
    K above = std::numeric_limits<K>::max();
    for (int64_t j = 0; j < n; ++j) {
      n_lower += keys[j] <= lower_key;
      above = keys[j] > lower_key && keys[j] < above ? keys[j] : above;
    }
    if (n_lower == n / 2) upper_key = above;
  }
  const double lower = value_of(key, dtype, lower_key), upper = value_of(key, dtype, upper_key);
  const double mean = (lower + upper) * 0.5;
  return !is_finite(mean) && mean == mean && is_finite(lower) ? lower * 0.5 + upper * 0.5 : mean;
}

template <class Key>
void medians(const Block& block, const Key& key, double* values, int64_t* count) {
  using K = typename Key::Out;
  if (block.outer == 0 || block.inner == 0) return;
  constexpr int64_t n_side_by_side = 16;  // columns that share cache lines
  const int64_t columns = std::min(block.inner, n_side_by_side);
  int64_t groups = 1;
  if (columns == block.inner) {
    const int64_t group_cells = std::max<int64_t>(1, block.n * columns);
    groups = std::max<int64_t>(1, std::min(n_tile_lanes / columns, 2048 / group_cells));
  }
  const int64_t most_rows = std::max<int64_t>(1, std::min(block.n, n_tile / (groups * columns)));
  struct Room {
    alignas(64) K keys[n_tile];
    alignas(64) unsigned char keep[n_tile];
  };
  const std::unique_ptr<Room> room(new Room);
  const int64_t lane_step = block.n + 1;
  std::vector<K> valid(static_cast<size_t>(lane_step * groups * columns)), rest;
  Window w;
  for (w.o = 0; w.o < block.outer; w.o += groups) {
    w.groups = std::min(groups, block.outer - w.o);
    for (w.c = 0; w.c < block.inner; w.c += columns) {
      w.columns = std::min(columns, block.inner - w.c);
      const int64_t lanes = w.lanes();
      int64_t n_valid[n_tile_lanes] = {};
      for (w.i = 0; w.i < block.n; w.i += most_rows) {
        w.rows = std::min(most_rows, block.n - w.i);
        const unsigned char* const keep_ptr = gather_keep(block, w, room->keep);
        gather(block.data, w, nullptr, key, room->keys);
        for (int64_t l = 0; l < lanes; ++l) {
          K* const to = valid.data() + l * lane_step;
          int64_t n = n_valid[l];
          for (int64_t r = 0; r < w.rows; ++r) {
            to[n] = room->keys[r * lanes + l];
            n += keep_ptr ? keep_ptr[r * lanes + l] : 1;
          }
          n_valid[l] = n;
        }
      }
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t at = w.o * block.inner + w.c + l;
        values[at] = middle(key, block.dtype, valid.data() + l * lane_step, n_valid[l], rest);
        count[at] = n_valid[l];
      }
    }
  }
}

}  // namespace
}  // namespace MASKSERVE_ISA

void median(const Block& block, const Options&, double* values, int64_t* count) {
  using namespace MASKSERVE_ISA;
  with_key(block.dtype, true, [&](const auto& key) { medians(block, key, values, count); });
}

}  // namespace maskserve
