// The backward of channel-first rows with a dilation: see dilated.cuh. A thread has dz of its steps
// and of the W - 1 after these, and so each dx; the block adds up its sums.
#pragma once

#include "backward.cuh"
#include "dilated.cuh"
#include "parameters.cuh"
#include "taps.cuh"

namespace causal_conv1d::gpu {

// Writes a block's partial sums.
template <int WMAX, typename T>
__device__ __forceinline__ void store_block_sums(const BackwardArgs<T>& p, const DilatedPart& at,
                                                 int64_t part, const float (&dw)[WMAX], float db) {
  __shared__ float sums[WMAX + 1][kWarps];
  const int lane = threadIdx.x % 32, first = WMAX - p.width;
#pragma unroll
  for (int k = 0; k <= WMAX; ++k) {
    float sum = k < WMAX ? dw[k < WMAX ? k : 0] : db;
#pragma unroll
    for (int n = 16; n > 0; n /= 2) sum += __shfl_xor_sync(0xffffffff, sum, n);
    if (lane == 0) sums[k][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  const int k = static_cast<int>(threadIdx.x);
  if (k < first || k > WMAX) return;
  float sum = sums[k][0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) sum += sums[k][i];
  p.store_partials({sum}, part, k - first, at.d);
}

template <typename T, int WMAX>
__global__ void __launch_bounds__(kThreads, WMAX == 4 ? 6 : 4)
    backward_dilated(const BackwardArgs<T> p, const DilatedRows rows) {
  if (kSmallPtx) return;
  constexpr int H = WMAX - 1, V = kPhaseSteps;
  alignas(16) __shared__ T xs[2][kPlaces<T, kDilatedTile + 2 * kMostHalo>];
  alignas(16) __shared__ T gs[2][kPlaces<T, kDilatedTile + kMostHalo>];
  alignas(16) __shared__ T dxs[kPlaces<T, kDilatedTile>];
  const DilatedPart at(p, rows);
  const int distance = static_cast<int>(rows.dilation), halo = H * distance;
  const int first = WMAX - p.width;
  const T *const x = p.x.at(at.b, at.d, 0), *const dout = p.dout.at(at.b, at.d, 0);
  T* const dx = p.dx.at(at.b, at.d, 0);
  pdl_wait();
  const WarpParameters<WMAX, false> parameters(p, at.d, threadIdx.x % 32);
  const auto before = [&](int64_t s) { return state_before(p, at, s, rows.dilation); };
  const auto none = [](int64_t) { return from_compute<T>(0.0f); };
  const auto load = [&](int64_t t0, int buffer) {
    if (t0 < at.end) {
      stage(xs[buffer], x, t0 - halo, rows.tile + 2 * halo, p.seqlen, before);
      stage(gs[buffer], dout, t0, rows.tile + halo, p.seqlen, none);
    }
    commit_copies();
  };
  load(at.begin, 0);
  float w[WMAX], bias, dw[WMAX], db = 0.0f;
  parameters.get(p, w, bias);
#pragma unroll
  for (int k = 0; k < WMAX; ++k) dw[k] = 0.0f;
  int buffer = 0;
#pragma unroll 1
  for (int64_t t0 = at.begin; t0 < at.end; t0 += rows.tile, buffer ^= 1) {
    load(t0 + rows.tile, buffer ^ 1);
    wait_for_copies<1>();
    __syncthreads();
    if (!at.idle) {
      const T* const xs_of = xs[buffer] + misalignment(x + t0 - halo) + at.first;
      const T* const gs_of = gs[buffer] + misalignment(dout + t0) + at.first;
      T* const to = dxs + misalignment(dx + t0) + at.first;
      // Steps to the row's end, of what is in reach.
      const int left = static_cast<int>(min(p.seqlen - t0, int64_t(kFar))) - at.first;
      float h[V + 2 * H], g[V + H], dz[V + H];
#pragma unroll
      for (int j = 0; j < V + 2 * H; ++j) h[j] = to_compute(xs_of[j * distance]);
#pragma unroll
      for (int j = 0; j < V + H; ++j) g[j] = to_compute(gs_of[j * distance]);
#pragma unroll
      for (int j = 0; j < V + H; ++j) {
        dz[j] = convolve<WMAX>(
            bias, first, [&](int k) { return w[k]; }, [&](int k) { return h[j + k]; });
      }
      p.gradients(g, true, dz);
#pragma unroll
      for (int j = 0; j < V + H; ++j) {
        const bool inside = j * distance < left;
        if (!inside) dz[j] = 0.0f;
        if (j >= V) continue;
        db += dz[j];
        accumulate<WMAX>(
            dz[j], first, [&](int k) -> float& { return dw[k]; }, [&](int k) { return h[j + k]; },
            [&](int) { return inside; });
      }
#pragma unroll
      for (int j = 0; j < V; ++j) {
        to[j * distance] = from_compute<T>(
            correlate<WMAX>(first, [&](int k) { return w[k]; }, [&](int i) { return dz[j + i]; }));
      }
    }
    __syncthreads();
    unstage(dxs, dx, t0, static_cast<int>(min(int64_t(rows.tile), at.end - t0)));
  }
  pdl_launch();
  if (p.sums) store_block_sums<WMAX>(p, at, int64_t(at.b) * rows.chunks + at.index, dw, db);
}

}  // namespace causal_conv1d::gpu
