// The arithmetic of taps: the formulas at the head of forward.cu and backward.cuh, in the order
// that the C interface promises. Kernels give the inputs of taps as functions of k or j.
#pragma once

#include "silu.cuh"

namespace causal_conv1d::gpu {

// Weights lie in taps WMAX - W .. WMAX - 1 of WMAX; the taps before `first` = WMAX - W are skipped,
// not multiplied by zero, since 0 * inf is NaN. Kernels of 8 taps are for W > 4, so taps from 3 on
// always count there: that leaves enough predicate registers.
template <int WMAX>
__device__ __forceinline__ constexpr bool has_tap(int k, int first) {
  return (WMAX == 8 && k >= 3) || k >= first;
}

// Taps that do not count by takes(k) either: a predicate at the multiplication costs nothing.
struct EveryTap {
  __device__ __forceinline__ constexpr bool operator()(int) const { return true; }
};

// z = bias + sum over k of weight(k) * x(k), k ascending.
template <int WMAX, typename Weight, typename X, typename Takes = EveryTap>
__device__ __forceinline__ float convolve(float bias, int first, Weight&& weight, X&& x,
                                          Takes&& takes = {}) {
  float z = bias;
#pragma unroll
  for (int k = 0; k < WMAX; ++k) {
    const float xk = x(k);
    if (has_tap<WMAX>(k, first) && takes(k)) z = fmaf(weight(k), xk, z);
  }
  return z;
}

// dweight(k) += dz * x(k).
template <int WMAX, typename Dweight, typename X, typename Takes = EveryTap>
__device__ __forceinline__ void accumulate(float dz, int first, Dweight&& dweight, X&& x,
                                           Takes&& takes = {}) {
#pragma unroll
  for (int k = 0; k < WMAX; ++k) {
    const float xk = x(k);
    if (has_tap<WMAX>(k, first) && takes(k)) dweight(k) = fmaf(dz, xk, dweight(k));
  }
}

// dx = sum over j of weight(W - 1 - j) * dz(j), j ascending; dz(j) is that of j steps later.
template <int WMAX, typename Weight, typename Dz>
__device__ __forceinline__ float correlate(int first, Weight&& weight, Dz&& dz) {
  float dx = 0.0f;
#pragma unroll
  for (int j = 0; j < WMAX; ++j) {
    const float dzj = dz(j);
    if (has_tap<WMAX>(WMAX - 1 - j, first)) dx = fmaf(weight(WMAX - 1 - j), dzj, dx);
  }
  return dx;
}

// correlate() for V adjacent steps, dz being those of the V + WMAX - 1 from the first on. takes(m,
// k) tells whether the input of tap k counts for the step of dz[m]: it is asked for one m at a
// time.
template <int WMAX, int V, typename Weight, typename Takes>
__device__ __forceinline__ void correlate_steps(Weight&& weight, const float (&dz)[V + WMAX - 1],
                                                Takes&& takes, float (&dx)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) dx[i] = 0.0f;
#pragma unroll
  for (int m = 0; m < V + WMAX - 1; ++m) {
#pragma unroll
    for (int k = 0; k < WMAX; ++k) {
      const int i = m - (WMAX - 1 - k);
      if (i >= 0 && i < V && takes(m, k)) dx[i] = fmaf(weight(k), dz[m], dx[i]);
    }
  }
}

// The bias of channel d, or 0, times scale.
template <typename Args>
__device__ __forceinline__ auto load_bias(const Args& p, int64_t d) {
  using F = Compute<typename Args::Element>;
  return p.bias.given() ? p.bias.load(d) * p.scale : F(0);
}

// convolve() for any width and type, of channel d, with weights read from memory.
template <int UNROLL = 4, typename Args, typename F, typename X>
__device__ __forceinline__ F convolve_any(const Args& p, int64_t d, F bias, X&& x) {
  F z = bias;
#pragma unroll UNROLL
  for (int k = 0; k < p.width; ++k) z = fma(p.weight.load(d, k) * p.scale, x(k), z);
  return z;
}

}  // namespace causal_conv1d::gpu
