// The update of any size, strides and type: see update.cuh.
#pragma once

#include <type_traits>

#include "shared_rows.cuh"
#include "taps.cuh"

namespace causal_conv1d::gpu {

// All outputs of channel d of a batch entry. start: where token 0 goes in a ring.
template <typename T>
__device__ __forceinline__ void write_outputs(const UpdateArgs<T>& p, int64_t row, int64_t b,
                                              int64_t d, int64_t start) {
  using F = Compute<T>;
  const int64_t S = p.state_len, L = p.seqlen;
  const bool ring = p.cache_seqlens.data != nullptr;
  const F bias = load_bias(p, d);
  for (int64_t t = 0; t < L; ++t) {
    F z = convolve_any(p, d, bias, [&](int k) {
      const int64_t s = t - (p.width - 1) + k;
      int64_t j = ring ? start + s : S + s;
      if (ring && j < 0) j += S;
      return s >= 0 ? to_compute(*p.x.at(b, d, s)) : p.state.load(row, d, j);
    });
    if (p.silu) z = silu<T>(z);
    *p.out.at(b, d, t) = from_compute<T>(z);
  }
}

template <typename T, bool INDEXED>
__global__ void __launch_bounds__(kThreads, (sizeof(T) == 8 ? 10 : 12) - 2 * INDEXED)
    update_any(const UpdateArgs<T> p) {
  int64_t d;
  int64_t b = split(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                    INDEXED ? p.columns : p.dim, &d);
  if (b >= p.batch) return;
  const bool inside = !INDEXED || d < p.dim;  // else the thread only looks at indices
  if (!inside) d = 0;
  [[maybe_unused]] const std::conditional_t<INDEXED, SharedRows<1>, NoSharedRows> shared_rows(p);
  int64_t row = INDEXED ? p.state_row(b, d, 1) : b;
  if (row < 0) return;
  const int64_t S = p.state_len, L = p.seqlen;
  const bool ring = p.cache_seqlens.data != nullptr;
  bool shared = false;
  if constexpr (INDEXED) {
    const int rows[1] = {static_cast<int>(row & 0x7fffffff)};
    shared = shared_rows.seen(p, b, rows);
    if (!inside || (shared && p.find(row, int64_t(0), b) < b)) return;
  }
  int64_t start = 0;
#pragma unroll 1
  for (;;) {
    if (INDEXED) asm volatile("" : "+l"(d), "+l"(row));  // as above
    if (ring && S > 0) start = p.ring_start(b);
    write_outputs(p, row, b, d, start);
    if (!INDEXED || !shared) break;
    const int64_t next = p.find(row, b + 1, p.batch);
    if (next >= p.batch) break;
    b = next;
  }
  if (ring) {
    for (int64_t t = L > S ? L - S : 0; t < L; ++t) {
      p.state.store(to_compute(*p.x.at(b, d, t)), row, d, (start + t) % S);
    }
  } else {
    for (int64_t j = 0; j < S; ++j) {
      const bool old = j + L < S;
      p.state.store(old ? p.state.load(row, d, j + L) : to_compute(*p.x.at(b, d, j + L - S)), row,
                    d, j);
    }
  }
}

}  // namespace causal_conv1d::gpu
