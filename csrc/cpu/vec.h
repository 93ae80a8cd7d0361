// Vectors of floats for one instruction set, and a one-lane vector of double for verification.
//
// Included by kernels.inl only, which is compiled once per instruction set; everything here has
// internal linkage, so that no function built for a newer CPU can stand in for another's. The
// set is chosen by CAUSAL_CONV1D_ISA_AVX512, _AVX2 or _NEON; without one a vector has one lane.
//
// Native: one register of floats. load / store convert from and to float, Half and Bfloat16; stores
//         round to nearest even and keep NaN.
// NativeMask: one truth value a lane, from comparisons.
// Vec: a pack of a few Native, with the same operations; what the kernels use.
// DoubleVec: one double.
//
// reciprocal: 1 / a to about 1e-7; reciprocal_estimate: to 7e-5 at worst. Both differ between
// instruction sets; all else gives the same bits on each (but for NaN payloads).
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(CAUSAL_CONV1D_ISA_AVX512) || defined(CAUSAL_CONV1D_ISA_AVX2)
#include <immintrin.h>
#elif defined(CAUSAL_CONV1D_ISA_NEON)
#include <arm_neon.h>
#endif

#if defined(CAUSAL_CONV1D_ISA_AVX512) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// The intrinsics of these versions take an undefined vector that they do not read.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define CAUSAL_CONV1D_INLINE inline __attribute__((always_inline))

namespace causal_conv1d {
namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

#if defined(CAUSAL_CONV1D_ISA_AVX512)

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
  // As store, past the caches; p is aligned to the bytes written.
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
CAUSAL_CONV1D_INLINE Native reciprocal_estimate(Native a) { return {_mm512_rcp14_ps(a.v)}; }
CAUSAL_CONV1D_INLINE Native reciprocal(Native a) {
  const __m512 r = _mm512_rcp14_ps(a.v);
  const __m512 error = _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1.0f));
  return {_mm512_fmadd_ps(r, error, r)};
}
CAUSAL_CONV1D_INLINE Native min(Native a, Native b) { return {_mm512_min_ps(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native fma(Native a, Native b, Native c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
// Of NaN, true.
CAUSAL_CONV1D_INLINE NativeMask not_less(Native a, Native b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ)};
}
CAUSAL_CONV1D_INLINE Native select_or_zero(NativeMask m, Native a) {
  return {_mm512_maskz_mov_ps(m.m, a.v)};
}
constexpr int kVectorsInPack = 2;
constexpr bool kHas32Registers = true;

CAUSAL_CONV1D_INLINE NativeMask both(NativeMask a, NativeMask b) {
  return {static_cast<__mmask16>(a.m & b.m)};
}
CAUSAL_CONV1D_INLINE NativeMask equal_ids(Native, const int32_t* a, const int32_t* b) {
  return {_mm512_cmpeq_epi32_mask(_mm512_loadu_si512(a), _mm512_loadu_si512(b))};
}
CAUSAL_CONV1D_INLINE NativeMask valid_ids(Native, const int32_t* a) {
  return {_mm512_cmpge_epi32_mask(_mm512_loadu_si512(a), _mm512_setzero_si512())};
}
// a * 2^n for shifted = n + 1.5 * 2^23, whose lowest bits are n in two's complement; a and the
// result are normal numbers.
CAUSAL_CONV1D_INLINE Native scale_by_exp2(Native a, Native shifted) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_castps_si512(a.v)))};
}

// 2^n for shifted = n + 1.5 * 2^19, whose lowest bits are n in sixteenths.
constexpr bool kHasExp2OfSixteenths = true;
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

// Lanes k to k + kLanes - 1 of a followed by b; 0 < k < kLanes.
template <int k>
CAUSAL_CONV1D_INLINE Native align(Native a, Native b) {
  const __m512i low = _mm512_castps_si512(a.v), high = _mm512_castps_si512(b.v);
  return {_mm512_castsi512_ps(_mm512_alignr_epi32(high, low, k))};
}
CAUSAL_CONV1D_INLINE Native both_bits(Native a, Native b) { return {_mm512_and_ps(a.v, b.v)}; }

