// The update where the inputs of a channel are adjacent in memory, by way of shared memory: see
// update.cuh.
#pragma once

#include "parameters.cuh"
#include "update_any.cuh"
#include "variants.cuh"

namespace causal_conv1d::gpu {

extern __shared__ uint4 staged_memory[];  // x, which out replaces, and the states of the channels

// Starts to copy so many bytes, a multiple of 16.
__device__ __forceinline__ void stage(void* to, const void* from, int bytes) {
#pragma unroll 1
  for (int i = threadIdx.x * 16; i < bytes; i += kThreads * 16) {
    copy_async_or_zero<16>(true, shared_address(static_cast<char*>(to) + i),
                           static_cast<const char*>(from) + i);
  }
}
__device__ __forceinline__ void unstage(void* to, const void* from, int bytes) {
#pragma unroll 1
  for (int i = threadIdx.x * 16; i < bytes; i += kThreads * 16) {
    *reinterpret_cast<uint4*>(static_cast<char*>(to) + i) =
        *reinterpret_cast<const uint4*>(static_cast<const char*>(from) + i);
  }
}

// A channel's x, which becomes out, and its state, which takes x in.
template <typename T>
__device__ __forceinline__ void update_in_place(const UpdateArgs<T>& p, int64_t d, T* x, T* state,
                                                int start) {
  constexpr int WMAX = 4, H = WMAX - 1;
  const int S = static_cast<int>(p.state_len), L = static_cast<int>(p.seqlen);
  const int first = WMAX - p.width;
  const Parameters<WMAX, 1> parameters(p, d);
  float w[WMAX][1], bias[1], h[WMAX] = {};
#pragma unroll
  for (int k = 0; k < H; ++k) {
    int j = start - H + k;  // from the oldest one on, modulo S
    j += j < 0 ? S : 0;
    if (k >= first) h[k] = to_compute(state[j]);
  }
  parameters.get(p.scale, w, bias);
  int to = start;
  if (!p.is_ring()) {
    to = max(S - L, 0);
#pragma unroll 1
    for (int j = 0; j < to; ++j) state[j] = state[j + L];
  }
#pragma unroll 1
  for (int t = 0; t < L; ++t) {
    const T token = x[t];
    h[H] = to_compute(token);
    float z =
        convolve<WMAX>(bias[0], first, [&](int k) { return w[k][0]; }, [&](int k) { return h[k]; });
    if (p.silu) z = silu<T>(z);
    x[t] = from_compute<T>(z);
    if (p.is_ring()) {
      state[to] = token;
      to = to + 1 < S ? to + 1 : 0;
    } else if (t >= L - S) {
      state[to++] = token;
    }
#pragma unroll
    for (int k = 0; k < H; ++k) h[k] = h[k + 1];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kAtMost<12>) update_staged(const UpdateArgs<T> p) {
  if (kSmallPtx) return;
  uint32_t part;
  const int64_t b = split(blockIdx.x, p.by_column, &part);
  const int64_t d0 = int64_t(part) * p.channels;
  const int channels = static_cast<int>(min(p.dim - d0, int64_t(p.channels)));
  const int x_bytes = channels * static_cast<int>(p.seqlen * sizeof(T));
  const int state_bytes = channels * static_cast<int>(p.state_len * sizeof(T));
  T* const x = reinterpret_cast<T*>(staged_memory);
  T* const states = x + p.channels * p.seqlen;
  pdl_wait();
  pdl_launch();
  const bool indexed = p.conv_state_indices.data != nullptr;
  const SharedRows<1> shared_rows(p);
  const int64_t index = indexed ? p.conv_state_indices.at(b) : b;
  stage(x, p.x.at(b, d0, 0), x_bytes);
  const int64_t row = indexed ? p.row_of(index) : index;
  if (row < 0) {
#pragma unroll 1
    for (int d = threadIdx.x; d < channels; d += kThreads) {
      p.write_without_row(index, b, d0 + d, 1);
    }
    commit_copies();
    wait_for_copies<0>();
    return;
  }
  T* const state = static_cast<T*>(p.state.data) + row * p.state.strides[0] + d0 * p.state_len;
  stage(states, state, state_bytes);
  const int start = p.is_ring() ? p.ring_start(b, p.state_len) : 0;
  commit_copies();
  bool shared = false;
  if (indexed) {
    const int rows[1] = {static_cast<int>(row & 0x7fffffff)};
    shared = shared_rows.seen(p, b, 1, rows);
  }
  wait_for_copies<0>();
  __syncthreads();
  if (shared) {
#pragma unroll 1
    for (int d = threadIdx.x; d < channels; d += kThreads) {
      update_channel(p, row, b, d0 + d, true);
    }
    return;
  }
#pragma unroll 1
  for (int d = threadIdx.x; d < channels; d += kThreads) {
    update_in_place(p, d0 + d, x + d * p.seqlen, states + d * p.state_len, start);
  }
  __syncthreads();
  unstage(p.out.at(b, d0, 0), x, x_bytes);
  unstage(state, states, state_bytes);
}

}  // namespace causal_conv1d::gpu
