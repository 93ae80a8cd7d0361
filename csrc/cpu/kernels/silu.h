// silu(z) = z * sigmoid(z) and its derivative, and what else becomes of a sum.
#pragma once

#include "../exp.h"
#include "../simd/vec.h"
#include "tensor.h"

namespace causal_conv1d {
namespace {

// Between these, exp(-z) is a normal float. Below, sigmoid(z) is taken as 0 and is less than 4e-39;
// above, it is 1. Infinities and NaN keep their way through z * sigmoid(z): z itself is not
// clamped.
CAUSAL_CONV1D_INLINE Vec lowest() { return Vec::set(-88.7f); }
CAUSAL_CONV1D_INLINE Vec at_most_highest(Vec z) { return min(Vec::set(87.3365402f), z); }

// Where 1 + exp(-z) becomes infinite at the lowest z by itself, which saves a look at z at the end:
// for 16 bits, where it may from -88.4 on.
template <bool kShort>
constexpr bool kOverflows = kShort && !kHasExp2OfSixteenths;

// 1 + exp(-z) for z between those, anything below: exp(-z) = 2^n * p(q), q = z + n * ln(2), with
// minimax polynomials p. fp32: n is whole, |q| <= ln(2) / 2, and p has degree 5 (relative error
// 9e-8). 16 bits: degree 4 (3e-6) or, where a register holds the powers of 2 between, n in
// sixteenths and degree 2 (4e-7), a shorter chain. `shifted` is n, or what exp2_of asks for,
// + 1.5 * 2^23 (2^19), which leaves it in its lowest bits.
template <bool kShort>
CAUSAL_CONV1D_INLINE Vec one_plus_exp_of_minus(Vec z) {
  const Vec one = Vec::set(1.0f);
  const bool sixteenths = kShort && kHasExp2OfSixteenths;
  const Vec shift = Vec::set(sixteenths ? 786432.0f : kShort ? 12583039.0f : 12582912.0f);
  const Vec shifted = fma(z, Vec::set(-1.44269504f), shift);
  const Vec q = fma(sub(shifted, shift), Vec::set(0.693147182f), z);
  Vec p;
  if (sixteenths) {
    p = fma(q, Vec::set(0.5f), Vec::set(-1.00005866f));
    return fma(fma(p, q, one), exp2_of_sixteenths(shifted), one);
  }
  if (kShort) {
    p = fma(q, Vec::set(0.04151368295f), Vec::set(-0.1678759163f));
    p = fma(p, q, Vec::set(0.5000302178f));
    p = fma(p, q, Vec::set(-0.9999667728f));
    return fma(fma(p, q, one), exp2_of(shifted), one);
  }
  p = fma(q, Vec::set(-0.008290272112f), Vec::set(0.04189815962f));
  p = fma(p, q, Vec::set(-0.1666763813f));
  p = fma(p, q, Vec::set(0.4999914784f));
  p = fma(p, q, Vec::set(-0.9999997063f));
  return add(one, scale_by_exp2(fma(p, q, one), shifted));
}

// silu(z) = z * sigmoid(z) and its derivative are each computed in two parts, which loops may take
// in different rounds: the chain from z to the result is longer than the CPU looks ahead. What goes
// from one to the other is the denominator, or where a division is an instruction what comes of it:
// divisions then fill the time of the first part, which is the longer one.
template <bool kShort>
CAUSAL_CONV1D_INLINE Vec denominator_of_silu(Vec z) {
  Vec clamped = at_most_highest(z);
  if (kOverflows<kShort>) clamped = at_least(lowest(), clamped);
  return one_plus_exp_of_minus<kShort>(clamped);
}

// kShort: for results of 16 bits, with a relative error of at most 7e-5.
template <bool kShort>
CAUSAL_CONV1D_INLINE Vec begin_silu(Vec z) {
  const Vec denominator = denominator_of_silu<kShort>(z);
  if (kHasExp2OfSixteenths) return denominator;
  return kShort ? quotient_estimate(z, denominator) : reciprocal(denominator);
}

template <bool kShort>
CAUSAL_CONV1D_INLINE Vec end_silu(Vec z, Vec part) {
  if (kOverflows<kShort>) return part;
  Vec r = part;
  if (kHasExp2OfSixteenths) {
    r = kShort ? quotient_estimate(Vec::set(1.0f), part) : reciprocal(part);
  }
  return mul(z, select_or_zero(not_less(z, lowest()), r));
}

template <bool kShort>
CAUSAL_CONV1D_INLINE Vec silu(Vec z) {
  return end_silu<kShort>(z, begin_silu<kShort>(z));
}

// The derivative is not as short for 16 bits: what dweight and dbias sum is not rounded to 16 bits.
template <bool kShort>
CAUSAL_CONV1D_INLINE Vec begin_derivative(Vec z) {
  const Vec denominator = denominator_of_silu<kShort>(z);
  return kHasExp2OfSixteenths ? denominator : reciprocal(denominator);
}

template <bool kShort>
CAUSAL_CONV1D_INLINE Vec end_sigmoid(Vec z, Vec part) {
  const Vec r = kHasExp2OfSixteenths ? reciprocal(part) : part;
  return kOverflows<kShort> ? r : select_or_zero(not_less(z, lowest()), r);
}

template <bool kShort>
CAUSAL_CONV1D_INLINE Vec end_derivative(Vec z, Vec part) {
  const Vec one = Vec::set(1.0f), s = end_sigmoid<kShort>(z, part);
  return mul(s, fma(z, sub(one, s), one));
}

template <bool kShort>
CAUSAL_CONV1D_INLINE Vec silu_derivative(Vec z) {
  return end_derivative<kShort>(z, begin_derivative<kShort>(z));
}

// Both, where the activation itself is a factor of a gradient.
template <class V>
struct SiluAndDerivative {
  V value, derivative;
};

template <bool kShort>
CAUSAL_CONV1D_INLINE SiluAndDerivative<Vec> end_silu_and_derivative(Vec z, Vec part) {
  const Vec one = Vec::set(1.0f), s = end_sigmoid<kShort>(z, part);
  return {mul(z, s), mul(s, fma(z, sub(one, s), one))};
}

template <bool kShort>
CAUSAL_CONV1D_INLINE SiluAndDerivative<Vec> silu_and_derivative(Vec z) {
  return end_silu_and_derivative<kShort>(z, begin_derivative<kShort>(z));
}

CAUSAL_CONV1D_INLINE double sigmoid(double z) { return 1.0 / (1.0 + exp_without_errno(-z)); }

template <bool kShort>
CAUSAL_CONV1D_INLINE DoubleVec silu(DoubleVec z) {
  return {z.v / (1.0 + exp_without_errno(-z.v))};
}

template <bool kShort>
CAUSAL_CONV1D_INLINE DoubleVec silu_derivative(DoubleVec z) {
  const double s = sigmoid(z.v);
  return {s * (1.0 + z.v * (1.0 - s))};
}

template <bool kShort>
CAUSAL_CONV1D_INLINE SiluAndDerivative<DoubleVec> silu_and_derivative(DoubleVec z) {
  return {silu<kShort>(z), silu_derivative<kShort>(z)};
}

// What becomes of a sum; of the gradients, *z is that of the output and becomes that of the sum.
enum class Epilogue { kIdentity, kSilu, kShortSilu, kGradient, kSiluGradient, kShortSiluGradient };

CAUSAL_CONV1D_INLINE Epilogue forward_epilogue(int32_t dtype, bool with_silu) {
  if (!with_silu) return Epilogue::kIdentity;
  return is_16_bit(dtype) ? Epilogue::kShortSilu : Epilogue::kSilu;
}

CAUSAL_CONV1D_INLINE Epilogue gradient_epilogue(int32_t dtype, bool with_silu) {
  if (!with_silu) return Epilogue::kGradient;
  return is_16_bit(dtype) ? Epilogue::kShortSiluGradient : Epilogue::kSiluGradient;
}

template <class V, class S>
CAUSAL_CONV1D_INLINE V apply(Epilogue epilogue, V sum, const S* z) {
  switch (epilogue) {
    case Epilogue::kSilu: return silu<false>(sum);
    case Epilogue::kShortSilu: return silu<true>(sum);
    case Epilogue::kGradient: return V::load(z);
    case Epilogue::kSiluGradient: return mul(V::load(z), silu_derivative<false>(sum));
    case Epilogue::kShortSiluGradient: return mul(V::load(z), silu_derivative<true>(sum));
    default: return sum;
  }
}

}  // namespace
}  // namespace causal_conv1d
