// The backward for any width, strides, type and options: one output per thread, which computes dz
// again for each; and what the other kernels leave to it.
#pragma once

#include <cub/block/block_reduce.cuh>

#include "backward.cuh"
#include "forward_any.cuh"

namespace causal_conv1d::gpu {

template <bool OPTIONS, typename T>
__device__ Compute<T> dz_at(const BackwardArgs<T>& p, const AnyOptions& o, int64_t b, int64_t d,
                            int64_t t) {
  const int id = p.seq_idx.at(b, t);
  if (id < 0) return 0;
  const Compute<T> z = pre_activation<OPTIONS>(p, o, b, d, t, id);
  Compute<T> g = to_compute(*p.dout.at(b, d, t));
  if (OPTIONS && p.post_gate.given()) g = multiply(g, to_compute(*p.post_gate.at(b, d, t)));
  return p.gradient(z, g);
}

// dx' at s, which lies before the sequence for dinitial_states, without dfinal_states. row: of the
// states, for s before the sequence.
template <bool OPTIONS, typename T>
__device__ Compute<T> dx_at(const BackwardArgs<T>& p, const AnyOptions& o, int64_t row, int64_t b,
                            int64_t d, int64_t s) {
  const bool packed = OPTIONS && o.bounds != nullptr;
  const int64_t begin = packed && s < o.begin(row) ? o.begin(row) : 0;
  Compute<T> a = 0;
  for (int j = 0; j < p.width; ++j) {
    const int64_t t = s + (OPTIONS ? j * o.dilation : int64_t(j));
    if (t < begin || t >= p.seqlen) continue;
    const int id = p.seq_idx.at(b, t);
    if (packed ? id != row : !p.seq_idx.takes(b, s, id)) continue;
    a = fma(p.weight.load(d, p.width - 1 - j) * p.scale, dz_at<OPTIONS>(p, o, b, d, t), a);
  }
  return a;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_any_width(const BackwardArgs<T> p, bool dim_fastest) {
  int64_t b, d, s;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (dim_fastest) {
    b = split(split(n, p.dim, &d), p.seqlen, &s);
  } else {
    b = split(split(n, p.seqlen, &s), p.dim, &d);
  }
  if (b >= p.batch) return;
  const Compute<T> sum = dx_at<false>(p, AnyOptions{}, b, b, d, s);
  *p.dx.at(b, d, s) = from_compute<T>(sum + p.dfinal(b, d, s));
}

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

// With options: dx, dpre_gate and dpost_gate of all steps; or dinitial_states, and dx and dpre_gate
// of the steps that take dfinal_states.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    backward_any_options(const BackwardArgs<T> p, const AnyOptions o, Steps steps) {
  int64_t row, b, d, s;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool packed = o.bounds != nullptr;
  int64_t initial = -1;  // the column of dinitial_states
  if (steps == Steps::kOfStates) {
    const int64_t states = state_columns(p, o);
    row = split(split(n, 2 * states, &s), p.dim, &d);
    if (row >= o.rows) return;
    b = packed ? 0 : row;
    if (s < states) {
      if (!p.dinitial_states.given()) return;
      initial = s;
      s += o.begin(row) - states;
    } else {
      s += o.end(row, p.seqlen) - 2 * states;
      if (!p.dfinal_states.given() || s < o.begin(row)) return;
    }
  } else {
    if (steps == Steps::kAlongChannels) {
      b = split(split(n, p.dim, &d), p.seqlen, &s);
    } else {
      b = split(split(n, p.seqlen, &s), p.dim, &d);
    }
    if (b >= p.batch) return;
    row = packed ? p.seq_idx.at(0, s) : b;
  }
  const int id = initial < 0 ? p.seq_idx.at(b, s) : 0;
  Compute<T> sum = 0;
  if (id >= 0) sum = dx_at<true>(p, o, row, b, d, s) + dfinal_at(p, o, row, b, d, s);
  if (initial >= 0) {
    p.dinitial_states.store(sum, row, d, initial);
    return;
  }
  store_dx(p, b, d, s, id >= 0, sum);
  if (steps == Steps::kOfStates || !p.dpost_gate.given()) return;
  Compute<T> y = 0;
  if (id >= 0) {
    y = pre_activation<true>(p, o, b, d, s, id);
    if (p.silu) y = silu<T>(y);
    y = multiply(y, to_compute(*p.dout.at(b, d, s)));
  }
  *p.dpost_gate.at(b, d, s) = from_compute<T>(y);
}

// Without options.
template <typename T>
__global__ void __launch_bounds__(kThreads) backward_initial_states(const BackwardArgs<T> p) {
  int64_t d, j;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = split(split(n, p.width - 1, &j), p.dim, &d);
  if (b >= p.batch) return;
  const int64_t s = j - (p.width - 1);
  const Compute<T> sum = dx_at<false>(p, AnyOptions{}, b, b, d, s);
  p.dinitial_states.store(sum + p.dfinal(b, d, s), b, d, j);
}

// dinitial_states where seq_idx and dfinal_states are given, and dx of rows with padding among
// their last W-1 steps: the other kernels add dfinal_states to it in the wrong places, so it is
// computed again in these and in the right ones. A block has channels of one row, and every
// `slots`-th of these steps.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    backward_padded_ends(const BackwardArgs<T> p, int slots) {
  pdl_wait();
  pdl_launch();
  int64_t d, slot;
  const int64_t b = split(split(blockIdx.x, slots, &slot), ceil_div(p.dim, kThreads), &d);
  d = d * kThreads + threadIdx.x;
  const int states = p.width - 1;
  bool padded = false;
  for (int64_t i = 1 + threadIdx.x % 32; i <= min(p.seqlen, int64_t(states)); i += 32) {
    padded |= p.seq_idx.at(b, p.seqlen - i) < 0;
  }
  padded = __any_sync(0xffffffff, padded);
  if (!padded && !p.dinitial_states.given()) return;
  const int64_t end = padded ? p.seq_idx.end(b, p.seqlen) : p.seqlen;
  if (d >= p.dim) return;
  // Before the row, where dfinal_states goes, and where it went.
  for (int i = static_cast<int>(slot); i < (padded ? 3 : 1) * states; i += slots) {
    asm volatile("" : "+l"(d));  // or what is the same for all steps would be kept in registers
    const int place = i / states, j = i - place * states;
    const int64_t s = j + (place == 0 ? 0 : (place == 1 ? end : p.seqlen)) - states;
    if (place == 0 ? !p.dinitial_states.given() : s < (place == 1 ? 0 : end)) continue;
    const Compute<T> sum = dx_at<false>(p, AnyOptions{}, b, b, d, s) + p.dfinal(b, d, s, end);
    if (place == 0) {
      p.dinitial_states.store(sum, b, d, j);
    } else {
      *p.dx.at(b, d, s) = from_compute<T>(sum);
    }
  }
}

