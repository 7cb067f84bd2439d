// Keys in order, and the k-th of them. Own algorithms rather than the standard library's: see common.hpp.
// Included inside the namespace of one instruction set.

// Room that grows, for numbers alone.
template <class T>
struct Pile {
  T* items = nullptr;
  int64_t size = 0, room = 0;
  Pile() = default;
  explicit Pile(int64_t n) { reserve(n); }
  Pile(const Pile&) = delete;
  Pile& operator=(const Pile&) = delete;
  ~Pile() { delete[] items; }
  void reserve(int64_t n) {
    if (n <= room) return;
    n = n > 2 * room ? n : 2 * room;
    T* const more = new T[static_cast<size_t>(n)];
    if (size) std::memcpy(more, items, static_cast<size_t>(size) * sizeof(T));
    delete[] items;
    items = more, room = n;
  }
  void add(const T* from, int64_t n) {
    reserve(size + n);
    if (n) std::memcpy(items + size, from, static_cast<size_t>(n) * sizeof(T));
    size += n;
  }
};

// Places without a pattern that cells could share.
struct Chance {
  uint64_t state;
  ALWAYS_INLINE int64_t below(int64_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int64_t>(((state >> 32) * static_cast<uint64_t>(n)) >> 32);  // n < 2^32
  }
};

// ---- networks: short columns side by side ---------------------------------------------------------------------------

// Rows of a dense (rows, lanes) array in order, lane by lane: Batcher's merge exchange (Knuth, TAOCP 3, 5.2.2, M).
template <class K>
NEVER_INLINE void exchange_rows(K* lower_row, K* given, int64_t n) {
  K* const upper_row = given;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    const K a = lower_row[j], b = upper_row[j];
    lower_row[j] = a < b ? a : b;
    upper_row[j] = a < b ? b : a;
  }
}

// exchange(row, other row, how many rows) for the steps of the network.
template <class Exchange>
void merge_exchange(int64_t rows, const Exchange& exchange) {
  int64_t top = 1;
  while (2 * top < rows) top *= 2;
  if (rows < 2) return;
  for (int64_t p = top; p > 0; p /= 2) {
    for (int64_t q = top, r = 0, d = p;; d = q - p, q /= 2, r = p) {
      for (int64_t i = r; i + d < rows; i += 2 * p) exchange(i, i + d, least(p, rows - d - i));
      if (q == p) break;
    }
  }
}

template <class K>
void sort_columns(K* keys, int64_t rows, int64_t lanes) {
  merge_exchange(rows, [=](int64_t row, int64_t other, int64_t n) {
    exchange_rows(keys + row * lanes, keys + other * lanes, n * lanes);
  });
}

// ---- the k-th of many keys ------------------------------------------------------------------------------------------

// How many keys lie below, at and between two of them.
struct Counts {
  int64_t below = 0, at_low = 0, below_high = 0, at_high = 0;
  void add(const Counts& other) {
    below += other.below, at_low += other.at_low, below_high += other.below_high, at_high += other.at_high;
  }
};

constexpr int64_t n_counted = 4096;  // so that counts of 16 bits do not overflow

template <class K>
NEVER_INLINE Counts count_keys(const K* keys, int64_t n, K low, K high) {
  using U = std::make_unsigned_t<K>;
  Counts counts;
  for (int64_t start = 0; start < n; start += n_counted) {
    const K* const some = keys + start;
    const int64_t n_some = least(n_counted, n - start);
    U below = 0, at_low = 0, below_high = 0, at_high = 0;
    for (int64_t j = 0; j < n_some; ++j) {
      below = static_cast<U>(below + (some[j] < low));
      at_low = static_cast<U>(at_low + (some[j] == low));
      below_high = static_cast<U>(below_high + (some[j] < high));
      at_high = static_cast<U>(at_high + (some[j] == high));
    }
    counts.add({static_cast<int64_t>(below), static_cast<int64_t>(at_low), static_cast<int64_t>(below_high),
                static_cast<int64_t>(at_high)});
  }
  return counts;
}

// The keys from `first` to `last`, in their order; room for one more than there are. `to` may be `from`.
template <class K>
NEVER_INLINE int64_t take_keys(const K* from, int64_t n, K first, K last, K* to) {
  using U = std::make_unsigned_t<K>;
  const U span = static_cast<U>(static_cast<U>(last) - static_cast<U>(first));
  int64_t taken = 0;
  for (int64_t j = 0; j < n; ++j) {
    const K key = from[j];
    to[taken] = key;
    taken += static_cast<U>(static_cast<U>(key) - static_cast<U>(first)) <= span;
  }
  return taken;
}

