// Functions of vectors that the scan needs, for float (Native) and double. NaN stays NaN, and the
// limits at infinity are exact.
#pragma once

#include "exp.h"
#include "simd/vec.h"

namespace causal_conv1d {
namespace {

#if defined(CAUSAL_CONV1D_ISA_AVX512)
CAUSAL_CONV1D_INLINE Native max(Native a, Native b) { return {_mm512_max_ps(a.v, b.v)}; }
#elif defined(CAUSAL_CONV1D_ISA_AVX2)
CAUSAL_CONV1D_INLINE Native max(Native a, Native b) { return {_mm256_max_ps(a.v, b.v)}; }
#elif defined(CAUSAL_CONV1D_ISA_NEON)
CAUSAL_CONV1D_INLINE Native max(Native a, Native b) { return {vmaxq_f32(a.v, b.v)}; }
#else
CAUSAL_CONV1D_INLINE Native max(Native a, Native b) { return {a.v > b.v ? a.v : b.v}; }
#endif

// a * b + c, in one operation where the instruction set has it.
CAUSAL_CONV1D_INLINE Native madd(Native a, Native b, Native c) {
#if defined(CAUSAL_CONV1D_ONE_LANE)
  return add(mul(a, b), c);
#else
  return fma(a, b, c);
#endif
}
CAUSAL_CONV1D_INLINE DoubleVec madd(DoubleVec a, DoubleVec b, DoubleVec c) {
  return add(mul(a, b), c);
}

// 2^r for -1/2 <= r <= 1/2, to 2e-8.
CAUSAL_CONV1D_INLINE Native exp2_of_fraction(Native r) {
  Native q = Native::set(1.5353362e-4f);
  q = madd(q, r, Native::set(1.3398875e-3f));
  q = madd(q, r, Native::set(9.6184369e-3f));
  q = madd(q, r, Native::set(5.5503324e-2f));
  q = madd(q, r, Native::set(2.4022648e-1f));
  q = madd(q, r, Native::set(6.9314718e-1f));
  return madd(q, r, Native::set(1.0f));
}

// n + 1.5 * 2^23 for the whole number n next to x.
CAUSAL_CONV1D_INLINE Native shift() { return Native::set(12582912.0f); }

// 2^x; 0 below 2^-126. The bounds make 0 and infinity of what is beyond them. The lowest nine bits
// of a NaN must be 0.
CAUSAL_CONV1D_INLINE Native exp2(Native x) {
  x = max(Native::set(-127.0f), min(Native::set(128.0f), x));
  const Native shifted = add(x, shift());
  return scale_by_exp2(exp2_of_fraction(sub(x, sub(shifted, shift()))), shifted);
}

// e^x for x <= 0, to 1e-7 of it; 0 below 2^-126. For NaN it may be anything.
CAUSAL_CONV1D_INLINE Native exp_of_negative(Native x) {
  x = max(Native::set(-128.0f), x);
  const Native log2e = Native::set(1.44269504f);
  const Native whole = mul(x, log2e);
  Native cut_off = fma(x, log2e, sub(Native::set(0.0f), whole));
  cut_off = madd(x, Native::set(1.925963e-8f), cut_off);  // the rest of log2(e)
  const Native power = exp2(whole);
  return madd(power, mul(cut_off, Native::set(0.69314718f)), power);
}
CAUSAL_CONV1D_INLINE DoubleVec exp(DoubleVec x) { return {exp_without_errno(x.v)}; }

// exp(dt A) is decay(dt, decay_rate(A)), and A is rate_scale() times decay_rate(A).
CAUSAL_CONV1D_INLINE Native decay(Native dt, Native rate) { return exp2(mul(dt, rate)); }
CAUSAL_CONV1D_INLINE DoubleVec decay(DoubleVec dt, DoubleVec rate) { return exp(mul(dt, rate)); }
CAUSAL_CONV1D_INLINE float decay_rate(float A) {
  return A == A ? A * 1.44269504f : __builtin_nanf("");
}
CAUSAL_CONV1D_INLINE double decay_rate(double A) { return A; }
CAUSAL_CONV1D_INLINE Native rate_scale(Native) { return Native::set(0.69314718f); }
CAUSAL_CONV1D_INLINE DoubleVec rate_scale(DoubleVec) { return DoubleVec::set(1.0); }

// -|x|
CAUSAL_CONV1D_INLINE Native minus_magnitude(Native x) { return min(sub(Native::set(0.0f), x), x); }

// (1 or e) / (1 + e) for e = e^-|x|. For NaN it may be anything.
CAUSAL_CONV1D_INLINE Native sigmoid(Native x) {
  const Native one = Native::set(1.0f), e = exp_of_negative(minus_magnitude(x));
  const NativeMask positive = not_less(x, Native::set(0.0f));
  return mul(add(e, select_or_zero(positive, sub(one, e))), reciprocal(add(one, e)));
}
CAUSAL_CONV1D_INLINE DoubleVec sigmoid(DoubleVec x) { return {1 / (1 + exp_without_errno(-x.v))}; }

// log(1 + e^x) = max(x, 0) + log1p(w), w = e^-|x|; log1p(w) = 2 atanh(w / (2 + w)), a series in
// odd powers of numbers up to 1 / 3.
CAUSAL_CONV1D_INLINE Native softplus(Native x) {
  const Native zero = Native::set(0.0f), two = Native::set(2.0f);
  const Native w = exp_of_negative(minus_magnitude(x));
  const Native z = mul(w, reciprocal(add(two, w)));
  const Native s = mul(z, z);
  Native q = Native::set(0.24424908f);
  q = madd(q, s, Native::set(0.21389961f));
  q = madd(q, s, Native::set(0.28621042f));
  q = madd(q, s, Native::set(0.39998677f));
  q = madd(q, s, Native::set(0.66666681f));
  q = madd(q, s, two);
  return madd(q, z, max(zero, x));
}
CAUSAL_CONV1D_INLINE DoubleVec softplus(DoubleVec x) {
  const double w = exp_without_errno(x.v < 0 ? x.v : -x.v);
  return {(x.v < 0 ? 0 : x.v) + __builtin_log1p(w)};
}

// In place: rows become columns.
#if defined(CAUSAL_CONV1D_ISA_AVX512)
CAUSAL_CONV1D_INLINE void transpose(Native (&r)[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
    r[i + 4].v = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
    r[i + 12].v = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0xdd);
  }
}
#elif defined(CAUSAL_CONV1D_ISA_AVX2)
CAUSAL_CONV1D_INLINE void transpose(Native (&r)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}
#elif defined(CAUSAL_CONV1D_ISA_NEON)
CAUSAL_CONV1D_INLINE void transpose(Native (&r)[4]) {
  const float32x4x2_t low = vzipq_f32(r[0].v, r[2].v), high = vzipq_f32(r[1].v, r[3].v);
  const float32x4x2_t first = vzipq_f32(low.val[0], high.val[0]);
  const float32x4x2_t second = vzipq_f32(low.val[1], high.val[1]);
  r[0].v = first.val[0];
  r[1].v = first.val[1];
  r[2].v = second.val[0];
  r[3].v = second.val[1];
}
#else
CAUSAL_CONV1D_INLINE void transpose(Native (&)[1]) {}
#endif
CAUSAL_CONV1D_INLINE void transpose(DoubleVec (&)[1]) {}

}  // namespace
}  // namespace causal_conv1d