// The elements of even index and those of odd index of 2 * kLanes.
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

#elif defined(CAUSAL_CONV1D_ISA_AVX2)

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
  // As store, past the caches; p is aligned to the bytes written.
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
CAUSAL_CONV1D_INLINE Native reciprocal_estimate(Native a) {
  const __m256 r = _mm256_rcp_ps(a.v);
  const __m256 error = _mm256_fnmadd_ps(a.v, r, _mm256_set1_ps(1.0f));
  return {_mm256_fmadd_ps(r, error, r)};
}
CAUSAL_CONV1D_INLINE Native reciprocal(Native a) {
  return {_mm256_div_ps(_mm256_set1_ps(1.0f), a.v)};
}
CAUSAL_CONV1D_INLINE Native min(Native a, Native b) { return {_mm256_min_ps(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native fma(Native a, Native b, Native c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
// Of NaN, true.
CAUSAL_CONV1D_INLINE NativeMask not_less(Native a, Native b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)};
}
CAUSAL_CONV1D_INLINE Native select_or_zero(NativeMask m, Native a) {
  return {_mm256_and_ps(m.m, a.v)};
}
constexpr int kVectorsInPack = 2;
constexpr bool kHas32Registers = false;

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
// a * 2^n for shifted = n + 1.5 * 2^23, whose lowest bits are n in two's complement; a and the
// result are normal numbers.
CAUSAL_CONV1D_INLINE Native scale_by_exp2(Native a, Native shifted) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_castps_si256(a.v)))};
}

// Lanes k to k + kLanes - 1 of a followed by b; 0 < k < kLanes.
template <int k>
CAUSAL_CONV1D_INLINE Native align(Native a, Native b) {
  const __m256i low = _mm256_castps_si256(a.v), high = _mm256_castps_si256(b.v);
  const __m256i middle = _mm256_permute2x128_si256(low, high, 0x21);
  return {_mm256_castsi256_ps(k < 4 ? _mm256_alignr_epi8(middle, low, 4 * k % 16)
                                    : _mm256_alignr_epi8(high, middle, 4 * k % 16))};
}
CAUSAL_CONV1D_INLINE Native both_bits(Native a, Native b) { return {_mm256_and_ps(a.v, b.v)}; }

// The elements of even index and those of odd index of 2 * kLanes.
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

#elif defined(CAUSAL_CONV1D_ISA_NEON)

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
CAUSAL_CONV1D_INLINE Native reciprocal_estimate(Native a) {
  const float32x4_t r = vrecpeq_f32(a.v);
  return {vmulq_f32(r, vrecpsq_f32(a.v, r))};
}
CAUSAL_CONV1D_INLINE Native reciprocal(Native a) { return {vdivq_f32(vdupq_n_f32(1.0f), a.v)}; }
CAUSAL_CONV1D_INLINE Native min(Native a, Native b) { return {vminq_f32(a.v, b.v)}; }
CAUSAL_CONV1D_INLINE Native fma(Native a, Native b, Native c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// Of NaN, true.
CAUSAL_CONV1D_INLINE NativeMask not_less(Native a, Native b) {
  return {vmvnq_u32(vcltq_f32(a.v, b.v))};
}
CAUSAL_CONV1D_INLINE Native select_or_zero(NativeMask m, Native a) {
  return {vreinterpretq_f32_u32(vandq_u32(m.m, vreinterpretq_u32_f32(a.v)))};
}
constexpr int kVectorsInPack = 2;
constexpr bool kHas32Registers = true;

CAUSAL_CONV1D_INLINE NativeMask both(NativeMask a, NativeMask b) { return {vandq_u32(a.m, b.m)}; }
CAUSAL_CONV1D_INLINE NativeMask equal_ids(Native, const int32_t* a, const int32_t* b) {
  return {vceqq_s32(vld1q_s32(a), vld1q_s32(b))};
}
CAUSAL_CONV1D_INLINE NativeMask valid_ids(Native, const int32_t* a) {
  return {vcgeq_s32(vld1q_s32(a), vdupq_n_s32(0))};
}
// a * 2^n for shifted = n + 1.5 * 2^23, whose lowest bits are n in two's complement; a and the
// result are normal numbers.
CAUSAL_CONV1D_INLINE Native scale_by_exp2(Native a, Native shifted) {
  const int32x4_t exponent = vshlq_n_s32(vreinterpretq_s32_f32(shifted.v), 23);
  return {vreinterpretq_f32_s32(vaddq_s32(exponent, vreinterpretq_s32_f32(a.v)))};
}

// Lanes k to k + kLanes - 1 of a followed by b; 0 < k < kLanes.
template <int k>
CAUSAL_CONV1D_INLINE Native align(Native a, Native b) {
  return {vextq_f32(a.v, b.v, k)};
}
CAUSAL_CONV1D_INLINE Native both_bits(Native a, Native b) {
  return {vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a.v), vreinterpretq_u32_f32(b.v)))};
}

