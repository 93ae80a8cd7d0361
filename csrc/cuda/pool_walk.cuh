// The pool of any strides and types: see pool.cuh.
#pragma once

#include "pool.cuh"

namespace causal_conv1d::gpu {

// The part of a walk that is in one sequence: tokens from .. to - 1 of channel d.
template <typename T>
__device__ __forceinline__ void walk_sequence(const PoolArgs<T>& p, const Sequence<T>& s, int64_t i,
                                              int64_t d, int64_t from, int64_t to) {
  using F = Compute<T>;
  constexpr int WMAX = 8, H = WMAX - 1, N = 4;  // N: tokens that are loaded at once
  const int first = WMAX - p.width;
  F w[WMAX], v[H + N];
#pragma unroll
  for (int j = 0; j < H; ++j) {
    v[j] = F(0);
    if (j >= first) v[j] = s.input(p, d, from - s.begin + j - first);
  }
  if (p.windows.given()) write_windows(p, s, i, d, from, to);
  if (from == s.begin) write_state<1>(p, s, d);
#pragma unroll
  for (int k = 0; k < WMAX; ++k) w[k] = k < first ? F(0) : p.weight.load(d, k - first) * p.scale;
  const F bias = load_bias(p, d);
#pragma unroll 1
  for (; from < to; from += N) {
#pragma unroll
    for (int u = 0; u < N; ++u) {
      v[H + u] = from + u < to ? to_compute(*p.x.at(0, d, from + u)) : F(0);
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (from + u >= to) break;
      F z = bias;
#pragma unroll
      for (int k = 0; k < WMAX; ++k) {
        if (k >= first) z = fma(w[k], v[u + k], z);
      }
      if (p.silu) z = silu<T>(z);
      *p.out.at(0, d, from + u) = from_compute<T>(z);
    }
#pragma unroll
    for (int j = 0; j < H; ++j) v[j] = v[N + j];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) pool_walk(const PoolArgs<T> p) {
  const ColumnChunk at(p.columns);
  if (!at.inside) return;
  const int64_t d = at.column;
  pdl_wait();
  int64_t i = int64_t(at.chunk) - 1, t = p.start(i), end = p.start(i + 1);
  if (p.tile > 0) {
    t = int64_t(at.chunk) * p.tile;
    end = min(t + p.tile, p.seqlen);
    i = p.sequence_of(t);
  }
#pragma unroll 1
  while (t < end) {
    Sequence<T> s(p, i);
    s.begin = min(s.begin, t);
    int64_t to = min(s.end, end);
    if (s.slot < 0) {
#pragma unroll 1
      for (int64_t u = t; u < to; ++u) *p.out.at(0, d, u) = from_compute<T>(0);
    } else {
      // The first W - 1 tokens belong to whoever has the first one.
      const int64_t both = min(s.end, s.begin + p.width - 1);
      if (t > s.begin) t = max(t, both);
      if (t == s.begin) to = max(to, both);
      if (t < to) walk_sequence(p, s, i, d, t, to);
    }
    t = max(t, to);
    ++i;
    while (t < end && p.start(i + 1) <= t) ++i;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) pool_any(const PoolArgs<T> p) {
  int64_t d;
  const int64_t i = split(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, p.dim, &d) - 1;
  if (i > p.sequences) return;
  const Sequence<T> s(p, i);
  if (s.slot < 0) {
#pragma unroll 1
    for (int64_t t = s.begin; t < s.end; ++t) *p.out.at(0, d, t) = from_compute<T>(0);
  }
  if (s.slot < 0 || s.begin >= s.end) return;
  if (p.windows.given()) write_windows(p, s, i, d, s.begin, s.end);
  const Compute<T> bias = load_bias(p, d);
#pragma unroll 1
  for (int64_t t = s.begin; t < s.end; ++t) {
    Compute<T> z =
        convolve_any<1>(p, d, bias, [&](int k) { return s.input(p, d, t - s.begin + k); });
    if (p.silu) z = silu<T>(z);
    *p.out.at(0, d, t) = from_compute<T>(z);
  }
  write_state<1>(p, s, d);
}

}  // namespace causal_conv1d::gpu
