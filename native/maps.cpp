// Ranges of files as memory: what lies in the page cache is read where it lies, in half the time of a copy.
//
// A page that the file no longer has, or that cannot be read, raises SIGBUS where it is touched. Inside a range that is
// mapped here a page of zeros takes its place, and the range is marked; elsewhere the signal goes where it went before.

#include "maps.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <mutex>
#endif

namespace maskserve {

#if defined(__linux__)

namespace {

constexpr int n_guards = 256;

struct Guard {
  std::atomic<uintptr_t> start{0}, end{0};
  std::atomic<bool> is_taken{false}, is_spoilt{false};
};

Guard guards[n_guards];
struct sigaction before;
std::atomic<bool> is_passed_on{false};
std::mutex install_lock;
uintptr_t page_bytes = 0;

// Only what a signal handler may call: atomics without locks, and mmap, which is a call of the system.
static_assert(std::atomic<uintptr_t>::is_always_lock_free && std::atomic<bool>::is_always_lock_free);

void pass_on(int sent, siginfo_t* info, void* context) {
  if (before.sa_handler == SIG_IGN) return;  // of a signal that somebody sent: of a fault the system does not ask
  if (before.sa_handler == SIG_DFL) {
    std::signal(sent, SIG_DFL);
    ::raise(sent);  // comes once this handler returns
  } else if (before.sa_flags & SA_SIGINFO) {
    before.sa_sigaction(sent, info, context);
  } else {
    before.sa_handler(sent);
  }
}

void on_bus(int sent, siginfo_t* info, void* context) {
  const bool is_sent = info->si_code <= 0;  // by a process: then there is no address
  if (is_sent && !is_passed_on.load()) return pass_on(sent, info, context);
  const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
  for (Guard& guard : guards) {
    if (is_sent || at < guard.start.load() || at >= guard.end.load()) continue;
    void* const page = reinterpret_cast<void*>(at & ~(page_bytes - 1));
    if (mmap(page, page_bytes, PROT_READ, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED) break;
    guard.is_spoilt.store(true);
    return;
  }
  if (before.sa_handler == SIG_IGN || is_passed_on.exchange(true)) {  // or whom it went to has sent it back
    std::signal(sent, SIG_DFL);
    if (is_sent) ::raise(sent);
    return;
  }
  pass_on(sent, info, context);
}

// Who sets a handler after us, such as Python's faulthandler, is the one that signals go on to.
bool install() {
  const std::lock_guard<std::mutex> lock(install_lock);
  struct sigaction now;
  if (sigaction(SIGBUS, nullptr, &now) != 0) return false;
  if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus) return true;
  page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  before = now;
  is_passed_on.store(false);
  struct sigaction ours = {};
  ours.sa_sigaction = on_bus;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  return sigaction(SIGBUS, &ours, nullptr) == 0;
}

int take_guard() {
  for (int i = 0; i < n_guards; ++i) {
    if (!guards[i].is_taken.exchange(true)) return i;
  }
  return -1;
}

}  // namespace

Mapped map_range(int descriptor, int64_t start, int64_t n_bytes) {
  if (n_bytes <= 0 || start < 0 || !install()) return {};
  const int own = take_guard();
  if (own < 0) return {};
  Guard& guard = guards[own];
  const int64_t inside = start % static_cast<int64_t>(page_bytes);
  const size_t length = static_cast<size_t>(inside + n_bytes);
  void* const first = mmap(nullptr, length, PROT_READ, MAP_PRIVATE, descriptor, start - inside);
  if (first == MAP_FAILED) {
    guard.is_taken.store(false);
    return {};
  }
  const uintptr_t address = reinterpret_cast<uintptr_t>(first), pages = (length + page_bytes - 1) & ~(page_bytes - 1);
  guard.is_spoilt.store(false);
  guard.start.store(address);
  guard.end.store(address + pages);
  return {static_cast<const unsigned char*>(first) + inside, own};
}

bool unmap_range(const Mapped& mapped, int64_t n_bytes) {
  Guard& guard = guards[mapped.guard];
  const uintptr_t first = guard.start.load();
  guard.end.store(0);
  guard.start.store(0);
  munmap(reinterpret_cast<void*>(first), reinterpret_cast<uintptr_t>(mapped.ptr) - first + static_cast<size_t>(n_bytes));
  const bool is_whole = !guard.is_spoilt.load();
  guard.is_taken.store(false);
  return is_whole;
}

#else

Mapped map_range(int, int64_t, int64_t) { return {}; }
bool unmap_range(const Mapped&, int64_t) { return true; }

#endif

}  // namespace maskserve