// The elements of even index and those of odd index of 2 * kLanes.
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

#else  // one lane, any CPU

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
CAUSAL_CONV1D_INLINE Native reciprocal_estimate(Native a) { return {1.0f / a.v}; }
CAUSAL_CONV1D_INLINE Native reciprocal(Native a) { return {1.0f / a.v}; }
CAUSAL_CONV1D_INLINE Native min(Native a, Native b) { return {a.v < b.v ? a.v : b.v}; }
CAUSAL_CONV1D_INLINE Native fma(Native a, Native b, Native c) {
  return {__builtin_fmaf(a.v, b.v, c.v)};
}
// Of NaN, true.
CAUSAL_CONV1D_INLINE NativeMask not_less(Native a, Native b) { return {!(a.v < b.v)}; }
CAUSAL_CONV1D_INLINE Native select_or_zero(NativeMask m, Native a) { return {m.m ? a.v : 0.0f}; }
constexpr int kVectorsInPack = 1;

CAUSAL_CONV1D_INLINE NativeMask both(NativeMask a, NativeMask b) { return {a.m && b.m}; }
CAUSAL_CONV1D_INLINE NativeMask equal_ids(Native, const int32_t* a, const int32_t* b) {
  return {*a == *b};
}
CAUSAL_CONV1D_INLINE NativeMask valid_ids(Native, const int32_t* a) { return {*a >= 0}; }
// a * 2^n for shifted = n + 1.5 * 2^23, whose lowest bits are n in two's complement; a and the
// result are normal numbers.
CAUSAL_CONV1D_INLINE Native scale_by_exp2(Native a, Native shifted) {
  return {float_of((bits_of(shifted.v) << 23) + bits_of(a.v))};
}

#endif

#if !defined(CAUSAL_CONV1D_ISA_AVX512)
constexpr bool kHasExp2OfSixteenths = false;
CAUSAL_CONV1D_INLINE Native exp2_of_sixteenths(Native) { return Native::set(0.0f); }
#endif

CAUSAL_CONV1D_INLINE float scalar_of(float a) { return a; }
CAUSAL_CONV1D_INLINE double scalar_of(double a) { return a; }
CAUSAL_CONV1D_INLINE float scalar_of(Bfloat16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
CAUSAL_CONV1D_INLINE float scalar_of(Half a) {
#if defined(CAUSAL_CONV1D_ISA_AVX512) || defined(CAUSAL_CONV1D_ISA_AVX2)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(a.bits)));
#elif defined(CAUSAL_CONV1D_ISA_NEON)
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(a.bits))), 0);
#else
  return Native::load(&a).v;
