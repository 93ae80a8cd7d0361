// The forward for any width, strides, type and options; and final_states.
#pragma once

#include "any_options.cuh"
#include "forward.cuh"

namespace causal_conv1d::gpu {

// Which steps forward_any_width has, one per thread: all, with neighbouring threads along time or
// along channels; or those that take initial_states.
enum class Steps { kAlongTime, kAlongChannels, kOfStates };

// The output at t of its pre-activation, with gate and residual.
template <typename T>
__device__ __forceinline__ Compute<T> finish(const ForwardArgs<T>& p, int64_t b, int64_t d,
                                             int64_t t, Compute<T> z) {
  if (p.silu) z = silu<T>(z);
  Compute<T> residual = 0;
  if (p.residual.given()) residual = to_compute(*p.residual.at(b, d, t));
  if (!p.post_gate.given()) return p.residual.given() ? add(z, residual) : z;
  const Compute<T> gate = to_compute(*p.post_gate.at(b, d, t));
  return p.residual.given() ? fma(z, gate, residual) : multiply(z, gate);
}

// The output at t.
template <bool OPTIONS, typename T>
__device__ __forceinline__ Compute<T> output(const ForwardArgs<T>& p, const AnyOptions& o,
                                             int64_t b, int64_t d, int64_t t) {
  const int id = p.seq_idx.at(b, t);
  if (id < 0) {
    return OPTIONS && p.residual.given() ? to_compute(*p.residual.at(b, d, t)) : Compute<T>(0);
  }
  const Compute<T> z = pre_activation<OPTIONS>(p, o, b, d, t, id);
  if constexpr (OPTIONS) return finish(p, b, d, t, z);
  return p.silu ? silu<T>(z) : z;
}

template <bool OPTIONS, typename T>
__global__ void __launch_bounds__(kThreads)
    forward_any_width(const ForwardArgs<T> p, const AnyOptions o, Steps steps) {
  int64_t b, d, t;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (OPTIONS && steps == Steps::kOfStates) {
    const int64_t row = split(split(n, state_columns(p, o), &t), p.dim, &d);
    if (row >= o.rows) return;
    t += o.begin(row);
    if (t >= o.end(row, p.seqlen)) return;
    b = o.bounds == nullptr ? row : 0;
  } else if (steps == Steps::kAlongChannels) {
    b = split(split(n, p.dim, &d), p.seqlen, &t);
  } else {
    b = split(split(n, p.seqlen, &t), p.dim, &d);
  }
  if (b >= p.batch) return;
  *p.out.at(b, d, t) = from_compute<T>(output<OPTIONS>(p, o, b, d, t));
}

// final_states_out[row,d,j] = x'~[row,d,e-S+j] for S columns, e being the row's end without the
// padding there; padding before that counts as zeros, and x~ before a row that begins with padding
// too. A thread has all of a (row, d) and walks up j, so that what it reads of initial_states,
// which may be the same memory, is never what it has written.
template <bool OPTIONS, typename T>
__global__ void __launch_bounds__(kThreads)
    write_final_states(const ForwardArgs<T> p, const AnyOptions o) {
  pdl_wait();
  pdl_launch();
  const bool packed = OPTIONS && o.bounds != nullptr;
  int64_t row, d, begin = 0, end = p.seqlen;
  if (p.seq_idx.data == nullptr || packed) {
    row = split(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, p.dim, &d);
    if (row >= (OPTIONS ? o.rows : p.batch)) return;
    if (packed) begin = o.begin(row), end = o.end(row, p.seqlen);
  } else {  // a block has channels of one row
    row = split(blockIdx.x, ceil_div(p.dim, kThreads), &d);
    d = d * kThreads + threadIdx.x;
    end = p.seq_idx.end(row, p.seqlen);
    if (d >= p.dim) return;
  }
  const int64_t b = packed ? 0 : row;
  const bool takes_states =
      p.initial_states.given() && (packed || end == 0 || p.seq_idx.at(b, 0) >= 0);
  constexpr int N = 4;  // in flight at a time, which is why they are converted after the last
  const int64_t states = OPTIONS ? state_columns(p, o) : p.width - 1;
  for (int64_t j0 = 0; j0 < states; j0 += N) {
    const int64_t s0 = end - states + j0;
    const int count = static_cast<int>(min(int64_t(N), states - j0));
    T x[N];
    Compute<T> state[N];
    bool counts[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t s = s0 + i;
      const bool is_x = i < count && s >= begin;
      if (is_x) x[i] = OPTIONS ? from_compute<T>(gated_input(p, b, d, s)) : *p.x.at(b, d, s);
      counts[i] = is_x && p.seq_idx.at(b, s) >= 0;
    }
    if (s0 < begin) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool before = takes_states && i < count && s0 + i < begin;
        state[i] = before ? p.initial_states.load(row, d, s0 + i - begin + states) : Compute<T>(0);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      Compute<T> v = counts[i] ? to_compute(x[i]) : Compute<T>(0);
      if (s0 + i < begin) v = state[i];
      if (i < count) p.final_states.store(v, row, d, j0 + i);
    }
  }
}

}  // namespace causal_conv1d::gpu
