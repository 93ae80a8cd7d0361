// The update where channels are adjacent in memory: see update.cuh.
#pragma once

#include "parameters.cuh"
#include "update_any.cuh"
#include "variants.cuh"

namespace causal_conv1d::gpu {

// A variant of update_rows, for states of S inputs.
template <typename T, int S_>
struct Rows {
  using Element = T;
  static constexpr int C = 8 / sizeof(T), S = S_, WMAX = 4;
  static constexpr int N = 4;  // tokens that are loaded at once
  static constexpr int kBlocks = S == 4 ? 6 : 7;
};

// The next tokens, of which `count` are there: outputs, and the state in order of time.
template <typename K, typename T>
__device__ __forceinline__ void take_tokens(const UpdateArgs<T>& p, int64_t b, int64_t d0,
                                            int64_t t, int count, const Pack<T, K::C> (&x)[K::N],
                                            const float (&w)[K::WMAX][K::C],
                                            const float (&bias)[K::C],
                                            Pack<T, K::C> (&state)[K::S]) {
  constexpr int C = K::C, S = K::S;
  const int first = K::WMAX - p.width;
#pragma unroll
  for (int u = 0; u < K::N; ++u) {
    if (u >= count) break;
    float z[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      z[c] = convolve<K::WMAX>(
          bias[c], first, [&](int k) { return w[k][c]; },
          [&](int k) { return k < 3 ? state[S - 3 + k].get(c) : x[u].get(c); });
    }
    if (p.silu) {
#pragma unroll
      for (int c = 0; c < C; ++c) z[c] = silu<T>(z[c]);
    }
    pack<T>(z).store(p.out.at(b, d0, t + u));
#pragma unroll
    for (int j = 0; j < S; ++j) state[j] = j + 1 < S ? state[(j + 1) % S] : x[u];
  }
}

template <typename K>
__global__ void __launch_bounds__(kThreads, K::kBlocks)
    update_rows(const UpdateArgs<typename K::Element> p) {
  if (kSmallPtx) return;
  using T = typename K::Element;
  constexpr int C = K::C, S = K::S, N = K::N;
  using Row = Pack<T, C>;
  uint32_t column;
  const int64_t b = split(blockIdx.x * kThreads + threadIdx.x, p.by_column, &column);
  if (b >= p.batch) return;
  const bool inside = int64_t(column) * C < p.dim, indexed = p.conv_state_indices.data != nullptr;
  int64_t d0 = inside ? int64_t(column) * C : 0;
  pdl_wait();
  pdl_launch();
  // All that needs no index of the state first: nothing waits in between.
  const int64_t index = indexed ? p.conv_state_indices.at(b) : b;
  const SharedRows<1> shared_rows(p);
  const int start = p.is_ring() ? p.ring_start(b, S) : 0;
  Row x[N], state[S];
  const auto load_tokens = [&](int64_t t) {
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (t + u < p.seqlen) x[u] = Row::load(p.x.at(b, d0, t + u));
    }
  };
  load_tokens(0);
  const Parameters<K::WMAX, C> parameters(p, d0);
  const int64_t row = indexed ? p.row_of(index) : index;
  if (row < 0) {
    if (inside) p.write_without_row(index, b, d0, C);
    return;
  }
  T* const at = static_cast<T*>(p.state.data) + row * p.state.strides[0] + d0;
#pragma unroll
  for (int j = S - 3; j < S; ++j) {  // an older one is not needed
    const int from = start + j < S ? start + j : start + j - S;
    state[j] = Row::load(at + from * p.state.strides[2]);
  }
  if (indexed) {
    const int rows[1] = {static_cast<int>(row & 0x7fffffff)};
    if (shared_rows.seen(p, b, 1, rows)) {
      if (!inside) return;
#pragma unroll 1
      for (int c = 0; c < C; ++c) update_channel(p, row, b, d0 + c, true);
      return;
    }
  }
  if (!inside) return;
  float w[K::WMAX][C], bias[C];
  parameters.get(p.scale, w, bias);
#pragma unroll 1
  for (int64_t t = 0; t < p.seqlen; t += N) {
    if (t > 0) load_tokens(t);
    const int count = static_cast<int>(min(p.seqlen - t, int64_t(N)));
    take_tokens<K>(p, b, d0, t, count, x, w, bias, state);
  }
  // The oldest of a ring is where the next token goes; what was there before is there already.
  const int end = p.is_ring() ? static_cast<int>((start + p.seqlen) % S) : 0;
#pragma unroll
  for (int j = 0; j < S; ++j) {
    if (p.is_ring() && j + p.seqlen < S) continue;
    const int to = end + j < S ? end + j : end + j - S;
    state[j].store(at + to * p.state.strides[2]);
  }
}

}  // namespace causal_conv1d::gpu
