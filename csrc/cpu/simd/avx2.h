// AVX2 with FMA and F16C: 8 floats. The contract is in vec.h.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "types.h"

namespace causal_conv1d {
namespace {

constexpr int kNativesInVec = 2;
constexpr bool kHas32Registers = false;
constexpr bool kHasExp2OfSixteenths = false;

struct NativeMask {
  __m256 m;
};

struct Native {
  using Scalar = float;
  static constexpr int kLanes = 8;
  __m256 v;

  static CAUSAL_CONV1D_INLINE Native set(float a) { return {_mm256_set1_ps(a)}; }
  static CAUSAL_CONV1D_INLINE Native load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static CAUSAL_CONV1D_INLINE Native load(const Half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static CAUSAL_CONV1D_INLINE Native load(const Bfloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }

  CAUSAL_CONV1D_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  CAUSAL_CONV1D_INLINE void store(Half* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half_bits());
  }
  CAUSAL_CONV1D_INLINE void store(Bfloat16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bfloat16_bits());
  }
  CAUSAL_CONV1D_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }
  CAUSAL_CONV1D_INLINE void stream(Half* p) const {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), half_bits());
  }
  CAUSAL_CONV1D_INLINE void stream(Bfloat16* p) const {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), bfloat16_bits());
  }

 private:
  CAUSAL_CONV1D_INLINE __m128i half_bits() const {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  CAUSAL_CONV1D_INLINE __m128i bfloat16_bits() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i carried =
        _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(carried, 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
  }
};

CAUSAL_CONV1D_INLINE Native add(Native a, Native b) { return {_mm256_add_ps(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native sub(Native a, Native b) { return {_mm256_sub_ps(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native mul(Native a, Native b) { return {_mm256_mul_ps(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native reciprocal(Native a) {
  return {_mm256_div_ps(_mm256_set1_ps(1.0f), a.v)};
}
CAUSAL_CONV1D_INLINE Native min(Native a, Native b) { return {_mm256_min_ps(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native at_least(Native a, Native b) { return {_mm256_max_ps(a.v, b.v)}; }
// A division is one instruction; an estimate and its refinement are four on the same two units.
CAUSAL_CONV1D_INLINE Native quotient_estimate(Native a, Native b) {
  return {_mm256_div_ps(a.v, b.v)};
}
CAUSAL_CONV1D_INLINE Native exp2_of(Native shifted) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23))};
}
CAUSAL_CONV1D_INLINE Native fma(Native a, Native b, Native c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
CAUSAL_CONV1D_INLINE NativeMask not_less(Native a, Native b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)};
}
CAUSAL_CONV1D_INLINE Native select_or_zero(NativeMask m, Native a) {
  return {_mm256_and_ps(m.m, a.v)};
}

CAUSAL_CONV1D_INLINE NativeMask both(NativeMask a, NativeMask b) {
  return {_mm256_and_ps(a.m, b.m)};
}
CAUSAL_CONV1D_INLINE NativeMask equal_ids(Native, const int32_t* a, const int32_t* b) {
  const __m256i ids_a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  const __m256i ids_b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(ids_a, ids_b))};
}
CAUSAL_CONV1D_INLINE NativeMask valid_ids(Native, const int32_t* a) {
  const __m256i ids = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(ids, _mm256_set1_epi32(-1)))};
}
CAUSAL_CONV1D_INLINE Native scale_by_exp2(Native a, Native shifted) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_castps_si256(a.v)))};
}

template <int k>
CAUSAL_CONV1D_INLINE Native align(Native a, Native b) {
  const __m256i low = _mm256_castps_si256(a.v), high = _mm256_castps_si256(b.v);
  const __m256i middle = _mm256_permute2x128_si256(low, high, 0x21);
  return {_mm256_castsi256_ps(k < 4 ? _mm256_alignr_epi8(middle, low, 4 * k % 16)
                                    : _mm256_alignr_epi8(high, middle, 4 * k % 16))};
}
CAUSAL_CONV1D_INLINE Native both_bits(Native a, Native b) { return {_mm256_and_ps(a.v, b.v)}; }

CAUSAL_CONV1D_INLINE void load_even_odd(const Bfloat16* p, Native* even, Native* odd) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  *even = {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
  *odd = {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-65536)))};
}
CAUSAL_CONV1D_INLINE __m256i rounded_bits(Native a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
template <bool kStream>
CAUSAL_CONV1D_INLINE void store_even_odd(Native even, Native odd, Bfloat16* p) {
  const __m256i low = _mm256_srli_epi32(rounded_bits(even), 16);
  const __m256i joined = _mm256_blend_epi16(rounded_bits(odd), low, 0x55);
  if (kStream) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), joined);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), joined);
  }
}

CAUSAL_CONV1D_INLINE Native exp2_of_sixteenths(Native) { return Native::set(0.0f); }

CAUSAL_CONV1D_INLINE float scalar_of(Half a) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(a.bits)));
}
CAUSAL_CONV1D_INLINE void finish_streams() { _mm_sfence(); }

}  // namespace
}  // namespace causal_conv1d
