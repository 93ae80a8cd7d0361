// See parallel.h.
#include "parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace causal_conv1d {
namespace {

constexpr size_t kAlignment = 64;
// Enough for an update; below it a call of one thread allocates nothing.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 1;  // AddressSanitizer knows where memory of the heap ends
#else
constexpr size_t kStackBytes = 32 * 1024;
#endif
// Work that is worth a thread: some ten microseconds where threads wait for it, else a hundred.
constexpr int64_t kWorkOfWaitingThread = 16 * 1024;
constexpr int64_t kWorkOfNewThread = 128 * 1024;

// What a compiler makes of `#pragma omp parallel num_threads(n)`: libgomp's interface, which LLVM's
// and Intel's libraries have too.
using OpenMpParallel = void (*)(void (*function)(void*), void* data, unsigned num_threads,
                                unsigned flags);

const pid_t process = getpid();

// Null where no OpenMP is loaded, and in a forked child: it has not the threads that OpenMP counts
// on, and would wait for them for ever.
OpenMpParallel openmp_parallel() {
  static const auto found = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return getpid() == process ? found : nullptr;
}

class Loop {
 public:
  Loop(int64_t units, int64_t threads, size_t scratch_bytes, UnitFunction function,
       const void* context)
      : units_(units),
        threads_(threads),
        scratch_bytes_(scratch_bytes),
        function_(function),
        context_(context) {}

  // Takes units until none is left; does nothing on more threads than are worth it.
  void work() noexcept {
    if (started_.fetch_add(1) >= threads_) return;
    if (scratch_bytes_ <= kStackBytes) {
      alignas(kAlignment) char scratch[kStackBytes];
      return take_units(scratch);
    }
    const std::unique_ptr<char[]> memory(new (std::nothrow) char[scratch_bytes_ + kAlignment]);
    if (memory == nullptr) {
      next_.store(units_);
      out_of_memory_.store(true);
      return;
    }
    const size_t past = reinterpret_cast<uintptr_t>(memory.get()) % kAlignment;
    take_units(memory.get() + (kAlignment - past));
  }

  // After all threads' work. (std::exception_ptr would need the libstdc++ of GCC 11.)
  void check() const {
    if (out_of_memory_.load()) throw std::bad_alloc();
  }

 private:
  void take_units(char* scratch) noexcept {
    for (int64_t unit; (unit = next_.fetch_add(1)) < units_;) function_(context_, unit, scratch);
  }

  const int64_t units_, threads_;
  const size_t scratch_bytes_;
  const UnitFunction function_;
  const void* const context_;
  std::atomic<int64_t> started_{0}, next_{0};
  std::atomic<bool> out_of_memory_{false};
};

}  // namespace

void parallel_for(int64_t units, int num_threads, int64_t work, size_t scratch_bytes,
                  UnitFunction function, const void* context) {
  int64_t count = std::min(units, work / kWorkOfWaitingThread);
  if (count <= 1 || num_threads == 1) {
    Loop loop(units, 1, scratch_bytes, function, context);
    loop.work();
    return loop.check();
  }
  if (num_threads <= 0) num_threads = static_cast<int>(std::thread::hardware_concurrency());
  count = std::min<int64_t>(count, num_threads);
  if (const OpenMpParallel parallel = openmp_parallel()) {
    Loop loop(units, count, scratch_bytes, function, context);
    // With fewer threads than torch's, OpenMP would end the others and torch start them again.
    parallel([](void* data) { static_cast<Loop*>(data)->work(); }, &loop,
             static_cast<unsigned>(num_threads), 0);
    return loop.check();
  }
  count = std::min(count, std::max<int64_t>(1, work / kWorkOfNewThread));
  Loop loop(units, count, scratch_bytes, function, context);
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(count));
  while (static_cast<int64_t>(threads.size()) + 1 < count) {
    try {
      threads.emplace_back([&loop] { loop.work(); });
    } catch (const std::exception&) {
      break;
    }
  }
  loop.work();
  for (std::thread& thread : threads) thread.join();
  loop.check();
}

}  // namespace causal_conv1d
