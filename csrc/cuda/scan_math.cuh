// The scan's functions of one number. fp32 takes the machine's approximations where their error is
// that of a rounding or two.
#pragma once

#include <cuda_runtime.h>

namespace causal_conv1d::gpu::scan {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// 2^x. Factors of log2(e) are in x already: in A, once for all time steps.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

// e^-|x|
__device__ __forceinline__ float exp_of_minus_abs(float x) {
  return exp2_of(-fabsf(x) * static_cast<float>(kLog2e));
}
__device__ __forceinline__ double exp_of_minus_abs(double x) { return exp(-fabs(x)); }

// log(1 + e) for e in 0 .. 1, without the loss of 1 + e: 2 artanh(s), s = e / (2 + e).
__device__ __forceinline__ float log1p_of(float e) {
  const float s = e * reciprocal(2.f + e), w = s * s;
  float p = fmaf(w, 0.28174657f, 0.27961419f);
  p = fmaf(p, w, 0.40024854f);
  p = fmaf(p, w, 0.66666316f);
  return s * fmaf(p, w, 2.f);
}
__device__ __forceinline__ double log1p_of(double e) { return log1p(e); }

template <typename F>
__device__ __forceinline__ F softplus(F x) {
  return (x > F(0) ? x : F(0)) + log1p_of(exp_of_minus_abs(x));
}

// 1 / (1 + e^-x)
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal(1.f + exp2_of(x * static_cast<float>(-kLog2e)));
}
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

}  // namespace causal_conv1d::gpu::scan
