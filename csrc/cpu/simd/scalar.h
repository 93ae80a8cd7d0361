// Any CPU: one float, and no groups. The contract is in vec.h.
#pragma once

#include <stdint.h>

#include "types.h"

#define CAUSAL_CONV1D_ONE_LANE

namespace causal_conv1d {
namespace {

constexpr int kNativesInVec = 1;
constexpr bool kHasExp2OfSixteenths = false;

struct NativeMask {
  bool m;
};

CAUSAL_CONV1D_INLINE uint32_t bits_of(float a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, sizeof(bits));
  return bits;
}

CAUSAL_CONV1D_INLINE float float_of(uint32_t bits) {
  float a;
  __builtin_memcpy(&a, &bits, sizeof(a));
  return a;
}

struct Native {
  using Scalar = float;
  static constexpr int kLanes = 1;
  float v;

  static CAUSAL_CONV1D_INLINE Native set(float a) { return {a}; }
  static CAUSAL_CONV1D_INLINE Native load(const float* p) { return {*p}; }
  static CAUSAL_CONV1D_INLINE Native load(const Half* p) {
    const uint32_t sign = (p->bits & 0x8000u) << 16;
    const uint32_t exponent = (p->bits >> 10) & 0x1fu;
    const uint32_t fraction = p->bits & 0x3ffu;
    if (exponent == 0) {  // fraction * 2^-24 is exact
      const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
      return {sign != 0 ? -magnitude : magnitude};
    }
    if (exponent == 31) {
      const uint32_t quiet = fraction != 0 ? 0x400000u : 0u;
      return {float_of(sign | 0x7f800000u | quiet | (fraction << 13))};
    }
    return {float_of(sign | ((exponent + 112) << 23) | (fraction << 13))};
  }
  static CAUSAL_CONV1D_INLINE Native load(const Bfloat16* p) {
    return {float_of(static_cast<uint32_t>(p->bits) << 16)};
  }

  CAUSAL_CONV1D_INLINE void store(float* p) const { *p = v; }
  CAUSAL_CONV1D_INLINE void store(Half* p) const {
    const uint32_t sign = (bits_of(v) >> 16) & 0x8000u;
    const uint32_t magnitude = bits_of(v) & 0x7fffffffu;
    uint32_t bits;
    if (magnitude > 0x7f800000u) {
      bits = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
      bits = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24
      bits = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    } else {
      bits = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    p->bits = static_cast<uint16_t>(sign | bits);
  }
  CAUSAL_CONV1D_INLINE void store(Bfloat16* p) const {
    const uint32_t bits = bits_of(v);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    p->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
  }
  template <class T>
  CAUSAL_CONV1D_INLINE void stream(T* p) const {
    store(p);
  }
};

CAUSAL_CONV1D_INLINE Native add(Native a, Native b) { return {a.v + b.v}; }
CAUSAL_CONV1D_INLINE Native sub(Native a, Native b) { return {a.v - b.v}; }
CAUSAL_CONV1D_INLINE Native mul(Native a, Native b) { return {a.v * b.v}; }
CAUSAL_CONV1D_INLINE Native reciprocal(Native a) { return {1.0f / a.v}; }
CAUSAL_CONV1D_INLINE Native min(Native a, Native b) { return {a.v < b.v ? a.v : b.v}; }
CAUSAL_CONV1D_INLINE Native at_least(Native a, Native b) { return {a.v > b.v ? a.v : b.v}; }
CAUSAL_CONV1D_INLINE Native quotient_estimate(Native a, Native b) { return {a.v / b.v}; }
CAUSAL_CONV1D_INLINE Native exp2_of(Native shifted) { return {float_of(bits_of(shifted.v) << 23)}; }
CAUSAL_CONV1D_INLINE Native fma(Native a, Native b, Native c) {
  return {__builtin_fmaf(a.v, b.v, c.v)};
}
CAUSAL_CONV1D_INLINE NativeMask not_less(Native a, Native b) { return {!(a.v < b.v)}; }
CAUSAL_CONV1D_INLINE Native select_or_zero(NativeMask m, Native a) { return {m.m ? a.v : 0.0f}; }

CAUSAL_CONV1D_INLINE NativeMask both(NativeMask a, NativeMask b) { return {a.m && b.m}; }
CAUSAL_CONV1D_INLINE NativeMask equal_ids(Native, const int32_t* a, const int32_t* b) {
  return {*a == *b};
}
CAUSAL_CONV1D_INLINE NativeMask valid_ids(Native, const int32_t* a) { return {*a >= 0}; }
CAUSAL_CONV1D_INLINE Native scale_by_exp2(Native a, Native shifted) {
  return {float_of((bits_of(shifted.v) << 23) + bits_of(a.v))};
}

CAUSAL_CONV1D_INLINE Native exp2_of_sixteenths(Native) { return Native::set(0.0f); }

CAUSAL_CONV1D_INLINE float scalar_of(Half a) { return Native::load(&a).v; }
CAUSAL_CONV1D_INLINE void finish_streams() {}

}  // namespace
}  // namespace causal_conv1d
