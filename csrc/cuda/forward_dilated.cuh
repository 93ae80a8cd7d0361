// The forward of channel-first rows with a dilation: see dilated.cuh.
#pragma once

#include "dilated.cuh"
#include "forward.cuh"
#include "parameters.cuh"
#include "taps.cuh"

namespace causal_conv1d::gpu {

template <typename T, int WMAX>
__global__ void __launch_bounds__(kThreads, kAtMost<10>)
    forward_dilated(const ForwardArgs<T> p, const DilatedRows rows) {
  if (kSmallPtx) return;
  constexpr int H = WMAX - 1, V = kPhaseSteps;
  alignas(16) __shared__ T xs[2][kPlaces<T, kDilatedTile + kMostHalo>];
  alignas(16) __shared__ T ys[kPlaces<T, kDilatedTile>];
  const DilatedPart at(p, rows);
  const int distance = static_cast<int>(rows.dilation), halo = H * distance;
  const T* const x = p.x.at(at.b, at.d, 0);
  T* const out = p.out.at(at.b, at.d, 0);
  pdl_wait();
  pdl_launch();
  const WarpParameters<WMAX, false> parameters(p, at.d, threadIdx.x % 32);
  const auto outside = [&](int64_t s) { return state_before(p, at, s, rows.dilation); };
  const auto load = [&](int64_t t0, int buffer) {
    if (t0 < at.end) stage(xs[buffer], x, t0 - halo, rows.tile + halo, p.seqlen, outside);
    commit_copies();
  };
  load(at.begin, 0);
  float w[WMAX], bias;
  parameters.get(p, w, bias);
  int buffer = 0;
#pragma unroll 1
  for (int64_t t0 = at.begin; t0 < at.end; t0 += rows.tile, buffer ^= 1) {
    load(t0 + rows.tile, buffer ^ 1);
    wait_for_copies<1>();
    __syncthreads();
    if (!at.idle) {
      const T* const from = xs[buffer] + misalignment(x + t0 - halo) + at.first;
      T* const to = ys + misalignment(out + t0) + at.first;
      float h[V + H], z[V];
#pragma unroll
      for (int j = 0; j < V + H; ++j) h[j] = to_compute(from[j * distance]);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        z[j] = convolve<WMAX>(
            bias, WMAX - p.width, [&](int k) { return w[k]; }, [&](int k) { return h[j + k]; });
      }
      if (p.silu) {
#pragma unroll
        for (int j = 0; j < V; ++j) z[j] = silu<T>(z[j]);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) to[j * distance] = from_compute<T>(z[j]);
    }
    __syncthreads();
    unstage(ys, out, t0, static_cast<int>(min(int64_t(rows.tile), at.end - t0)));
  }
}

}  // namespace causal_conv1d::gpu
