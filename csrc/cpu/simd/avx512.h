// AVX-512 (F, BW, DQ, VL) with FMA and F16C: 16 floats. The contract is in vec.h.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "types.h"

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// The intrinsics of these versions take an undefined vector that they do not read.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace causal_conv1d {
namespace {

constexpr int kNativesInVec = 2;
constexpr bool kHas32Registers = true;
constexpr bool kHasExp2OfSixteenths = true;

struct NativeMask {
  __mmask16 m;
};

struct Native {
  using Scalar = float;
  static constexpr int kLanes = 16;
  __m512 v;

  static CAUSAL_CONV1D_INLINE Native set(float a) { return {_mm512_set1_ps(a)}; }
  static CAUSAL_CONV1D_INLINE Native load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static CAUSAL_CONV1D_INLINE Native load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static CAUSAL_CONV1D_INLINE Native load(const Bfloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }

  CAUSAL_CONV1D_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  CAUSAL_CONV1D_INLINE void store(Half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half_bits());
  }
  CAUSAL_CONV1D_INLINE void store(Bfloat16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits());
  }
  CAUSAL_CONV1D_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  CAUSAL_CONV1D_INLINE void stream(Half* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half_bits());
  }
  CAUSAL_CONV1D_INLINE void stream(Bfloat16* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits());
  }

 private:
  CAUSAL_CONV1D_INLINE __m256i half_bits() const {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  CAUSAL_CONV1D_INLINE __m256i bfloat16_bits() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i carried =
        _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(carried, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_set1_epi32(0x40);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, quiet));
  }
};

CAUSAL_CONV1D_INLINE Native add(Native a, Native b) { return {_mm512_add_ps(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native sub(Native a, Native b) { return {_mm512_sub_ps(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native mul(Native a, Native b) { return {_mm512_mul_ps(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native reciprocal(Native a) {
  const __m512 r = _mm512_rcp14_ps(a.v);
  const __m512 error = _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1.0f));
  return {_mm512_fmadd_ps(r, error, r)};
}
CAUSAL_CONV1D_INLINE Native min(Native a, Native b) { return {_mm512_min_ps(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native at_least(Native a, Native b) { return {_mm512_max_ps(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native quotient_estimate(Native a, Native b) {
  return {_mm512_mul_ps(a.v, _mm512_rcp14_ps(b.v))};
}
CAUSAL_CONV1D_INLINE Native exp2_of(Native shifted) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23))};
}
CAUSAL_CONV1D_INLINE Native fma(Native a, Native b, Native c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
CAUSAL_CONV1D_INLINE NativeMask not_less(Native a, Native b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ)};
}
CAUSAL_CONV1D_INLINE Native select_or_zero(NativeMask m, Native a) {
  return {_mm512_maskz_mov_ps(m.m, a.v)};
}

CAUSAL_CONV1D_INLINE NativeMask both(NativeMask a, NativeMask b) {
  return {static_cast<__mmask16>(a.m & b.m)};
}
CAUSAL_CONV1D_INLINE NativeMask equal_ids(Native, const int32_t* a, const int32_t* b) {
  return {_mm512_cmpeq_epi32_mask(_mm512_loadu_si512(a), _mm512_loadu_si512(b))};
}
CAUSAL_CONV1D_INLINE NativeMask valid_ids(Native, const int32_t* a) {
  return {_mm512_cmpge_epi32_mask(_mm512_loadu_si512(a), _mm512_setzero_si512())};
}
CAUSAL_CONV1D_INLINE Native scale_by_exp2(Native a, Native shifted) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_castps_si512(a.v)))};
}

CAUSAL_CONV1D_INLINE Native exp2_of_sixteenths(Native shifted) {
  // The bits of 2^(i / 16), less what i adds to them below.
  alignas(64) static constexpr uint32_t kPowers[16] = {
      0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
      0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
      0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  const __m512i bits = _mm512_castps_si512(shifted.v);
  const __m512i power = _mm512_permutexvar_epi32(bits, _mm512_load_si512(kPowers));
  return {_mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_slli_epi32(bits, 19)))};
}

template <int k>
CAUSAL_CONV1D_INLINE Native align(Native a, Native b) {
  const __m512i low = _mm512_castps_si512(a.v), high = _mm512_castps_si512(b.v);
  return {_mm512_castsi512_ps(_mm512_alignr_epi32(high, low, k))};
}
CAUSAL_CONV1D_INLINE Native both_bits(Native a, Native b) { return {_mm512_and_ps(a.v, b.v)}; }

CAUSAL_CONV1D_INLINE void load_even_odd(const Bfloat16* p, Native* even, Native* odd) {
  const __m512i bits = _mm512_loadu_si512(p);
  *even = {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
  *odd = {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-65536)))};
}
// Rounds to nearest even: what is cut off, at the place of what is kept, carries if it is more than
// half, or half and the kept is odd.
template <bool kStream>
CAUSAL_CONV1D_INLINE void store_even_odd(Native even, Native odd, Bfloat16* p) {
  constexpr __mmask32 kOdd = 0xaaaaaaaa;
  const __m512i e = _mm512_castps_si512(even.v), o = _mm512_castps_si512(odd.v);
  const __m512i kept = _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(e, 16), o);
  const __m512i cut = _mm512_mask_blend_epi16(kOdd, e, _mm512_slli_epi32(o, 16));
  const __m512i cut_or_odd =  // cut | (kept & 1)
      _mm512_ternarylogic_epi32(cut, kept, _mm512_set1_epi16(1), 0xf8);
  const __m512i half_sum = _mm512_avg_epu16(cut_or_odd, _mm512_set1_epi16(0x7ffe));
  const __m512i joined = _mm512_add_epi16(kept, _mm512_srli_epi16(half_sum, 15));
  if (kStream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), joined);
  } else {
    _mm512_storeu_si512(p, joined);
  }
}

CAUSAL_CONV1D_INLINE float scalar_of(Half a) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(a.bits)));
}
CAUSAL_CONV1D_INLINE void finish_streams() { _mm_sfence(); }

}  // namespace
}  // namespace causal_conv1d
