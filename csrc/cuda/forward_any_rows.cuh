// The forward without options and ids for any width, strides and type, by runs of eight steps.
#pragma once

#include "any_rows.cuh"
#include "forward.cuh"

namespace causal_conv1d::gpu {

constexpr int kStagedPieces = 8;  // of weights in shared memory at a time

// A thread has `runs` runs, `lines` of them apart.
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 4 : 7)
    forward_any_rows(const ForwardArgs<T> p, int channels, int64_t blocks, int runs) {
  using F = Compute<T>;
  __shared__ F weights[kStagedPieces * kRun * 32];
  const AnyPlace place(channels);
  int64_t group, block;
  const int64_t b = split(split(blockIdx.x, blocks, &block), ceil_div(p.dim, channels), &group);
  const int64_t d0 = group * channels, d = min(d0 + place.channel, p.dim - 1);
  const bool inside = d == d0 + place.channel;
  const AnyRow<T> x_row(p.x, b, d), out_row(p.out, b, d);
  const int last = last_piece(p.width);
  const F bias = load_bias(p, d);
  int64_t t = (block * runs * place.lines + place.line) * kRun;
#pragma unroll 1
  for (int n = 0; n < runs; ++n, t += place.lines * kRun) {
    const bool active = inside && t < p.seqlen;
    F x[2 * kRun], z[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) z[i] = bias;
#pragma unroll 1
    for (int q = last; q >= 0; q -= kStagedPieces) {
      const int to = max(q - kStagedPieces + 1, 0);
      if (n == 0 || last >= kStagedPieces) {
        if (n > 0 || q < last) __syncthreads();
        stage_weights(p, d0, channels, q, to, weights);
        __syncthreads();
      }
      if (active) {
        convolve_pieces(p, x_row, b, d, t, q, to, q == last, weights + place.channel, channels, x,
                        z);
      }
    }
    if (!active) continue;
    if (p.silu) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) z[i] = silu<T>(z[i]);
    }
    store_run(out_row, t, p.seqlen, z);
  }
}

}  // namespace causal_conv1d::gpu