// A block per (part, d): the sums of one chunk of one row.
template <bool OPTIONS, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_any_width_partials(const BackwardArgs<T> p, const AnyOptions o) {
  using BlockReduce = cub::BlockReduce<Compute<T>, kThreads>;
  __shared__ typename BlockReduce::TempStorage storage;
  int64_t d, chunk;
  const int64_t part = split(blockIdx.x, p.dim, &d);
  const int64_t b = split(part, p.chunks, &chunk);
  const int64_t t0 = chunk * p.chunk, t1 = min(t0 + p.chunk, p.seqlen);
  for (int k = 0; k <= p.width; ++k) {
    const int64_t back = p.width - 1 - k;
    Compute<T> sum = 0;
    for (int64_t t = t0 + threadIdx.x; t < t1; t += kThreads) {
      const int id = p.seq_idx.at(b, t);
      if (id < 0) continue;  // there x may be anything
      const Compute<T> dz = dz_at<OPTIONS>(p, o, b, d, t);
      if (k == p.width) {
        sum += dz;
        continue;
      }
      const int64_t s = t - (OPTIONS ? back * o.dilation : back);
      const bool has_state = OPTIONS && o.bounds != nullptr;
      if (has_state || p.seq_idx.takes(b, s, id)) {
        sum = fma(dz, tap<OPTIONS>(p, o, b, d, s, id), sum);
      }
    }
    sum = BlockReduce(storage).Sum(sum);
    __syncthreads();
    if (threadIdx.x == 0) *p.partial(part, k, d) = sum;
  }
}

}  // namespace causal_conv1d::gpu
