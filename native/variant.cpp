// Which of the compiled variants runs: the widest that this processor has, or the one MASKSERVE_ISA names.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "block.hpp"
#include "pull.hpp"

namespace maskserve {

#define MASKSERVE_LIFT(kernel) bool kernel(const Block&, const Options&, const Parts&);
#define MASKSERVE_FILL(kernel) int kernel(const Block&, const Options&, const Filled&);
#define MASKSERVE_SELECT(kernel) void kernel(const Block&, const Options&, void*, int64_t*);
#define MASKSERVE_SEARCH(kernel) Search* kernel##_search(Dtype, const Options&, int64_t);
#define MASKSERVE_PULL(kernel) int kernel(const Block&, const Options&, const Above&, const Pulled&);
#define MASKSERVE_ADDRESS(kernel) kernel,
#define MASKSERVE_MERGE(states) void merge_##states(const States&, const States&, Dtype, const Parts&);
#define MASKSERVE_MERGER(states) merge_##states,
#define MASKSERVE_BEGIN(kernel) kernel##_search,
#define MASKSERVE_VARIANT(isa)                                                                                \
  namespace isa {                                                                                             \
  MASKSERVE_LIFTS(MASKSERVE_LIFT)                                                                             \
  MASKSERVE_FILLS(MASKSERVE_FILL)                                                                             \
  MASKSERVE_SELECTIONS(MASKSERVE_SELECT)                                                                      \
  MASKSERVE_SEARCHES(MASKSERVE_SEARCH)                                                                        \
  MASKSERVE_PULLS(MASKSERVE_PULL)                                                                             \
  int finish(Finish, const States&, const Options&, const Limits&, Dtype, unsigned char*, unsigned char*);    \
  void raise(const double*, double*, int64_t);                                                                \
  MASKSERVE_MERGES(MASKSERVE_MERGE)                                                                           \
  void ties(const Block&, const Above&, bool of_sizes, int64_t*);                                             \
  void keep(const unsigned char*, const void*, int64_t, int64_t, unsigned char*);                             \
  void keep_reached(const unsigned char*, const void*, int64_t, int64_t, unsigned char*);                     \
  void to_reach(const unsigned char*, int64_t, unsigned char*);                                               \
  void to_mask(const unsigned char*, int64_t, unsigned char*);                                                \
  bool are_bools(const unsigned char*, int64_t, int64_t, int64_t, int64_t);                                   \
  void spread_rows(const unsigned char*, int64_t, int64_t, unsigned char*);                                   \
  void hide_rows(unsigned char*, const unsigned char*, int64_t, int64_t);                                     \
  bool rows_alike(const unsigned char*, int64_t, int64_t, unsigned char*);                                    \
  double longest_row(const unsigned char*, bool, int64_t, int64_t);                                           \
  double longest_valid(const unsigned char*, const unsigned char*, bool, int64_t, int64_t, bool);             \
  bool lengths_of(const unsigned char*, int64_t, int64_t, int64_t*);                                          \
  void spread_mask(const Operand&, int64_t, int64_t, unsigned char*);                                         \
  const Variant table{#isa,                                                                                   \
                      {MASKSERVE_LIFTS(MASKSERVE_ADDRESS)},                                                   \
                      {MASKSERVE_FILLS(MASKSERVE_ADDRESS)},                                                   \
                      {MASKSERVE_SELECTIONS(MASKSERVE_ADDRESS)},                                              \
                      {MASKSERVE_SEARCHES(MASKSERVE_BEGIN)},                                                  \
                      finish,                                                                                 \
                      raise,                                                                                  \
                      {MASKSERVE_MERGES(MASKSERVE_MERGER)}};                                                  \
  const PullVariant pulls{{MASKSERVE_PULLS(MASKSERVE_ADDRESS)},                                               \
                          ties, keep, keep_reached, to_reach, to_mask, are_bools, spread_rows, hide_rows,     \
                          rows_alike, longest_row, longest_valid, lengths_of, spread_mask};                   \
  }

MASKSERVE_VARIANT(baseline)
#ifdef MASKSERVE_X86
MASKSERVE_VARIANT(avx2)
MASKSERVE_VARIANT(avx512)
#endif

namespace {

bool has_avx2() {
#ifdef MASKSERVE_X86
  return __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

bool has_avx512() {
#ifdef MASKSERVE_X86
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_avx2();
#else
  return false;
#endif
}

struct Chosen {
  const Variant& kernels;
  const PullVariant& pulls;
};

#define MASKSERVE_CHOSEN(isa) Chosen{isa::table, isa::pulls}

Chosen widest() {
#ifdef MASKSERVE_X86
  if (has_avx512()) return MASKSERVE_CHOSEN(avx512);
  if (has_avx2()) return MASKSERVE_CHOSEN(avx2);
#endif
  return MASKSERVE_CHOSEN(baseline);
}

Chosen choose() {
  const char* asked_ptr = std::getenv("MASKSERVE_ISA");
  const std::string asked = asked_ptr ? asked_ptr : "";
  if (asked.empty()) return widest();
  if (asked == "baseline") return MASKSERVE_CHOSEN(baseline);
#ifdef MASKSERVE_X86
  if (asked == "avx2" && has_avx2()) return MASKSERVE_CHOSEN(avx2);
  if (asked == "avx512" && has_avx512()) return MASKSERVE_CHOSEN(avx512);
#endif
  throw std::runtime_error("MASKSERVE_ISA is \"" + asked + "\": this processor runs baseline" +
                           (has_avx2() ? ", avx2" : "") + (has_avx512() ? ", avx512" : "") +
                           "; set one of them, or unset it");
}

// Decided once.
const Chosen& chosen() {
  static const Chosen decided = choose();
  return decided;
}

}  // namespace

Search::~Search() = default;
Search::Found::~Found() = default;

const Variant& variant() { return chosen().kernels; }

const PullVariant& pull_variant() { return chosen().pulls; }

}  // namespace maskserve
