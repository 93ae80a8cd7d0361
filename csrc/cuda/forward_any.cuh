// The forward for any width, strides and type; and final_states.
#pragma once

#include "forward.cuh"
#include "taps.cuh"

namespace causal_conv1d::gpu {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    forward_any_width(const ForwardArgs<T> p, bool dim_fastest) {
  int64_t b, d, t;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (dim_fastest) {
    b = split(split(n, p.dim, &d), p.seqlen, &t);
  } else {
    b = split(split(n, p.seqlen, &t), p.dim, &d);
  }
  if (b >= p.batch) return;
  const int id = p.seq_idx.at(b, t);
  constexpr int kUnroll = sizeof(Compute<T>) == 8 ? 4 : 2;
  Compute<T> z = convolve_any<kUnroll>(p, d, load_bias(p, d), [&](int k) {
    const int64_t s = t - (p.width - 1) + k;
    return p.seq_idx.takes(b, s, id) ? p.input(b, d, s) : Compute<T>(0);
  });
  if (p.silu) z = silu<T>(z);
  *p.out.at(b, d, t) = from_compute<T>(id < 0 ? Compute<T>(0) : z);
}

// final_states_out[b,d,j] = x~[b,d,e-(W-1)+j], e being the row's end without the padding there;
// padding before that counts as zeros, and x~ before a row that begins with padding too. A thread
// has all of a (b, d) and walks up j, so that what it reads of initial_states, which may be the
// same memory, is never what it has written.
template <typename T>
__global__ void __launch_bounds__(kThreads) write_final_states(const ForwardArgs<T> p) {
  pdl_wait();
  pdl_launch();
  int64_t b, d, end = p.seqlen;
  if (p.seq_idx.data == nullptr) {
    b = split(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, p.dim, &d);
    if (b >= p.batch) return;
  } else {  // a block has channels of one row
    b = split(blockIdx.x, ceil_div(p.dim, kThreads), &d);
    d = d * kThreads + threadIdx.x;
    end = p.seq_idx.end(b, p.seqlen);
    if (d >= p.dim) return;
  }
  const bool takes_states = p.initial_states.given() && (end == 0 || p.seq_idx.at(b, 0) >= 0);
  constexpr int N = 4;  // in flight at a time, which is why they are converted after the last
  const int states = p.width - 1;
  for (int j0 = 0; j0 < states; j0 += N) {
    const int64_t s0 = end - states + j0;
    const int count = min(N, states - j0);
    T x[N];
    Compute<T> state[N];
    bool counts[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t s = s0 + i;
      const bool is_x = i < count && s >= 0;
      if (is_x) x[i] = *p.x.at(b, d, s);
      counts[i] = is_x && p.seq_idx.at(b, s) >= 0;
    }
    if (s0 < 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool before = takes_states && i < count && s0 + i < 0;
        state[i] = before ? p.initial_states.load(b, d, s0 + i + states) : Compute<T>(0);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      Compute<T> v = counts[i] ? to_compute(x[i]) : Compute<T>(0);
      if (s0 + i < 0) v = state[i];
      if (i < count) p.final_states.store(v, b, d, j0 + i);
    }
  }
}

}  // namespace causal_conv1d::gpu
