// The first and last steps of packed sequences, which the kernels of variants.cuh compute without
// states: a thread has all such steps of a channel, with their inputs in registers.
#pragma once

#include "any_options.cuh"

namespace causal_conv1d::gpu {

// A sequence, and one channel of it.
struct PackedRow {
  int64_t row, d, begin, end;

  __device__ __forceinline__ PackedRow(const AnyOptions& o, int64_t row_, int64_t d_)
      : row(row_), d(d_), begin(o.bounds[row_]), end(o.bounds[row_ + 1]) {}
  __device__ __forceinline__ bool has(int64_t t) const { return t >= begin && t < end; }
};

// x'~ of the N steps from s0 on; what is not there is 0.
template <int N, typename Args>
__device__ __forceinline__ void load_inputs(const Args& p, const PackedRow& r, int64_t s0,
                                            float (&x)[N]) {
  using T = typename Args::Element;
  const int64_t to_state = p.width - 1 - r.begin;
  T raw[N];
  uint32_t state[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {  // all are in flight before the first is converted
    raw[i] = from_compute<T>(0.0f);
    if (r.has(s0 + i)) raw[i] = *p.x.at(0, r.d, s0 + i);
  }
  const bool states = p.initial_states.given() && s0 < r.begin;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t s = s0 + i;
    state[i] = 0;
    if (states && s < r.begin && s + to_state >= 0) {
      state[i] = p.initial_states.bits(r.row, r.d, s + to_state);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = to_compute(raw[i]);
    if (s0 + i < r.begin) x[i] = AnyView<float>::convert(state[i], p.initial_states.dtype);
  }
  if (!p.pre_gate.given()) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (r.has(s0 + i)) x[i] = gated_input(p, 0, r.d, s0 + i);
  }
}

template <int WMAX, typename Args>
__device__ __forceinline__ void load_weights(const Args& p, int64_t d, float (&w)[WMAX]) {
  const int first = WMAX - p.width;
#pragma unroll
  for (int k = 0; k < WMAX; ++k) {
    w[k] = has_tap<WMAX>(k, first) ? p.weight.load(d, k - first) * p.scale : 0.0f;
  }
}

}  // namespace causal_conv1d::gpu
