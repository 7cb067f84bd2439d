// Which of the compiled variants runs: the widest that this processor has, or the one MASKSERVE_ISA names.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "block.hpp"

namespace maskserve {

#define MASKSERVE_VARIANT(isa)                                                                              \
  namespace isa {                                                                                           \
  bool total(const Block&, const Parts&);                                                                   \
  bool count(const Block&, const Parts&);                                                                   \
  bool largest(const Block&, const Parts&);                                                                 \
  bool smallest(const Block&, const Parts&);                                                                \
  bool truths(const Block&, const Parts&);                                                                  \
  bool moments(const Block&, const Parts&);                                                                 \
  bool exponentials(const Block&, const Parts&);                                                            \
  int softmax(const Block&, const Filled&);                                                                 \
  int log_softmax(const Block&, const Filled&);                                                             \
  int cumulative_sum(const Block&, const Filled&);                                                          \
  const Variant table{#isa,                                                                                 \
                      {total, count, largest, smallest, truths, moments, exponentials},                     \
                      {softmax, log_softmax, cumulative_sum}};                                              \
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

const Variant& widest() {
#ifdef MASKSERVE_X86
  if (has_avx512()) return avx512::table;
  if (has_avx2()) return avx2::table;
#endif
  return baseline::table;
}

const Variant& choose() {
  const char* asked_ptr = std::getenv("MASKSERVE_ISA");
  const std::string asked = asked_ptr ? asked_ptr : "";
  if (asked.empty()) return widest();
  if (asked == "baseline") return baseline::table;
#ifdef MASKSERVE_X86
  if (asked == "avx2" && has_avx2()) return avx2::table;
  if (asked == "avx512" && has_avx512()) return avx512::table;
#endif
  throw std::runtime_error("MASKSERVE_ISA is \"" + asked + "\": this processor runs baseline" +
                           (has_avx2() ? ", avx2" : "") + (has_avx512() ? ", avx512" : "") +
                           "; set one of them, or unset it");
}

}  // namespace

const Variant& variant() {
  static const Variant& chosen = choose();
  return chosen;
}

}  // namespace maskserve
