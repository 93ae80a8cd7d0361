// The update of any size, strides and type: see update.cuh.
#pragma once

#include "shared_rows.cuh"
#include "taps.cuh"

namespace causal_conv1d::gpu {

// All outputs of channel d of a batch entry. start: where token 0 goes in a ring.
template <typename T>
__device__ __forceinline__ void write_outputs(const UpdateArgs<T>& p, int64_t row, int64_t b,
                                              int64_t d, int64_t start) {
  using F = Compute<T>;
  const int64_t S = p.state_len;
  const F bias = load_bias(p, d);
#pragma unroll 1
  for (int64_t t = 0; t < p.seqlen; ++t) {
    F z = convolve_any<1>(p, d, bias, [&](int k) {
      const int64_t s = t - (p.width - 1) + k;
      int64_t j = p.is_ring() ? start + s : S + s;
      if (p.is_ring() && j < 0) j += S;
      return s >= 0 ? to_compute(*p.x.at(b, d, s)) : p.state.load(row, d, j);
    });
    if (p.silu) z = silu<T>(z);
    *p.out.at(b, d, t) = from_compute<T>(z);
  }
}

// Channel d of batch entry b and, if it is the first one with its row, of all others with that:
// their outputs before the state, from which they read.
template <typename T>
__device__ __forceinline__ void update_channel(const UpdateArgs<T>& p, int64_t row, int64_t b,
                                               int64_t d, bool shared) {
  if (shared && p.find(row, 0, b) < b) return;
  const int64_t S = p.state_len, L = p.seqlen;
  int64_t start = 0;
#pragma unroll 1
  for (;;) {
    opaque(d, row);  // or addresses would be kept in registers
    if (p.is_ring() && S > 0) start = p.ring_start(b, S);
    write_outputs(p, row, b, d, start);
    if (!shared) break;
    const int64_t next = p.find(row, b + 1, p.batch);
    if (next >= p.batch) break;
    b = next;
  }
  if (p.is_ring()) {
#pragma unroll 1
    for (int64_t t = L > S ? L - S : 0; t < L; ++t) {
      p.state.store(to_compute(*p.x.at(b, d, t)), row, d, (start + t) % S);
    }
  } else {
#pragma unroll 1
    for (int64_t j = 0; j < S; ++j) {
      const bool old = j + L < S;
      p.state.store(old ? p.state.load(row, d, j + L) : to_compute(*p.x.at(b, d, j + L - S)), row,
                    d, j);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 8) update_any(const UpdateArgs<T> p) {
  int64_t d;
  const int64_t b = split(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, p.columns, &d);
  if (b >= p.batch) return;
  bool shared = false;
  int64_t row = b;
  if (p.conv_state_indices.data != nullptr) {  // a block has channels of one batch entry
    const SharedRows<1> shared_rows(p);
    const int64_t index = p.conv_state_indices.at(b);
    row = p.row_of(index);
    if (row < 0) {
      if (d < p.dim) p.write_without_row(index, b, d, 1);
      return;
    }
    const int rows[1] = {static_cast<int>(row & 0x7fffffff)};
    shared = shared_rows.seen(p, b, 1, rows);
  }
  if (d < p.dim) update_channel(p, row, b, d, shared);
}

}  // namespace causal_conv1d::gpu
