// SiLU and its derivative, one for each element type of x, so that every kernel rounds alike.
//
// 16-bit types: with h = z/2, silu(z) = h + h tanh(h) and 2 silu'(z) = (1 + tanh(h)) (1 + h (1 -
// tanh(h))), by the machine's tanh. PTX bounds its relative error by 2^-11, which is at most 2^-12
// |z| here, under the types' own roundings (2^-11 and 2^-8); on an H200 it is far smaller and adds
// 2e-6 to dweight in the 2-norm. So that h costs nothing, kernels multiply weight and bias by
// `scale` as they load them: what they compute is h, and what they call dz is twice that. A factor
// of two rounds nothing (but numbers below 2^-126).
//
// fp32 takes the accurate exponential, with a relative error near 2e-7, and scale = 1. A sigmoid
// below 2^-126, which z * sigmoid(z) may still lift above it, is kept: the reciprocal, which
// flushes such numbers to zero, is taken of a sixteenth.
#pragma once

#include "ptx.cuh"
#include "types.cuh"

namespace causal_conv1d::gpu {

template <typename T>
Compute<T> pre_activation_scale(bool silu) {
  return Compute<T>(silu && sizeof(T) == 2 ? 0.5 : 1.0);
}

__device__ __forceinline__ float sigmoid(float z) {
  return reciprocal_approx(fmaf(expf(-z), 0.0625f, 0.0625f)) * 0.0625f;
}
__device__ __forceinline__ double sigmoid(double z) { return 1.0 / (1.0 + exp(-z)); }

// silu(z) of h = scale * z.
template <typename T>
__device__ __forceinline__ Compute<T> silu(Compute<T> h) {
  if constexpr (sizeof(T) == 2) return fmaf(h, tanh_approx(h), h);
  return h * sigmoid(h);
}

// g * silu'(z) / scale of h = scale * z. Factors are joined as fused multiply-adds round least.
template <typename T>
__device__ __forceinline__ Compute<T> silu_backward(Compute<T> h, Compute<T> g) {
  Compute<T> a, b;  // the derivative is (1 + b) * a / g
  if constexpr (sizeof(T) == 2) {
    const float t = tanh_approx(h);
    a = fmaf(g, t, g);
    b = fmaf(h, -t, h);
  } else {
    const Compute<T> s = sigmoid(h);
    a = g * s;
    b = fma(h, -s, h);
  }
  return fma(a, b, a);
}

}  // namespace causal_conv1d::gpu
