#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <string>

namespace causal_conv1d {
namespace {

constexpr char kVariable[] = "CAUSAL_CONV1D_CPU_ISA";

#if defined(__x86_64__)
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

struct Runnable {
  const KernelTable* kernels[4] = {};
  Runnable() {
    const KernelTable** next = kernels;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (runs_avx512()) *next++ = &avx512::kernels;
    if (runs_avx2()) *next++ = &avx2::kernels;
    *next = &baseline::kernels;
#elif defined(__aarch64__)
    *next = &neon::kernels;
#else
    *next = &baseline::kernels;
#endif
  }
};

}  // namespace

const KernelTable* const* runnable_kernels() {
  static const Runnable runnable;
  return runnable.kernels;
}

const KernelTable* choose_kernels(const char* name) {
  const KernelTable* const* k = runnable_kernels();
  if (*name == '\0') return *k;
  while (*k != nullptr && std::strcmp((*k)->name, name) != 0) ++k;
  return *k;
}

static const std::string wanted = [] {
  const char* const value = std::getenv(kVariable);
  return std::string(value == nullptr ? "" : value);
}();

const KernelTable* active_kernels = choose_kernels(wanted.c_str());

Status no_kernels(const char* function) {
  std::string names;
  for (const KernelTable* const* k = runnable_kernels(); *k != nullptr; ++k) {
    names += (names.empty() ? "" : ", ") + std::string((*k)->name);
  }
  return error(CAUSAL_CONV1D_RUNTIME_ERROR,
               "%s: %s must name kernels that this CPU runs (%s), got %.40s", function, kVariable,
               names.c_str(), wanted.c_str());
}

}  // namespace causal_conv1d
