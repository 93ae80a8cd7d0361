// The backward without options and ids for any width, strides and type, by runs of eight steps.
#pragma once

#include "any_rows.cuh"
#include "backward.cuh"

namespace causal_conv1d::gpu {

extern __shared__ AnyWords any_memory[];  // dz, weights, and sums of warps

// Where a block has dz: nine places for the eight steps of a run, so that the runs of a warp's
// lanes lie in different banks.
__device__ __forceinline__ int run_at(int run, int channels, int channel) {
  return run * (kRun + 1) * channels + channel;
}

// dz of a run.
template <typename T>
__device__ __forceinline__ void dz_of_run(const BackwardArgs<T>& p, const AnyRow<T>& x_row,
                                          const AnyRow<T>& dout_row, int64_t b, int64_t d,
                                          int64_t t, const Compute<T>* weight, int channels,
                                          Compute<T>* dz) {
  using F = Compute<T>;
  F g[kRun];
  load_run(dout_row, t, p.seqlen, g,
           [&](int64_t s) { return s < p.seqlen ? to_compute(*p.dout.at(b, d, s)) : F(0); });
  if (p.silu) {
    F x[2 * kRun], z[kRun];
    const F bias = load_bias(p, d);
#pragma unroll
    for (int i = 0; i < kRun; ++i) z[i] = bias;
    const int last = last_piece(p.width);
    convolve_pieces(p, x_row, b, d, t, last, 0, true, weight, channels, x, z);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (t + i < p.seqlen) g[i] = p.gradient(z[i], g[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) dz[i * channels] = g[i];
}

// dx of the run from s on, whose dz lie from `dz` on. weight[-j * channels] is that of j steps
// later.
template <typename T>
__device__ __forceinline__ void dx_of_run(const BackwardArgs<T>& p, int64_t s, const Compute<T>* dz,
                                          const Compute<T>* weight, int channels,
                                          Compute<T> (&a)[kRun]) {
  using F = Compute<T>;
  const int pitch = (kRun + 1) * channels;
  F w[2 * kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) a[i] = 0, w[kRun + i] = dz[i * channels];
#pragma unroll 1
  for (int j0 = 0; j0 < p.width; j0 += kRun) {
    dz += pitch;
#pragma unroll
    for (int i = 0; i < kRun; ++i) w[i] = w[kRun + i], w[kRun + i] = dz[i * channels];
    // Of the window, before the row's end.
    const int steps = static_cast<int>(min(p.seqlen - s - j0, int64_t(2 * kRun)));
    if (steps <= 0) break;
#pragma unroll
    for (int r = 0; r < kRun; ++r) {
      if (j0 + r >= p.width) continue;
      const F wr = weight[-(j0 + r) * channels];
      if (steps >= 2 * kRun) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) a[i] = fma(wr, w[i + r], a[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if (i + r < steps) a[i] = fma(wr, w[i + r], a[i]);
        }
      }
    }
  }
}

// sum[r] += the products of a run for tap m = 8q - r; in piece 0 sum[1] is dbias.
template <typename T>
__device__ __forceinline__ void sums_of_run(const BackwardArgs<T>& p, const AnyRow<T>& row,
                                            int64_t b, int64_t d, int64_t t, int q,
                                            const Compute<T>* dz_at, int channels,
                                            Compute<T> (&sum)[kRun]) {
  using F = Compute<T>;
  F dz[kRun], x[2 * kRun];
  const int steps = static_cast<int>(min(p.seqlen - t, int64_t(kRun)));
#pragma unroll
  for (int i = 0; i < kRun; ++i) dz[i] = dz_at[i * channels];
#pragma unroll 1
  for (int n = q == 0 ? 1 : 0; n < 2; ++n) {
    shift_inputs(p, row, b, d, t - (q - n) * kRun - (q == 0 ? kRun : 0), x);
  }
  if (q == 0) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < steps) sum[0] = fma(dz[i], x[kRun + i], sum[0]), sum[1] += dz[i];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (i >= steps) break;  // x may be anything there
#pragma unroll
    for (int r = 0; r < kRun; ++r) sum[r] = fma(dz[i], x[i + r], sum[r]);
  }
}

// The sums over a warp's lanes: lane 4r has that of sum[r].
template <typename F>
__device__ __forceinline__ F sums_of_warp(F (&sum)[kRun]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 4; n > 0; n /= 2) {
    const bool upper = lane & (4 * n);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const F other = __shfl_xor_sync(0xffffffff, upper ? sum[i] : sum[i + n], 4 * n);
      sum[i] = (upper ? sum[i + n] : sum[i]) + other;
    }
  }
  F v = sum[0];
