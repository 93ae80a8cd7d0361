// Vectors of floats for one instruction set. Kernels are written with Vec alone.
//
// A source file chooses the instruction set before it includes this: it defines
// CAUSAL_CONV1D_ISA_AVX512, _AVX2 or _NEON, or none of them for one lane on any CPU. Everything
// here has internal linkage, so that no function built for a newer CPU can stand in for another's.
//
// The contract that each of avx512.h, avx2.h, neon.h and scalar.h fulfils:
//
//   Native               one register of Native::kLanes floats
//     set(a)             a in every lane
//     load(p), store(p)  kLanes float, Half or Bfloat16 at any address; stores round to nearest
//     even
//                        and keep NaN
//     stream(p)          as store, past the caches; p is aligned to the bytes written
//   NativeMask           one truth value a lane
//   add, sub, mul, min; fma(a, b, c) = a * b + c, rounded once
//   at_least(a, b)       the greater one; of it and min b, or NaN, if one is NaN
//   reciprocal(a)        1 / a to about 1e-7
//   quotient_estimate(a, b)
//                        a / b to 7e-5 at worst; b is 1 to infinity
//   not_less(a, b)       !(a < b): true for NaN
//   select_or_zero(m, a) a where m, else 0
//   both(m, n)           m and n
//   equal_ids(Native(), p, q), valid_ids(Native(), p)
//                        p[i] == q[i], and p[i] >= 0, for kLanes int32 at any address
//   scale_by_exp2(a, shifted)
//                        a * 2^n for shifted = n + 1.5 * 2^23, which has n in its lowest bits; a
//                        and the result are normal numbers
//   exp2_of(shifted)     2^n for shifted = n + 127 + 1.5 * 2^23, -126 <= n <= 128: up to infinity
//   exp2_of_sixteenths(shifted)
//                        2^n for shifted = n + 1.5 * 2^19, n in sixteenths; where
//                        kHasExp2OfSixteenths
//   scalar_of(Half)      as float
//   finish_streams()     orders the streams of this thread before what it does next
//   kNativesInVec        how many Native a Vec is
//   kHas32Registers      not of scalar.h
//
// and for groups.h, but for scalar.h:
//
//   align<k>(a, b)       lanes k to k + kLanes - 1 of a followed by b; 0 < k < kLanes
//   both_bits(a, b)      the bits that are set in both
//   load_even_odd(p, &even, &odd), store_even_odd<kStream>(even, odd, p)
//                        2 * kLanes Bfloat16: those of even index, and those of odd index. NaN must
//                        have zeros in its lowest 16 bits to be stored as NaN
//
// Reciprocals and quotients differ between instruction sets, and so does exp2_of_sixteenths by
// being there; all else gives the same bits on each (but for the payloads of NaN).
#pragma once

#include <stdint.h>

#include "types.h"

#if defined(CAUSAL_CONV1D_ISA_AVX512)
#include "avx512.h"
#elif defined(CAUSAL_CONV1D_ISA_AVX2)
#include "avx2.h"
#elif defined(CAUSAL_CONV1D_ISA_NEON)
#include "neon.h"
#else
#include "scalar.h"
#endif

namespace causal_conv1d {
namespace {

// kCount Native that are worked on together, with the operations of one. A silu is a long chain of
// operations, each of which waits for the one before; two independent chains, instruction by
// instruction in turn, keep the units busy.
template <int kCount>
struct VecMaskOf {
  NativeMask m[kCount];
};

template <int kCount>
struct VecOf {
  using Scalar = float;
  static constexpr int kNative = Native::kLanes;
  static constexpr int kLanes = kCount * kNative;
  Native v[kCount];

