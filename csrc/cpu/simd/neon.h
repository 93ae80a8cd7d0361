// NEON of aarch64: 4 floats. The contract is in vec.h.
#pragma once

#include <arm_neon.h>
#include <stdint.h>

#include "types.h"

namespace causal_conv1d {
namespace {

constexpr int kNativesInVec = 2;
constexpr bool kHas32Registers = true;
constexpr bool kHasExp2OfSixteenths = false;

struct NativeMask {
  uint32x4_t m;
};

struct Native {
  using Scalar = float;
  static constexpr int kLanes = 4;
  float32x4_t v;

  static CAUSAL_CONV1D_INLINE Native set(float a) { return {vdupq_n_f32(a)}; }
  static CAUSAL_CONV1D_INLINE Native load(const float* p) { return {vld1q_f32(p)}; }
  static CAUSAL_CONV1D_INLINE Native load(const Half* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))};
  }
  static CAUSAL_CONV1D_INLINE Native load(const Bfloat16* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16))};
  }

  CAUSAL_CONV1D_INLINE void store(float* p) const { vst1q_f32(p, v); }
  CAUSAL_CONV1D_INLINE void store(Half* p) const {
    vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v)));
  }
  CAUSAL_CONV1D_INLINE void store(Bfloat16* p) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t high = vshrq_n_u32(bits, 16);
    const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
    const uint32x4_t carried = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
    const uint32x4_t rounded = vshrq_n_u32(carried, 16);
    const uint32x4_t quiet = vorrq_u32(high, vdupq_n_u32(0x40));
    vst1_u16(&p->bits, vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet)));
  }
  // These CPUs find out about streams of whole lines by themselves.
  template <class T>
  CAUSAL_CONV1D_INLINE void stream(T* p) const {
    store(p);
  }
};

CAUSAL_CONV1D_INLINE Native add(Native a, Native b) { return {vaddq_f32(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native sub(Native a, Native b) { return {vsubq_f32(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native mul(Native a, Native b) { return {vmulq_f32(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native reciprocal(Native a) { return {vdivq_f32(vdupq_n_f32(1.0f), a.v)}; }
CAUSAL_CONV1D_INLINE Native min(Native a, Native b) { return {vminq_f32(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native at_least(Native a, Native b) { return {vmaxq_f32(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native quotient_estimate(Native a, Native b) {
  const float32x4_t r = vrecpeq_f32(b.v);
  return {vmulq_f32(a.v, vmulq_f32(r, vrecpsq_f32(b.v, r)))};
}
CAUSAL_CONV1D_INLINE Native exp2_of(Native shifted) {
  return {vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(shifted.v), 23))};
}
CAUSAL_CONV1D_INLINE Native fma(Native a, Native b, Native c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
CAUSAL_CONV1D_INLINE NativeMask not_less(Native a, Native b) {
  return {vmvnq_u32(vcltq_f32(a.v, b.v))};
}
CAUSAL_CONV1D_INLINE Native select_or_zero(NativeMask m, Native a) {
  return {vreinterpretq_f32_u32(vandq_u32(m.m, vreinterpretq_u32_f32(a.v)))};
}

CAUSAL_CONV1D_INLINE NativeMask both(NativeMask a, NativeMask b) { return {vandq_u32(a.m, b.m)}; }
CAUSAL_CONV1D_INLINE NativeMask equal_ids(Native, const int32_t* a, const int32_t* b) {
  return {vceqq_s32(vld1q_s32(a), vld1q_s32(b))};
}
CAUSAL_CONV1D_INLINE NativeMask valid_ids(Native, const int32_t* a) {
  return {vcgeq_s32(vld1q_s32(a), vdupq_n_s32(0))};
}
CAUSAL_CONV1D_INLINE Native scale_by_exp2(Native a, Native shifted) {
  const int32x4_t exponent = vshlq_n_s32(vreinterpretq_s32_f32(shifted.v), 23);
  return {vreinterpretq_f32_s32(vaddq_s32(exponent, vreinterpretq_s32_f32(a.v)))};
}

template <int k>
CAUSAL_CONV1D_INLINE Native align(Native a, Native b) {
  return {vextq_f32(a.v, b.v, k)};
}
CAUSAL_CONV1D_INLINE Native both_bits(Native a, Native b) {
  return {vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a.v), vreinterpretq_u32_f32(b.v)))};
}

CAUSAL_CONV1D_INLINE void load_even_odd(const Bfloat16* p, Native* even, Native* odd) {
  const uint32x4_t bits = vreinterpretq_u32_u16(vld1q_u16(&p->bits));
  *even = {vreinterpretq_f32_u32(vshlq_n_u32(bits, 16))};
  *odd = {vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xffff0000u)))};
}
CAUSAL_CONV1D_INLINE uint32x4_t rounded_bits(Native a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
}
template <bool kStream>
CAUSAL_CONV1D_INLINE void store_even_odd(Native even, Native odd, Bfloat16* p) {
  const uint32x4_t joined = vsriq_n_u32(rounded_bits(odd), rounded_bits(even), 16);
  vst1q_u16(&p->bits, vreinterpretq_u16_u32(joined));
}

CAUSAL_CONV1D_INLINE Native exp2_of_sixteenths(Native) { return Native::set(0.0f); }

CAUSAL_CONV1D_INLINE float scalar_of(Half a) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(a.bits))), 0);
}
CAUSAL_CONV1D_INLINE void finish_streams() {}

}  // namespace
}  // namespace causal_conv1d