#endif
}

// kVectors native vectors that are worked on together. The chain of operations of a silu is long
// and its number of operations fills the CPU's schedulers; two or more independent chains,
// instruction by instruction in turn, keep the units busy.
template <int kVectors>
struct PackMask {
  NativeMask m[kVectors];
};

template <int kVectors>
struct Pack {
  using Scalar = float;
  static constexpr int kNative = Native::kLanes;
  static constexpr int kLanes = kVectors * kNative;
  Native v[kVectors];

  static CAUSAL_CONV1D_INLINE Pack set(float a) {
    Pack r;
    for (int i = 0; i < kVectors; ++i) r.v[i] = Native::set(a);
    return r;
  }
  template <class T>
  static CAUSAL_CONV1D_INLINE Pack load(const T* p) {
    Pack r;
    for (int i = 0; i < kVectors; ++i) r.v[i] = Native::load(p + i * kNative);
    return r;
  }
  template <class T>
  CAUSAL_CONV1D_INLINE void store(T* p) const {
    for (int i = 0; i < kVectors; ++i) v[i].store(p + i * kNative);
  }
  template <class T>
  CAUSAL_CONV1D_INLINE void stream(T* p) const {
    for (int i = 0; i < kVectors; ++i) v[i].stream(p + i * kNative);
  }
};

template <int kVectors>
CAUSAL_CONV1D_INLINE Pack<kVectors> add(Pack<kVectors> a, Pack<kVectors> b) {
  for (int i = 0; i < kVectors; ++i) a.v[i] = add(a.v[i], b.v[i]);
  return a;
}
template <int kVectors>
CAUSAL_CONV1D_INLINE Pack<kVectors> sub(Pack<kVectors> a, Pack<kVectors> b) {
  for (int i = 0; i < kVectors; ++i) a.v[i] = sub(a.v[i], b.v[i]);
  return a;
}
template <int kVectors>
CAUSAL_CONV1D_INLINE Pack<kVectors> mul(Pack<kVectors> a, Pack<kVectors> b) {
  for (int i = 0; i < kVectors; ++i) a.v[i] = mul(a.v[i], b.v[i]);
  return a;
}
template <int kVectors>
CAUSAL_CONV1D_INLINE Pack<kVectors> reciprocal_estimate(Pack<kVectors> a) {
  for (int i = 0; i < kVectors; ++i) a.v[i] = reciprocal_estimate(a.v[i]);
  return a;
}
template <int kVectors>
CAUSAL_CONV1D_INLINE Pack<kVectors> reciprocal(Pack<kVectors> a) {
  for (int i = 0; i < kVectors; ++i) a.v[i] = reciprocal(a.v[i]);
  return a;
}
template <int kVectors>
CAUSAL_CONV1D_INLINE Pack<kVectors> min(Pack<kVectors> a, Pack<kVectors> b) {
  for (int i = 0; i < kVectors; ++i) a.v[i] = min(a.v[i], b.v[i]);
  return a;
}
template <int kVectors>
CAUSAL_CONV1D_INLINE Pack<kVectors> fma(Pack<kVectors> a, Pack<kVectors> b, Pack<kVectors> c) {
  for (int i = 0; i < kVectors; ++i) c.v[i] = fma(a.v[i], b.v[i], c.v[i]);
  return c;
}
template <int kVectors>
CAUSAL_CONV1D_INLINE PackMask<kVectors> not_less(Pack<kVectors> a, Pack<kVectors> b) {
  PackMask<kVectors> m;
  for (int i = 0; i < kVectors; ++i) m.m[i] = not_less(a.v[i], b.v[i]);
  return m;
}
template <int kVectors>
CAUSAL_CONV1D_INLINE Pack<kVectors> select_or_zero(PackMask<kVectors> m, Pack<kVectors> a) {
  for (int i = 0; i < kVectors; ++i) a.v[i] = select_or_zero(m.m[i], a.v[i]);
  return a;
}
template <int kVectors>
CAUSAL_CONV1D_INLINE PackMask<kVectors> both(PackMask<kVectors> a, PackMask<kVectors> b) {
  for (int i = 0; i < kVectors; ++i) a.m[i] = both(a.m[i], b.m[i]);
  return a;
}
template <int kVectors>
CAUSAL_CONV1D_INLINE PackMask<kVectors> equal_ids(Pack<kVectors>, const int32_t* a,
                                                  const int32_t* b) {
  PackMask<kVectors> m;
  constexpr int kLanes = Native::kLanes;
  for (int i = 0; i < kVectors; ++i) m.m[i] = equal_ids(Native(), a + i * kLanes, b + i * kLanes);
  return m;
}
template <int kVectors>
CAUSAL_CONV1D_INLINE PackMask<kVectors> valid_ids(Pack<kVectors>, const int32_t* a) {
  PackMask<kVectors> m;
  for (int i = 0; i < kVectors; ++i) m.m[i] = valid_ids(Native(), a + i * Native::kLanes);
  return m;
}
template <int kVectors>
CAUSAL_CONV1D_INLINE Pack<kVectors> scale_by_exp2(Pack<kVectors> a, Pack<kVectors> shifted) {
  for (int i = 0; i < kVectors; ++i) a.v[i] = scale_by_exp2(a.v[i], shifted.v[i]);
  return a;
}

