// What packed sequences have of states: their first W - 1 outputs, and final_states.
#pragma once

#include "forward_any.cuh"
#include "packed_edges.cuh"

namespace causal_conv1d::gpu {

// A thread per sequence and channel, so that final_states may be initial_states.
template <int WMAX, typename T>
__global__ void __launch_bounds__(kThreads)
    forward_edges(const ForwardArgs<T> p, const AnyOptions o) {
  constexpr int H = WMAX - 1;
  pdl_wait();
  pdl_launch();
  int64_t d;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = split(n, edge_channels(p.dim), &d);
  if (row >= o.rows) return;
  const PackedRow r(o, row, d, p.dim);
  const int skip = WMAX - p.width;
  float last[H];
  if (p.final_states.given()) load_inputs(p, r, r.end - H, last);
  if (p.initial_states.given()) {
    float w[WMAX], x[2 * H];
    load_weights(p, r.d, w);
    const float bias = load_bias(p, r.d);
    load_inputs(p, r, r.begin - H, x);
#pragma unroll
    for (int i = 0; i < H && r.own; ++i) {
      const int64_t t = r.begin + i;
      if (i >= p.width - 1 || t >= r.end) continue;
      const float z =
          convolve<WMAX>(bias, skip, [&](int k) { return w[k]; }, [&](int k) { return x[i + k]; });
      *p.out.at(0, d, t) = from_compute<T>(finish(p, 0, d, t, z));
    }
  }
  if (!p.final_states.given() || !r.own) return;
#pragma unroll
  for (int i = 0; i < H; ++i) {
    if (i >= skip) p.final_states.store(last[i], row, d, i - skip);
  }
}

}  // namespace causal_conv1d::gpu
