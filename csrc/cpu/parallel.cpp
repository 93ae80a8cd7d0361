// See parallel.h.
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace causal_conv1d {
namespace {

constexpr size_t kAlignment = 64;
// Enough for an update; below it a call of one thread allocates nothing.
constexpr size_t kStackBytes = 32 * 1024;

class Loop {
 public:
  Loop(int64_t units, size_t scratch_bytes, UnitFunction function, const void* context)
      : units_(units), scratch_bytes_(scratch_bytes), function_(function), context_(context) {}

  // Takes units until none is left.
  void work() noexcept {
    try {
      if (scratch_bytes_ <= kStackBytes) {
        alignas(kAlignment) char scratch[kStackBytes];
        take_units(scratch);
      } else {
        const std::unique_ptr<char[]> memory(new char[scratch_bytes_ + kAlignment]);
        const size_t past = reinterpret_cast<uintptr_t>(memory.get()) % kAlignment;
        take_units(memory.get() + (kAlignment - past));
      }
    } catch (...) {
      next_.store(units_);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void rethrow() {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void take_units(char* scratch) {
    for (int64_t unit; (unit = next_.fetch_add(1)) < units_;) function_(context_, unit, scratch);
  }

  const int64_t units_;
  const size_t scratch_bytes_;
  const UnitFunction function_;
  const void* const context_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr error_;
};

}  // namespace

int thread_count(int requested, int64_t useful) {
  if (useful <= 1 || requested == 1)
    return 1;  // asking for the number of cores costs a system call
  if (requested <= 0) requested = static_cast<int>(std::thread::hardware_concurrency());
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(requested, useful)));
}

void parallel_for(int64_t units, int num_threads, size_t scratch_bytes, UnitFunction function,
                  const void* context) {
  Loop loop(units, scratch_bytes, function, context);
  std::vector<std::thread> threads;
  const int64_t others = std::min<int64_t>(num_threads, units) - 1;
  if (others > 0) threads.reserve(static_cast<size_t>(others));
  for (int64_t i = 0; i < others; ++i) {
    try {
      threads.emplace_back([&loop] { loop.work(); });
    } catch (const std::exception&) {
      break;
    }
  }
  loop.work();
  for (std::thread& thread : threads) thread.join();
  loop.rethrow();
}

}  // namespace causal_conv1d