template <int kVectors>
CAUSAL_CONV1D_INLINE Pack<kVectors> exp2_of_sixteenths(Pack<kVectors> shifted) {
  for (int i = 0; i < kVectors; ++i) shifted.v[i] = exp2_of_sixteenths(shifted.v[i]);
  return shifted;
}

using Vec = Pack<kVectorsInPack>;

#if !defined(CAUSAL_CONV1D_ISA_AVX512) && !defined(CAUSAL_CONV1D_ISA_AVX2) && \
    !defined(CAUSAL_CONV1D_ISA_NEON)
#define CAUSAL_CONV1D_ONE_LANE
#else

// A group is a Vec of kGroup consecutive elements in the order that is cheapest for their type:
// bfloat16 comes as the even ones and then the odd ones, which are the two halves of 32-bit words.
// Every NaN of a group of bfloat16 must have zeros in its lowest 16 bits: rounding then keeps it.
constexpr int kGroup = Vec::kLanes;

template <class T>
constexpr bool kEvenOdd = false;
template <>
constexpr bool kEvenOdd<Bfloat16> = true;

// Where element i of a group is.
template <class T>
constexpr int lane_of(int i) {
  constexpr int kPair = 2 * Native::kLanes;
  return kEvenOdd<T> ? i / kPair * kPair + i % kPair / 2 + i % 2 * Native::kLanes : i;
}

template <class T>
CAUSAL_CONV1D_INLINE Vec load_group(const T* p) {
  return Vec::load(p);
}
CAUSAL_CONV1D_INLINE Vec load_group(const Bfloat16* p) {
  Vec r;
  for (int i = 0; i < kVectorsInPack; i += 2) {
    load_even_odd(p + i * Native::kLanes, &r.v[i], &r.v[i + 1]);
  }
  return r;
}
template <class T>
CAUSAL_CONV1D_INLINE void store_group(Vec a, bool stream, T* p) {
  if (stream) {
    a.stream(p);
  } else {
    a.store(p);
  }
}
CAUSAL_CONV1D_INLINE void store_group(Vec a, bool stream, Bfloat16* p) {
  for (int i = 0; i < kVectorsInPack; i += 2) {
    if (stream) {
      store_even_odd<true>(a.v[i], a.v[i + 1], p + i * Native::kLanes);
    } else {
      store_even_odd<false>(a.v[i], a.v[i + 1], p + i * Native::kLanes);
    }
  }
}

