// mamba_ssm's BOOL_SWITCH, with the flags that are the same in every row (B and C vary in time,
// delta_softplus is on) fixed, so that 4 kernels are built in place of 16 or 32. The kernels are
// untouched.
#pragma once
#include "static_switch.h"
#undef BOOL_SWITCH
#define MAMBA_BOTH(COND, NAME, ...) \
  [&] {                             \
    if (COND) {                     \
      constexpr bool NAME = true;   \
      return __VA_ARGS__();         \
    } else {                        \
      constexpr bool NAME = false;  \
      return __VA_ARGS__();         \
    }                               \
  }()
#define MAMBA_TRUE(COND, NAME, ...)      \
  [&] {                                  \
    if (!(COND)) {                       \
      mamba_note(cudaErrorNotSupported); \
      return;                            \
    }                                    \
    constexpr bool NAME = true;          \
    return __VA_ARGS__();                \
  }()
#define SWITCH_kIsEvenLen MAMBA_BOTH
#define SWITCH_kHasZ MAMBA_BOTH
#define SWITCH_kIsVariableB MAMBA_TRUE
#define SWITCH_kIsVariableC MAMBA_TRUE
#define SWITCH_kDeltaSoftplus MAMBA_TRUE
#define BOOL_SWITCH(COND, NAME, ...) SWITCH_##NAME(COND, NAME, __VA_ARGS__)
