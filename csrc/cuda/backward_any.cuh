// What the backward's other kernels leave, for any width, strides and type: one output per thread,
// which computes dz again for each.
#pragma once

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

// dx at s, which lies before the sequence for dinitial_states, without dfinal_states.
template <typename T>
__device__ Compute<T> dx_at(const BackwardArgs<T>& p, int64_t b, int64_t d, int64_t s) {
  Compute<T> a = 0;
  for (int j = 0; j < p.width; ++j) {
    const int64_t t = s + j;
    if (t < 0 || t >= p.seqlen) continue;
    if (!p.seq_idx.takes(b, s, p.seq_idx.at(b, t))) continue;
    a = fma(p.weight.load(d, p.width - 1 - j) * p.scale, dz_at<false>(p, AnyOptions{}, b, d, t), a);
  }
  return a;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_initial_states(const BackwardArgs<T> p) {
  int64_t d, j;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = split(split(n, p.width - 1, &j), p.dim, &d);
  if (b >= p.batch) return;
  const int64_t s = j - (p.width - 1);
  const Compute<T> sum = dx_at(p, b, d, s);
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
    opaque(d);  // or what is the same for all steps would be kept in registers
    const int place = i / states, j = i - place * states;
    const int64_t s = j + (place == 0 ? 0 : (place == 1 ? end : p.seqlen)) - states;
    if (place == 0 ? !p.dinitial_states.given() : s < (place == 1 ? 0 : end)) continue;
    const Compute<T> sum = dx_at(p, b, d, s) + p.dfinal(b, d, s, end);
    if (place == 0) {
      p.dinitial_states.store(sum, b, d, j);
    } else {
      *p.dx.at(b, d, s) = from_compute<T>(sum);
    }
  }
}

// The sum of v over the threads of a block that have a channel, for those of its first line.
template <typename F>
__device__ __forceinline__ F sum_of_lines(F v, int channels) {
  __shared__ F of_thread[kThreads];
  __syncthreads();
  of_thread[threadIdx.x] = v;
  for (int n = kThreads / 2; n >= channels; n /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < n) {
      of_thread[threadIdx.x] += of_thread[threadIdx.x + n];
    }
  }
  return of_thread[threadIdx.x];
}

}  // namespace causal_conv1d::gpu