#pragma unroll
  for (int n = 2; n > 0; n /= 2) v += __shfl_xor_sync(0xffffffff, v, n);
  return v;
}

// Adds up the threads' sums of piece q and writes them.
template <typename F, typename Args>
__device__ __forceinline__ void write_sums(const Args& p, int64_t part, int64_t d0, int channels,
                                           int q, F (&sum)[kRun], F* of_warp) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();
  const int warps = channels == 32 ? kWarps : kWarps / channels;  // of a channel
  if (channels == 32) {
#pragma unroll
    for (int r = 0; r < kRun; ++r) of_warp[(warp * kRun + r) * 32 + lane] = sum[r];
  } else {
    const F v = sums_of_warp(sum);
    if (lane % 4 == 0) of_warp[warp * kRun + lane / 4] = v;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRun * channels; i += kThreads) {
    const int r = i / channels, c = i % channels, m = q * kRun - r;
    const F* from = of_warp + (channels == 32 ? i : c * warps * kRun + r);
    const int next = channels == 32 ? kRun * 32 : kRun;
    F v = from[0];
    for (int n = 1; n < warps; ++n) v += from[n * next];
    if (m >= -1 && m < p.width && d0 + c < p.dim) *p.partial(part, p.width - 1 - m, d0 + c) = v;
  }
}

// A block has a chunk of `channels` channels: dz of the chunk and of the W-1 steps after it, then
// dx, then the sums of the chunk.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    backward_any_rows(const BackwardArgs<T> p, int channels) {
  using F = Compute<T>;
  const AnyPlace place(channels);
  const int last = last_piece(p.width);
  const int runs = static_cast<int>(p.chunk) / kRun;
  F* const dz_of = reinterpret_cast<F*>(any_memory);
  F* const weights = dz_of + run_at(runs + last + 1, channels, 0);
  F* const of_warp = weights + (last + 1) * kRun * channels;
  int64_t group, chunk;
  const int64_t part = split(blockIdx.x, ceil_div(p.dim, channels), &group);
  const int64_t b = split(part, p.chunks, &chunk);
  const int64_t d0 = group * channels, d = d0 + place.channel;
  const int64_t t0 = chunk * p.chunk, t1 = min(t0 + p.chunk, p.seqlen);
  const bool active = d < p.dim;
  const AnyRow<T> x_row(p.x, b, active ? d : 0), dout_row(p.dout, b, active ? d : 0);

  stage_weights(p, d0, channels, last, 0, weights);
  __syncthreads();
  const int64_t needed = min(t1 + p.width - 1, p.seqlen);
#pragma unroll 1
  for (int run = place.line; run < runs + last + 1 && active; run += place.lines) {
    F* const dz = dz_of + run_at(run, channels, place.channel);
    const int64_t t = t0 + run * kRun;
    if (t < needed) {
      dz_of_run(p, x_row, dout_row, b, d, t, weights + place.channel, channels, dz);
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) dz[i * channels] = 0;
    }
  }
  __syncthreads();
  const AnyRow<T> dx_row(p.dx, b, active ? d : 0);
#pragma unroll 1
  for (int run = place.line; run < runs && active; run += place.lines) {
    const int64_t s = t0 + run * kRun;
    if (s >= t1) break;
    F a[kRun];
    dx_of_run(p, s, dz_of + run_at(run, channels, place.channel),
              weights + last * kRun * channels + place.channel, channels, a);
    F final[kRun] = {};
    if (p.dfinal_states.given() && s + kRun > p.seqlen - (p.width - 1)) {
      fill_run(final, [&](int i) { return s + i < p.seqlen ? p.dfinal(b, d, s + i) : F(0); });
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) a[i] += final[i];
    store_run(dx_row, s, p.seqlen, a);
  }
  if (p.partials == nullptr) return;
#pragma unroll 1
  for (int q = last; q >= 0; --q) {
    F sum[kRun] = {};
#pragma unroll 1
    for (int run = place.line; run < runs && active; run += place.lines) {
      const int64_t t = t0 + run * kRun;
      if (t >= t1) break;
      sums_of_run(p, x_row, b, d, t, q, dz_of + run_at(run, channels, place.channel), channels,
                  sum);
    }
    write_sums(p, part, d0, channels, q, sum, of_warp);
  }
}

}  // namespace causal_conv1d::gpu