  static CAUSAL_CONV1D_INLINE VecOf set(float a) {
    VecOf r;
    for (int i = 0; i < kCount; ++i) r.v[i] = Native::set(a);
    return r;
  }
  template <class T>
  static CAUSAL_CONV1D_INLINE VecOf load(const T* p) {
    VecOf r;
    for (int i = 0; i < kCount; ++i) r.v[i] = Native::load(p + i * kNative);
    return r;
  }
  template <class T>
  CAUSAL_CONV1D_INLINE void store(T* p) const {
    for (int i = 0; i < kCount; ++i) v[i].store(p + i * kNative);
  }
  template <class T>
  CAUSAL_CONV1D_INLINE void stream(T* p) const {
    for (int i = 0; i < kCount; ++i) v[i].stream(p + i * kNative);
  }
};

template <int kCount>
CAUSAL_CONV1D_INLINE VecOf<kCount> add(VecOf<kCount> a, VecOf<kCount> b) {
  for (int i = 0; i < kCount; ++i) a.v[i] = add(a.v[i], b.v[i]);
  return a;
}
template <int kCount>
CAUSAL_CONV1D_INLINE VecOf<kCount> sub(VecOf<kCount> a, VecOf<kCount> b) {
  for (int i = 0; i < kCount; ++i) a.v[i] = sub(a.v[i], b.v[i]);
  return a;
}
template <int kCount>
CAUSAL_CONV1D_INLINE VecOf<kCount> mul(VecOf<kCount> a, VecOf<kCount> b) {
  for (int i = 0; i < kCount; ++i) a.v[i] = mul(a.v[i], b.v[i]);
  return a;
}
template <int kCount>
CAUSAL_CONV1D_INLINE VecOf<kCount> quotient_estimate(VecOf<kCount> a, VecOf<kCount> b) {
  for (int i = 0; i < kCount; ++i) a.v[i] = quotient_estimate(a.v[i], b.v[i]);
  return a;
}
template <int kCount>
CAUSAL_CONV1D_INLINE VecOf<kCount> exp2_of(VecOf<kCount> shifted) {
  for (int i = 0; i < kCount; ++i) shifted.v[i] = exp2_of(shifted.v[i]);
  return shifted;
}
template <int kCount>
CAUSAL_CONV1D_INLINE VecOf<kCount> reciprocal(VecOf<kCount> a) {
  for (int i = 0; i < kCount; ++i) a.v[i] = reciprocal(a.v[i]);
  return a;
}
template <int kCount>
CAUSAL_CONV1D_INLINE VecOf<kCount> min(VecOf<kCount> a, VecOf<kCount> b) {
  for (int i = 0; i < kCount; ++i) a.v[i] = min(a.v[i], b.v[i]);
  return a;
}
template <int kCount>
CAUSAL_CONV1D_INLINE VecOf<kCount> at_least(VecOf<kCount> a, VecOf<kCount> b) {
  for (int i = 0; i < kCount; ++i) a.v[i] = at_least(a.v[i], b.v[i]);
  return a;
}
template <int kCount>
CAUSAL_CONV1D_INLINE VecOf<kCount> fma(VecOf<kCount> a, VecOf<kCount> b, VecOf<kCount> c) {
  for (int i = 0; i < kCount; ++i) c.v[i] = fma(a.v[i], b.v[i], c.v[i]);
  return c;
}
template <int kCount>
CAUSAL_CONV1D_INLINE VecMaskOf<kCount> not_less(VecOf<kCount> a, VecOf<kCount> b) {
  VecMaskOf<kCount> m;
  for (int i = 0; i < kCount; ++i) m.m[i] = not_less(a.v[i], b.v[i]);
  return m;
}
template <int kCount>
CAUSAL_CONV1D_INLINE VecOf<kCount> select_or_zero(VecMaskOf<kCount> m, VecOf<kCount> a) {
  for (int i = 0; i < kCount; ++i) a.v[i] = select_or_zero(m.m[i], a.v[i]);
  return a;
}
template <int kCount>
CAUSAL_CONV1D_INLINE VecMaskOf<kCount> both(VecMaskOf<kCount> a, VecMaskOf<kCount> b) {
  for (int i = 0; i < kCount; ++i) a.m[i] = both(a.m[i], b.m[i]);
  return a;
}
template <int kCount>
CAUSAL_CONV1D_INLINE VecMaskOf<kCount> equal_ids(VecOf<kCount>, const int32_t* a,
                                                 const int32_t* b) {
  VecMaskOf<kCount> m;
  constexpr int kLanes = Native::kLanes;
  for (int i = 0; i < kCount; ++i) m.m[i] = equal_ids(Native(), a + i * kLanes, b + i * kLanes);
  return m;
}
template <int kCount>
CAUSAL_CONV1D_INLINE VecMaskOf<kCount> valid_ids(VecOf<kCount>, const int32_t* a) {
  VecMaskOf<kCount> m;
  for (int i = 0; i < kCount; ++i) m.m[i] = valid_ids(Native(), a + i * Native::kLanes);
  return m;
}
template <int kCount>
CAUSAL_CONV1D_INLINE VecOf<kCount> scale_by_exp2(VecOf<kCount> a, VecOf<kCount> shifted) {
  for (int i = 0; i < kCount; ++i) a.v[i] = scale_by_exp2(a.v[i], shifted.v[i]);
  return a;
}
template <int kCount>
CAUSAL_CONV1D_INLINE VecOf<kCount> exp2_of_sixteenths(VecOf<kCount> shifted) {
  for (int i = 0; i < kCount; ++i) shifted.v[i] = exp2_of_sixteenths(shifted.v[i]);
  return shifted;
}

using Vec = VecOf<kNativesInVec>;

CAUSAL_CONV1D_INLINE float scalar_of(float a) { return a; }
CAUSAL_CONV1D_INLINE double scalar_of(double a) { return a; }
CAUSAL_CONV1D_INLINE float scalar_of(Bfloat16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// One double, for verification, with those operations that the kernels for any layout use.
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
