// The backward of packed sequences with states: what the kernels of variants.cuh, which know no
// states of theirs, are to be corrected by.
#pragma once

#include "backward_options.cuh"
#include "packed_edges.cuh"

namespace causal_conv1d::gpu {

// A warp has a place, 32 channels, and every `parts`-th sequence.
enum EdgePlace {
  kStart,  // dinitial_states, dx of the first W - 1 steps, and what these add to the sums, less
           // what they added without states: that is the lane's partial sum
  kEnd,    // dx of the last W - 1 steps, which take dfinal_states
  kEdgePlaces
};

// With H = WMAX - 1 a place is 3 H steps: the H before the sequence and its first 2 H, or its last
// 3 H. x~ is of all of them, and g and dz of the last 2 H; at the end the first H are not used.
template <int WMAX>
struct EdgeValues {
  static constexpr int H = WMAX - 1;
  float w[WMAX], bias, x[3 * H], g[2 * H], dz[2 * H];

  // z of the i-th step that has a dz, of inputs from place `from` of x on.
  __device__ __forceinline__ float z(int i, int skip, int from = 0) const {
    return convolve<WMAX>(
        bias, skip, [&](int k) { return w[k]; },
        [&](int k) { return i + k >= from ? x[i + k] : 0.0f; });
  }
  // dx' of the step H before that.
  __device__ __forceinline__ float dx(int i, int skip) const {
    return correlate<WMAX>(
        skip, [&](int k) { return w[k]; },
        [&](int j) { return i + j >= H && i + j < 3 * H ? dz[i + j - H] : 0.0f; });
  }
};

// What the first steps add to the sums with states, less what they add without.
template <int WMAX, typename T>
__device__ __forceinline__ void correct_sums(const BackwardArgs<T>& p, const EdgeSpan& span,
                                             const EdgeValues<WMAX>& e, float (&dw)[WMAX],
                                             float& db) {
  constexpr int H = WMAX - 1;
  const int skip = WMAX - p.width;
#pragma unroll
  for (int i = 0; i < H; ++i) {
    if (i >= p.width - 1 || !span.has(i)) continue;
    const float without = p.gradient(e.z(i, skip, H), e.g[i]);
    // No difference of what is equal, which may be infinite.
    const float more = e.dz[i] == without ? 0.0f : e.dz[i] - without;
    db += more;
#pragma unroll
    for (int k = 0; k < WMAX; ++k) {
      const bool state = i + k < H;
      if (has_tap<WMAX>(k, skip) && (state || more != 0.0f)) {
        dw[k] = fmaf(state ? e.dz[i] : more, e.x[i + k], dw[k]);
      }
    }
  }
}

// Stores dx of H steps from s0 on, of which lo to hi - 1 are to be.
template <int H, typename T>
__device__ __forceinline__ void store_edge_dx(const BackwardArgs<T>& p, const PackedRow& r,
                                              int64_t s0, int lo, int hi, const float (&sums)[H]) {
  if (p.pre_gate.given() || p.add_dout) {
#pragma unroll
    for (int i = 0; i < H; ++i) {
      if (r.own && i >= lo && i < hi) store_dx(p, 0, r.d, s0 + i, true, sums[i]);
    }
    return;
  }
  T dx[H];
#pragma unroll
  for (int i = 0; i < H; ++i) dx[i] = from_compute<T>(sums[i]);
  EdgeSteps<H, T>(p.dx, r, s0).store(dx, lo, hi);
}

template <int WMAX, typename T>
__global__ void __launch_bounds__(kThreads, WMAX == 4 ? (kTuring ? 4 : 6) : 3)
    backward_edges(const BackwardArgs<T> p, const AnyOptions o, int64_t parts, int64_t sums_at) {
  constexpr int H = WMAX - 1;
  pdl_wait();
  pdl_launch();
  // A sequence's end and the next one's start, which touch the same sectors, are beside each other.
  int64_t n, d;
  if (split_edges(p.x, p.dim, parts * kEdgePlaces, &n, &d) > 0) return;
  const int part = static_cast<int>(n) / kEdgePlaces;
  const bool start = static_cast<int>(n) % kEdgePlaces == kStart;
  const bool states = p.initial_states.given(), dinitial = p.dinitial_states.given();
  if (start ? !states && !dinitial : !p.dfinal_states.given()) return;
  const int skip = WMAX - p.width;
  EdgeValues<WMAX> e;
  load_weights(p, min(d, p.dim - 1), e.w);
  e.bias = load_bias(p, min(d, p.dim - 1));
  float dw[WMAX] = {}, db = 0.0f;
#pragma unroll 1
  for (int64_t row = part; row < o.rows; row += parts) {
    const PackedRow r(o, row, d, p.dim);
    const EdgeSpan span(r, start ? r.begin : r.end - 2 * H);
    EdgeSteps<2 * H, T> xs(p.x, r, span.s0), gs(p.dout, r, span.s0);
    xs.load(span);
    gs.load(span);
    const EdgeStates<H> taken(start ? p.initial_states : p.dfinal_states, p.width, r);
    T raw[2 * H];
    xs.get(raw);
    edge_inputs(p, r, span, raw, e.x + H);
#pragma unroll
    for (int i = 0; i < H; ++i) e.x[i] = taken.get(i);
    gs.get(raw);
#pragma unroll
    for (int i = 0; i < 2 * H; ++i) {
      const int64_t t = span.s0 + i;
      e.g[i] = e.dz[i] = 0.0f;
      if (!span.has(i)) continue;
      const float z = e.z(i, skip), dout = to_compute(raw[i]);
      e.g[i] = dout;
      if (p.post_gate.given()) e.g[i] = multiply(dout, to_compute(*p.post_gate.at(0, r.d, t)));
      e.dz[i] = p.gradient(z, e.g[i]);
      if (r.own && start && states && p.dpost_gate.given() && i < p.width - 1) {
        *p.dpost_gate.at(0, d, t) = from_compute<T>(multiply(dout, p.silu ? silu<T>(z) : z));
      }
    }
    float sums[H];
    if (!start) {
#pragma unroll
      for (int i = 0; i < H; ++i) sums[i] = e.dx(2 * H + i, skip) + taken.get(i);
      const int from = span.lo - H + (states ? p.width - 1 : 0);
      store_edge_dx(p, r, span.s0 + H, max(from, skip), H, sums);
      continue;
    }
    if (states && p.partials != nullptr) correct_sums(p, span, e, dw, db);
    const bool ends = p.dfinal_states.given() && span.hi < 2 * H;  // dfinal_states reach so far
    if (dinitial && r.own) {
#pragma unroll
      for (int i = 0; i < H; ++i) {
        if (i < skip) continue;
        float sum = e.dx(i, skip);
        if (ends) sum += dfinal_at(p, o, row, 0, d, r.begin - H + i);
        p.dinitial_states.store(sum, row, d, i - skip);
      }
    }
    if (!states) continue;
#pragma unroll
    for (int i = 0; i < H; ++i) {
      sums[i] = e.dx(H + i, skip);
      if (ends) sums[i] += dfinal_at(p, o, row, 0, r.d, r.begin + i);
    }
    store_edge_dx(p, r, span.s0, 0, min(span.hi, p.width - 1), sums);
  }
  if (!start || !states || p.partials == nullptr || d >= p.dim) return;
#pragma unroll
  for (int k = 0; k < WMAX; ++k) {
    if (has_tap<WMAX>(k, skip)) *p.partial(sums_at + part, k - skip, d) = dw[k];
  }
  *p.partial(sums_at + part, p.width, d) = db;
}

}  // namespace causal_conv1d::gpu
