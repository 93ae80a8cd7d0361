// The backward of packed sequences with states: what the kernels of variants.cuh, which know no
// states of theirs, are to be corrected by.
#pragma once

#include "backward_options.cuh"
#include "packed_edges.cuh"

namespace causal_conv1d::gpu {

// A thread has a place, a channel d, and every `parts`-th sequence. With H = W - 1 the places are:
enum EdgePlace {
  kBefore,  // dinitial_states; and what the first H steps add to the sums, less what they added
            // without states: that is the thread's partial sum
  kStart,   // dx of the first H steps
  kEnd,     // dx of the last H steps, which take dfinal_states
  kEdgePlaces
};

// The place's H steps from `first` on, and the H after these. Arrays are for H = WMAX - 1: of x
// from H before `first` on, of z and dz from `first` on.
template <int WMAX>
struct EdgeSteps {
  static constexpr int H = WMAX - 1;
  int64_t first;
  float w[WMAX], bias, x[3 * H], g[2 * H], dz[2 * H];

  template <typename T>
  __device__ __forceinline__ void load(const BackwardArgs<T>& p, const PackedRow& r) {
    load_inputs(p, r, first - H, x);
    T raw[2 * H];
    load_steps(p.dout, r, first, raw);
#pragma unroll
    for (int i = 0; i < 2 * H; ++i) g[i] = to_compute(raw[i]);
  }

  // z of step first + i, of inputs from place `from` of x on.
  __device__ __forceinline__ float z(int i, int skip, int from = 0) const {
    return convolve<WMAX>(
        bias, skip, [&](int k) { return w[k]; },
        [&](int k) { return i + k >= from ? x[i + k] : 0.0f; });
  }
  // dx' of step first + i.
  __device__ __forceinline__ float dx(int i, int skip) const {
    return correlate<WMAX>(skip, [&](int k) { return w[k]; }, [&](int j) { return dz[i + j]; });
  }
};

// What the first steps add to the sums with states, less what they add without. These begin H steps
// after those of e.
template <int WMAX, typename T>
__device__ __forceinline__ void correct_sums(const BackwardArgs<T>& p, const PackedRow& r,
                                             const EdgeSteps<WMAX>& e, float (&dw)[WMAX],
                                             float& db) {
  constexpr int H = WMAX - 1;
  const int skip = WMAX - p.width;
#pragma unroll
  for (int i = H; i < 2 * H; ++i) {
    if (i - H >= p.width - 1 || !r.has(e.first + i)) continue;
    const float without = p.gradient(e.z(i, skip, 2 * H), e.g[i]);
    // No difference of what is equal, which may be infinite.
    const float more = e.dz[i] == without ? 0.0f : e.dz[i] - without;
    db += more;
#pragma unroll
    for (int k = 0; k < WMAX; ++k) {
      const bool state = i + k < 2 * H;
      if (has_tap<WMAX>(k, skip) && (state || more != 0.0f)) {
        dw[k] = fmaf(state ? e.dz[i] : more, e.x[i + k], dw[k]);
      }
    }
  }
}

template <int WMAX, typename T>
__global__ void __launch_bounds__(kThreads, WMAX == 8 || sizeof(T) == 4 ? 3 : 4)
    backward_edges(const BackwardArgs<T> p, const AnyOptions o, int64_t parts, int64_t sums_at) {
  constexpr int H = WMAX - 1;
  pdl_wait();
  pdl_launch();
  int64_t part, d;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t place = split(split(n, edge_channels(p.dim), &d), parts, &part);
  const bool states = p.initial_states.given(), dinitial = p.dinitial_states.given();
  if (place == kBefore ? !states && !dinitial
                       : (place == kStart ? !states : place != kEnd || !p.dfinal_states.given())) {
    return;
  }
  const int skip = WMAX - p.width;
  EdgeSteps<WMAX> e;
  load_weights(p, min(d, p.dim - 1), e.w);
  e.bias = load_bias(p, min(d, p.dim - 1));
  float dw[WMAX] = {}, db = 0.0f;
#pragma unroll 1
  for (int64_t row = part; row < o.rows; row += parts) {
    const PackedRow r(o, row, d, p.dim);
    e.first = place == kStart ? r.begin : (place == kBefore ? r.begin : r.end) - H;
    e.load(p, r);
#pragma unroll
    for (int i = 0; i < 2 * H; ++i) {
      const int64_t t = e.first + i;
      e.dz[i] = 0.0f;
      if (!r.has(t)) continue;
      const float z = e.z(i, skip), dout = e.g[i];
      if (p.post_gate.given()) e.g[i] = multiply(dout, to_compute(*p.post_gate.at(0, r.d, t)));
      e.dz[i] = p.gradient(z, e.g[i]);
      if (r.own && place == kBefore && states && p.dpost_gate.given() &&
          t < r.begin + p.width - 1) {
        *p.dpost_gate.at(0, d, t) = from_compute<T>(multiply(dout, p.silu ? silu<T>(z) : z));
      }
    }
    if (place == kBefore && states && p.partials != nullptr) correct_sums(p, r, e, dw, db);
#pragma unroll
    for (int i = 0; i < H && r.own; ++i) {
      const int64_t s = e.first + i, j = s - r.begin + p.width - 1;
      const float sum = e.dx(i, skip);
      if (place == kBefore) {
        if (dinitial && j >= 0) {
          p.dinitial_states.store(sum + dfinal_at(p, o, row, 0, d, s), row, d, j);
        }
      } else if (place == kStart ? i < p.width - 1 && s < r.end
                                 : i >= skip && s >= r.begin + (states ? p.width - 1 : 0)) {
        store_dx(p, 0, d, s, true, sum + dfinal_at(p, o, row, 0, d, s));
      }
    }
  }
  if (place != kBefore || !states || p.partials == nullptr || d >= p.dim) return;
#pragma unroll
  for (int k = 0; k < WMAX; ++k) {
    if (has_tap<WMAX>(k, skip)) *p.partial(sums_at + part, k - skip, d) = dw[k];
  }
  *p.partial(sums_at + part, p.width, d) = db;
}

}  // namespace causal_conv1d::gpu
