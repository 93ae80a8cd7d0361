// The backward with any options, for any width, strides and type.
#pragma once

#include "backward_any.cuh"

namespace causal_conv1d::gpu {

// What dfinal_states adds to dx' at s < the row's end. Padding takes nothing, nor what comes before
// a row that begins with it.
template <typename T>
__device__ __forceinline__ Compute<T> dfinal_at(const BackwardArgs<T>& p, const AnyOptions& o,
                                                int64_t row, int64_t b, int64_t d, int64_t s) {
  const int64_t end = o.end(row, p.seqlen), j = s - (end - state_columns(p, o));
  if (!p.dfinal_states.given() || j < 0 || s >= end) return 0;
  const bool takes = o.bounds != nullptr || end == 0 || p.seq_idx.at(b, max(s, int64_t(0))) >= 0;
  return takes ? p.dfinal_states.load(row, d, j) : Compute<T>(0);
}

// Writes dx and dpre_gate of the sum dx' at s, where `inside` tells that s is no padding.
template <typename T>
__device__ __forceinline__ void store_dx(const BackwardArgs<T>& p, int64_t b, int64_t d, int64_t s,
                                         bool inside, Compute<T> sum) {
  Compute<T> dpre = 0;
  const Compute<T> dout = p.add_dout ? to_compute(*p.dout.at(b, d, s)) : Compute<T>(0);
  if (p.pre_gate.given() && inside) {
    dpre = multiply(sum, to_compute(*p.x.at(b, d, s)));
    const Compute<T> gate = to_compute(*p.pre_gate.at(b, d, s));
    sum = p.add_dout ? fma(sum, gate, dout) : multiply(sum, gate);
  } else if (p.add_dout) {
    sum = add(sum, dout);
  }
  *p.dx.at(b, d, s) = from_compute<T>(sum);
  if (p.dpre_gate.given()) *p.dpre_gate.at(b, d, s) = from_compute<T>(dpre);
}

// a + what the dz of the steps from t0 to t1 - 1 add to dx' at s <= t0, which has that id.
template <typename T, typename Dz>
__device__ __forceinline__ Compute<T> correlate_any(const BackwardArgs<T>& p, const AnyOptions& o,
                                                    int64_t b, int64_t d, int64_t s, int id,
                                                    int64_t t0, int64_t t1, Compute<T> a, Dz&& dz) {
#pragma unroll 1
  for (int64_t j = t0 == s ? 0 : ceil_div(t0 - s, o.dilation); j < p.width; ++j) {
    const int64_t t = s + j * o.dilation;
    if (t >= t1) break;
    if (p.seq_idx.at(b, t) != id) continue;
    a = fma(p.weight.load(d, p.width - 1 - j) * p.scale, dz(t), a);
  }
  return a;
}

// dinitial_states, and dx and dpre_gate of the steps that take dfinal_states, one per thread.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    backward_states(const BackwardArgs<T> p, const AnyOptions o) {
  const int64_t states = state_columns(p, o);
  int64_t d, s;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = split(split(n, 2 * states, &s), p.dim, &d);
  if (row >= o.rows) return;
  const int64_t b = o.bounds == nullptr ? row : 0;
  const bool initial = s < states;
  const int64_t j = s;
  if (initial) {
    if (!p.dinitial_states.given()) return;
    s += o.begin(row) - states;
  } else {
    s += o.end(row, p.seqlen) - 2 * states;
    if (!p.dfinal_states.given() || s < o.begin(row)) return;
  }
  int id = 0;  // before a row of none
  if (initial && o.bounds != nullptr) {
    id = static_cast<int>(row);
  } else if (p.seqlen > 0) {
    id = p.seq_idx.at(b, max(s, int64_t(0)));
  }
  const bool inside = initial || id >= 0;
  Compute<T> sum = 0;
  if (inside) {
    sum = correlate_any(p, o, b, d, s, id, initial ? o.begin(row) : s, p.seqlen, sum,
                        [&](int64_t t) { return dz_at<true>(p, o, b, d, t); });
    sum += dfinal_at(p, o, row, b, d, s);
  }
  if (initial) {
    p.dinitial_states.store(sum, row, d, j);
  } else {
    store_dx(p, b, d, s, inside, sum);
  }
}

