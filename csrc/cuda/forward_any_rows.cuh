// The forward without options and ids for any width, strides and type, by runs of eight steps.
#pragma once

#include "any_rows.cuh"
#include "forward.cuh"

namespace causal_conv1d::gpu {

constexpr int kStagedPieces = 8;  // of weights in shared memory at a time

// A block has `lines` runs of `channels` channels.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    forward_any_rows(const ForwardArgs<T> p, int channels, int64_t blocks) {
  using F = Compute<T>;
  __shared__ F weights[kStagedPieces * kRun * 32];
  const AnyPlace place(channels);
  int64_t group, block;
  const int64_t b = split(split(blockIdx.x, blocks, &block), ceil_div(p.dim, channels), &group);
  const int64_t d0 = group * channels, d = d0 + place.channel;
  const int64_t t = (block * place.lines + place.line) * kRun;
  const bool active = d < p.dim && t < p.seqlen;
  const AnyRow<T> row(p.x, b, active ? d : 0);
  const int last = last_piece(p.width);
  F x[2 * kRun], z[kRun];
  const F bias = active ? load_bias(p, d) : F(0);
#pragma unroll
  for (int i = 0; i < kRun; ++i) z[i] = bias;
  if (active) load_inputs(p, row, b, d, t - last * kRun, x + kRun);
  for (int q = last; q >= 0; q -= kStagedPieces) {
    const int to = max(q - kStagedPieces + 1, 0);
    if (q < last) __syncthreads();
    for (int i = threadIdx.x; i < (q - to + 1) * kRun * channels; i += kThreads) {
      const int m = q * kRun - i / channels, c = i % channels;
      if (m < 0 || m >= p.width || d0 + c >= p.dim) continue;
      weights[i] = p.weight.load(d0 + c, p.width - 1 - m) * p.scale;
    }
    __syncthreads();
    if (active) {
      convolve_pieces(p, row, b, d, t, q, to, weights + place.channel, channels, x, z);
    }
  }
  if (!active) return;
  if (p.silu) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) z[i] = silu<T>(z[i]);
  }
  store_run(AnyRow<T>(p.out, b, d), t, p.seqlen, z);
}

}  // namespace causal_conv1d::gpu