template <int k>
CAUSAL_CONV1D_INLINE Native from_lane(Native a, Native b) {
  if constexpr (k == 0) {
    return a;
  } else {
    return align<k>(a, b);
  }
}

// Elements k to k + kGroup - 1 of two groups, one after the other; 0 <= k <= kGroup.
template <class T, int k>
CAUSAL_CONV1D_INLINE Vec slide(Vec a, Vec b) {
  constexpr int kLanes = Native::kLanes, kCount = kVectorsInPack;
  const auto vector = [&](int i) {
    return i < kCount ? a.v[i] : b.v[i < 2 * kCount ? i - kCount : 0];  // 0: not used
  };
  Vec r;
  if constexpr (kEvenOdd<T>) {
    constexpr int even = k / 2, odd = (k + 1) / 2;  // lanes that the halves move
    for (int i = 0; i < kCount; i += 2) {
      const int from_even = i + even / kLanes * 2 + k % 2;
      const int from_odd = i + odd / kLanes * 2 + 1 - k % 2;
      r.v[i] = from_lane<even % kLanes>(vector(from_even), vector(from_even + 2));
      r.v[i + 1] = from_lane<odd % kLanes>(vector(from_odd), vector(from_odd + 2));
    }
  } else {
    for (int i = 0; i < kCount; ++i) {
      const int from = i + k / kLanes;
      r.v[i] = from_lane<k % kLanes>(vector(from), vector(from + 1));
    }
  }
  return r;
}

CAUSAL_CONV1D_INLINE Vec both_bits(Vec a, Vec b) {
  for (int i = 0; i < kVectorsInPack; ++i) a.v[i] = both_bits(a.v[i], b.v[i]);
  return a;
}

#endif

// Non-temporal stores are ordered with nothing; this orders them before what the thread does next.
CAUSAL_CONV1D_INLINE void finish_streams() {
#if defined(CAUSAL_CONV1D_ISA_AVX512) || defined(CAUSAL_CONV1D_ISA_AVX2)
  _mm_sfence();
#endif
}

struct DoubleMask {
  bool m;
};

struct DoubleVec {
  using Scalar = double;
  static constexpr int kLanes = 1;
  double v;

  static CAUSAL_CONV1D_INLINE DoubleVec set(double a) { return {a}; }
  static CAUSAL_CONV1D_INLINE DoubleVec load(const double* p) { return {*p}; }
  CAUSAL_CONV1D_INLINE void store(double* p) const { *p = v; }
  CAUSAL_CONV1D_INLINE void stream(double* p) const { *p = v; }
};

CAUSAL_CONV1D_INLINE DoubleVec add(DoubleVec a, DoubleVec b) { return {a.v + b.v}; }
CAUSAL_CONV1D_INLINE DoubleVec sub(DoubleVec a, DoubleVec b) { return {a.v - b.v}; }
CAUSAL_CONV1D_INLINE DoubleVec mul(DoubleVec a, DoubleVec b) { return {a.v * b.v}; }
CAUSAL_CONV1D_INLINE DoubleVec fma(DoubleVec a, DoubleVec b, DoubleVec c) {
  return {__builtin_fma(a.v, b.v, c.v)};
}
CAUSAL_CONV1D_INLINE DoubleVec select_or_zero(DoubleMask m, DoubleVec a) {
  return {m.m ? a.v : 0.0};
}
CAUSAL_CONV1D_INLINE DoubleMask both(DoubleMask a, DoubleMask b) { return {a.m && b.m}; }
CAUSAL_CONV1D_INLINE DoubleMask equal_ids(DoubleVec, const int32_t* a, const int32_t* b) {
  return {*a == *b};
}
CAUSAL_CONV1D_INLINE DoubleMask valid_ids(DoubleVec, const int32_t* a) { return {*a >= 0}; }

}  // namespace
}  // namespace causal_conv1d