template <class K>
void sort_few(K* keys, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const K key = keys[i];
    int64_t j = i;
    for (; j > 0 && key < keys[j - 1]; --j) keys[j] = keys[j - 1];
    keys[j] = key;
  }
}

// The k-th of a few hundred keys, which it moves (Hoare's find, partitioned without a branch).
template <class K>
K nth_of_few(K* keys, int64_t n, int64_t k) {
  const auto split = [&](const auto& is_first) {
    int64_t m = 0;
    for (int64_t j = 0; j < n; ++j) {
      const K key = keys[j];
      keys[j] = keys[m];
      keys[m] = key;
      m += is_first(key);
    }
    return m;
  };
  while (n > 12) {
    const K a = keys[0], b = keys[n / 2], c = keys[n - 1];
    const K pivot = a < b ? (b < c ? b : (a < c ? c : a)) : (a < c ? a : (b < c ? c : b));
    const int64_t below = split([=](K key) { return key < pivot; });
    if (k < below) {
      n = below;
      continue;
    }
    keys += below, n -= below, k -= below;
    const int64_t at = split([=](K key) { return key == pivot; });
    if (k < at) return pivot;
    keys += at, n -= at, k -= at;
  }
  sort_few(keys, n);
  return keys[k];
}

// The places of a sample of n keys between which the one at `share` of all lies, all but rarely.
struct Between {
  int64_t low, high;  // -1 and n: beyond the sample
};

ALWAYS_INLINE Between between(int64_t n, double from_share, double to_share, double n_deviations) {
  const double wide = n_deviations * 0.5 * __builtin_sqrt(static_cast<double>(n)) + 1.0;
  const double low = from_share * static_cast<double>(n - 1) - wide;
  const double high = to_share * static_cast<double>(n - 1) + wide + 1.0;
  return {low < 0.0 ? -1 : static_cast<int64_t>(low), high > static_cast<double>(n) ? n : static_cast<int64_t>(high)};
}

constexpr int64_t n_few = 200;      // keys from which sampling pays
constexpr int64_t n_most_sampled = 512;

// The k-th smallest of n keys, which stay as they are; `room` holds n + 1. Floyd and Rivest (CACM 18, 1975): what lies
// outside two keys of a sample is only counted.
template <class K>
K nth_key(const K* from, int64_t n, int64_t k, K* room) {
  K first = std::numeric_limits<K>::min(), last = std::numeric_limits<K>::max();
  if (n <= n_few) std::memcpy(room, from, static_cast<size_t>(n) * sizeof(K));
  while (n > n_few) {
    K sample[n_most_sampled];
    const int64_t n_sampled = n < 1000 ? 40 : n < 20000 ? 128 : n_most_sampled;
    Chance chance{static_cast<uint64_t>(n)};
    for (int64_t j = 0; j < n_sampled; ++j) sample[j] = from[chance.below(n)];
    const double share = static_cast<double>(k) / static_cast<double>(n - 1);
    const Between at = between(n_sampled, share, share, 2.5);
    const K low = at.low < 0 ? first : nth_of_few(sample, n_sampled, at.low);
    const K high = at.high >= n_sampled ? last : nth_of_few(sample, n_sampled, at.high);
    const Counts counts = count_keys(from, n, low, high);
    if (k < counts.below) {
      last = static_cast<K>(low - 1);
    } else if (k < counts.below + counts.at_low) {
      return low;
    } else if (k < counts.below_high) {
      first = static_cast<K>(low + 1), last = static_cast<K>(high - 1), k -= counts.below + counts.at_low;
    } else if (k < counts.below_high + counts.at_high) {
      return high;
    } else {
      first = static_cast<K>(high + 1), k -= counts.below_high + counts.at_high;
    }
    n = take_keys(from, n, first, last, room);
    from = room;
  }
  return nth_of_few(room, n, k);
}

// The smallest key above `key`, and how many there are up to it.
template <class K>
NEVER_INLINE K next_key(const K* keys, int64_t n, K key, int64_t* n_up_to) {
  using U = std::make_unsigned_t<K>;
  K above = std::numeric_limits<K>::max();
  *n_up_to = 0;
  for (int64_t start = 0; start < n; start += n_counted) {
    const int64_t stop = least(n, start + n_counted);
    U up_to = 0;
    for (int64_t j = start; j < stop; ++j) {
      up_to = static_cast<U>(up_to + (keys[j] <= key));
      const K other = keys[j] > key ? keys[j] : std::numeric_limits<K>::max();
      above = other < above ? other : above;
    }
    *n_up_to += up_to;
  }
  return above;
}