// All else, and partial sums. A block has a chunk of some adjacent channels, a thread every n-th
// step of one of them. The dz of the chunk, and of the steps after it that dx needs, come a chunk
// at a time.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    backward_any_tiles(const BackwardArgs<T> p, const AnyOptions o, int channels) {
  using F = Compute<T>;
  __shared__ F dz_of[kTileEntries], dx_of[kTileEntries];
  int64_t group, chunk;
  const int64_t part = split(blockIdx.x, ceil_div(p.dim, channels), &group);
  const int64_t b = split(part, p.chunks, &chunk);
  const int lane = threadIdx.x % channels, lines = kThreads / channels;
  const int64_t d = group * channels + lane, line = threadIdx.x / channels;
  const int64_t t0 = chunk * p.chunk, t1 = min(t0 + p.chunk, p.seqlen);
  const int64_t count = d < p.dim ? t1 - t0 : 0;  // of the channel's steps
  const auto at = [&](int64_t i) { return static_cast<int>(i) * channels + lane; };

#pragma unroll 1
  for (int64_t i = line; i < count; i += lines) dx_of[at(i)] = 0;
  for (int64_t w0 = t0; w0 < min(t1 + state_columns(p, o), p.seqlen); w0 += p.chunk) {
    const int64_t w1 = min(min(w0 + p.chunk, t1 + state_columns(p, o)), p.seqlen);
    __syncthreads();
#pragma unroll 1
    for (int64_t t = w0 + line; t < w1 && d < p.dim; t += lines) {
      const int id = p.seq_idx.at(b, t);
      F dz = 0, dpost = 0;
      if (id >= 0) {
        const F z = pre_activation<true>(p, o, b, d, t, id);
        const F dout = to_compute(*p.dout.at(b, d, t));
        const F gate = p.post_gate.given() ? to_compute(*p.post_gate.at(b, d, t)) : F(1);
        dz = p.gradient(z, multiply(dout, gate));
        dpost = multiply(dout, p.silu ? silu<T>(z) : z);
      }
      dz_of[at(t - w0)] = dz;
      if (w0 == t0 && p.dpost_gate.given()) *p.dpost_gate.at(b, d, t) = from_compute<T>(dpost);
    }
    __syncthreads();
#pragma unroll 1
    for (int64_t i = line; i < count; i += lines) {
      const auto dz = [&](int64_t t) { return dz_of[at(t - w0)]; };
      const int id = p.seq_idx.at(b, t0 + i);
      const int64_t from = max(w0, t0 + i);
      dx_of[at(i)] = correlate_any(p, o, b, d, t0 + i, id, from, w1, dx_of[at(i)], dz);
    }
    if (w0 == t0 && p.partials != nullptr) {
      for (int k = 0; k <= p.width; ++k) {
        F sum = 0;
#pragma unroll 1
        for (int64_t i = line; i < count; i += lines) {
          const int64_t t = t0 + i, s = t - (p.width - 1 - k) * o.dilation;
          const int id = p.seq_idx.at(b, t);
          if (id < 0) continue;  // there x may be anything
          if (k == p.width) {
            sum += dz_of[at(i)];
          } else if (o.bounds != nullptr || p.seq_idx.takes(b, s, id)) {
            sum = fma(dz_of[at(i)], tap<true>(p, o, b, d, s, id), sum);
          }
        }
        sum = sum_of_lines(sum, channels);
        if (static_cast<int>(threadIdx.x) < channels && d < p.dim) *p.partial(part, k, d) = sum;
      }
    }
  }
#pragma unroll 1
  for (int64_t i = line; i < count; i += lines) {
    const int64_t s = t0 + i;
    const int id = p.seq_idx.at(b, s);
    const F sum = dx_of[at(i)];
    const int64_t row = o.bounds == nullptr ? b : id;
    store_dx(p, b, d, s, id >= 0, id < 0 ? F(0) : sum + dfinal_at(p, o, row, b, d, s));
  }
}

}  // namespace causal_conv1d::gpu
