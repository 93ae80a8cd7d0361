// What packed sequences have of states: their first W - 1 outputs, and final_states.
#pragma once

#include "forward_any.cuh"
#include "packed_edges.cuh"

namespace causal_conv1d::gpu {

// A lane per sequence and channel, so that final_states may be initial_states.
template <int WMAX, typename T>
__global__ void __launch_bounds__(kThreads, WMAX == 4 ? 8 : 6)
    forward_edges(const ForwardArgs<T> p, const AnyOptions o) {
  constexpr int H = WMAX - 1;
  pdl_wait();
  pdl_launch();
  int64_t d, row;
  if (split_edges(p.x, p.dim, o.rows, &row, &d) > 0) return;
  const PackedRow r(o, row, d, p.dim);
  const int skip = WMAX - p.width;
  const EdgeSpan start(r, r.begin), end(r, r.end - H);
  EdgeSteps<H, T> first(p.x, r, start.s0), last(p.x, r, end.s0);
  if (p.initial_states.given()) first.load(start);
  if (p.final_states.given()) last.load(end);
  const EdgeStates<H> states(p.initial_states, p.width, r);
  T raw[H];
  float x[2 * H];
  if (p.initial_states.given()) {
    float w[WMAX];
    load_weights(p, r.d, w);
    const float bias = load_bias(p, r.d);
    first.get(raw);
    edge_inputs(p, r, start, raw, x + H);
    T y[H];
#pragma unroll
    for (int i = 0; i < H; ++i) x[i] = states.get(i);
#pragma unroll
    for (int i = 0; i < H; ++i) {
      const float z =
          convolve<WMAX>(bias, skip, [&](int k) { return w[k]; }, [&](int k) { return x[i + k]; });
      y[i] = from_compute<T>(0.0f);
      if (start.has(i)) y[i] = from_compute<T>(finish(p, 0, r.d, start.s0 + i, z));
    }
    EdgeSteps<H, T>(p.out, r, start.s0).store(y, 0, min(start.hi, p.width - 1));
  }
  if (!p.final_states.given()) return;
  last.get(raw);
  edge_inputs(p, r, end, raw, x);
#pragma unroll
  for (int i = 0; i < H; ++i) {
    if (r.own && i >= skip) p.final_states.store(x[i], row, d, i - skip);
  }
}

}  // namespace causal_conv1d::gpu
