// The pool where channels are adjacent in memory: see pool.cuh.
#pragma once

#include "parameters.cuh"
#include "pool.cuh"
#include "variants.cuh"

namespace causal_conv1d::gpu {

// Variants of pool_sequences and pool_tiles.
template <typename T, int WMAX_>
struct Pool {
  using Element = T;
  static constexpr int WMAX = WMAX_, H = WMAX - 1, C = channels_per_thread(WMAX, sizeof(T));
  static constexpr int kTile = 16;  // tokens of a tile, at most
  static constexpr int N = 4;       // tokens of a sequence that are loaded at once
};

// Columns of the state of a sequence, of C adjacent channels.
template <typename K, typename T>
struct StateColumns {
  static constexpr int C = K::C, H = K::H;
  using Row = Pack<T, C>;
  T* data;
  int64_t stride;
  bool block;

  __device__ __forceinline__ StateColumns(const PoolArgs<T>& p, const Sequence<T>& s, int64_t d0)
      : data(static_cast<T*>(p.states.data) + s.slot * p.states.strides[0] +
             d0 * p.states.strides[1]),
        stride(p.states.strides[2]),
        block(H == 3 && p.access == StateAccess::kBlock) {}

  // The last inputs from `first` on.
  __device__ __forceinline__ void load(int first, int64_t column, Row (&h)[H]) const {
    if (block) {
      const auto all = Pack<T, C * 3>::load(data);
#pragma unroll
      for (int i = 0; i < C * 3; ++i) h[i % 3].set_element(i / 3, all.element(i));
      return;
    }
#pragma unroll
    for (int j = 0; j < H; ++j) {
      if (j >= first) h[j] = Row::load(data + (column + j - first) * stride);
    }
  }

  __device__ __forceinline__ void store(int first, const Row (&h)[H]) const {
    if (block) {
      Pack<T, C * 3> all;
#pragma unroll
      for (int i = 0; i < C * 3; ++i) all.set_element(i, h[i % 3].element(i / 3));
      all.store(data);
      return;
    }
#pragma unroll
    for (int j = 0; j < H; ++j) {
      if (j >= first) h[j].store(data + (j - first) * stride);
    }
  }

  // The state with num_accepted_tokens: the history and all tokens, but for the first inputs.
  __device__ __forceinline__ void store_all(const PoolArgs<T>& p, const Sequence<T>& s, int64_t d0,
                                            int first, const Row (&h)[H]) const {
    const int64_t shift = s.shift(p);
#pragma unroll
    for (int j = 0; j < H; ++j) {
      if (j - first >= shift) h[j].store(data + (j - first - shift) * stride);
    }
#pragma unroll 1
    for (int64_t n = max(shift, int64_t(p.width - 1)); n < shift + s.columns(p); ++n) {
      Row::load(p.x.at(0, d0, s.begin + n - (p.width - 1))).store(data + (n - shift) * stride);
    }
  }
};

// The output of a token, of the inputs x(k, c).
template <typename K, typename T, typename X>
__device__ __forceinline__ Pack<T, K::C> output(const PoolArgs<T>& p,
                                                const float (&w)[K::WMAX][K::C],
                                                const float (&bias)[K::C], X&& x) {
  float z[K::C];
#pragma unroll
  for (int c = 0; c < K::C; ++c) {
    z[c] = convolve<K::WMAX>(
        bias[c], K::WMAX - p.width, [&](int k) { return w[k][c]; }, [&](int k) { return x(k, c); });
  }
  if (p.silu) {
#pragma unroll
    for (int c = 0; c < K::C; ++c) z[c] = silu<T>(z[c]);
  }
  return pack<T>(z);
}

// As begin_sequence() with any states; rare, so small.
template <int C, typename T>
__device__ __forceinline__ void begin_any(const PoolArgs<T>& p, const Sequence<T>& s, int64_t d0,
                                          int64_t count) {
  opaque(d0);  // or addresses would be kept in registers
#pragma unroll 1
  for (int64_t n = 0; n < count * C; ++n) {
    const int64_t d = d0 + n % C, t = n / C;
    float z = convolve_any<1>(p, d, load_bias(p, d), [&](int k) { return s.input(p, d, t + k); });
    if (p.silu) z = silu<T>(z);
    *p.out.at(0, d, s.begin + t) = from_compute<T>(z);
  }
  write_state<C>(p, s, d0);
}

// A sequence's first `count` tokens, and its state afterwards, which is not kAny. parameters(w,
// bias) gives the weights.
template <typename K, typename T, typename Parameters>
__device__ __forceinline__ void begin_sequence(const PoolArgs<T>& p, const Sequence<T>& s,
                                               int64_t d0, int64_t count, Parameters&& parameters) {
  constexpr int C = K::C, H = K::H, N = K::N;
  const int first = K::WMAX - p.width;
  const StateColumns<K, T> state(p, s, d0);
  Pack<T, C> rows[N], h[H];
  const T* x = p.x.at(0, d0, s.begin);
  T* out = p.out.at(0, d0, s.begin);
  const auto load_tokens = [&](int64_t left) {
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (u < left) rows[u] = Pack<T, C>::load(x);
      x += p.x.time;
    }
  };
  load_tokens(count);
  if (s.has_state) state.load(first, s.first_column, h);
  const bool all = p.accepted.data != nullptr && !state.block;
  if (all) state.store_all(p, s, d0, first, h);
  float w[K::WMAX][C], bias[C];
  parameters(w, bias);
#pragma unroll 1
  for (int64_t left = count; left > 0;) {
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (u >= left) break;
      output<K>(p, w, bias, [&](int k, int c) {
        return k < H ? h[k % H].get(c) : rows[u].get(c);
      }).store(out);
      out += p.out.time;
#pragma unroll
      for (int j = 0; j < H; ++j) h[j] = j + 1 < H ? h[(j + 1) % H] : rows[u];
    }
    left -= N;
    if (left > 0) load_tokens(left);
  }
  if (all) return;
  if (count < s.end - s.begin) {
#pragma unroll
    for (int j = 0; j < H; ++j) {
      if (j >= first) h[j] = Pack<T, C>::load(p.x.at(0, d0, s.end - H + j));
    }
  }
  state.store(first, h);
}

template <int C, typename T>
__device__ __forceinline__ void write_zeros(const PoolArgs<T>& p, int64_t d0, int64_t from,
                                            int64_t to) {
#pragma unroll 1
  for (int64_t t = from; t < to; ++t) Pack<T, C>().store(p.out.at(0, d0, t));
}

template <typename K>
__global__ void __launch_bounds__(kThreads, 6)
    pool_sequences(const PoolArgs<typename K::Element> p) {
  if (kSmallPtx) return;
  using T = typename K::Element;
  const ColumnChunk at(p.columns);
  if (!at.inside) return;
  const int64_t d0 = int64_t(at.column) * K::C;
  pdl_wait();
  pdl_launch();
  const Sequence<T> s(p, int64_t(at.chunk) - 1);
  const Parameters<K::WMAX, K::C> parameters(p, d0);
  if (s.slot < 0) return write_zeros<K::C>(p, d0, s.begin, s.end);
  if (s.begin >= s.end) return;
  begin_sequence<K>(p, s, d0, s.end - s.begin,
                    [&](auto& w, auto& bias) { parameters.get(p.scale, w, bias); });
}

// The last sequence that begins at t or before. All lanes must call it.
template <typename T>
__device__ __forceinline__ int64_t find_sequence(const PoolArgs<T>& p, int64_t t) {
  int64_t below = -1, above = p.sequences + 1;
#pragma unroll 1
  while (above - below > 1) {
    const int64_t step = (above - below + 30) / 32;
    const int64_t i = below + (threadIdx.x % 32 + 1) * step;
    const int n = __popc(__ballot_sync(0xffffffff, i < above && p.start(i) <= t));
    above = min(above, below + (n + 1) * step);
    below += n * step;
  }
  return below;
}

// Of the tokens t0 .. t0 + count - 1 those that need no history, a bit for each, if t0 is in
// sequence i. Those that are skipped get zeros.
template <int C, typename T>
__device__ __forceinline__ uint32_t find_inner(const PoolArgs<T>& p, int64_t i, int64_t d0,
                                               int64_t t0, int64_t count) {
  uint32_t inner = 0;
#pragma unroll 1
  for (;; ++i) {
    const Sequence<T> s(p, i);
    int64_t from = max(s.begin - t0, int64_t(0));
    const int64_t to = min(s.end - t0, count);
    if (s.slot < 0) {
      write_zeros<C>(p, d0, t0 + from, t0 + to);
    } else {
      from = max(from, s.begin + p.width - 1 - t0);
      if (from < to) inner |= (1u << to) - (1u << from);
    }
    if (s.end - t0 >= count) return inner;
  }
}

template <typename K>
__global__ void __launch_bounds__(kThreads, 4) pool_tiles(const PoolArgs<typename K::Element> p) {
  if (kSmallPtx) return;
  using T = typename K::Element;
  constexpr int C = K::C, H = K::H, N = K::kTile;
  const ColumnChunk at(p.columns);
  if (at.chunk >= p.columns.chunks) return;
  const bool inside = at.column < p.columns.count;
  const int64_t d0 = inside ? int64_t(at.column) * C : 0, t0 = at.chunk * p.tile;
  const int count = static_cast<int>(min(p.tile, p.seqlen - t0));
  pdl_wait();
  Pack<T, C> rows[H + N];
  const T* row = p.x.at(0, d0, t0 - H);
#pragma unroll
  for (int j = 0; j < H + N; ++j) {
    if (t0 - H + j >= 0 && j < H + count) rows[j] = Pack<T, C>::load(row);
    row += p.x.time;
  }
  const Parameters<K::WMAX, C> parameters(p, d0);
  int64_t i = find_sequence(p, t0);
  if (!inside) return;
  uint32_t inner = (1u << count) - 1;
  const Sequence<T> first(p, i);
  const bool one =
      first.slot >= 0 && first.begin + max(p.width - 1, 1) <= t0 && first.end >= t0 + count;
  if (!one) inner = find_inner<C>(p, i, d0, t0, count);
  float w[K::WMAX][C], bias[C];
  parameters.get(p.scale, w, bias);
  T* out = p.out.at(0, d0, t0);
#pragma unroll
  for (int u = 0; u < N; ++u) {
    if (u % 4 == 0 && inner >> u == 0) break;
    output<K>(p, w, bias, [&](int k, int c) {
      return rows[u + k].get(c);
    }).store_if((inner >> u & 1) != 0, out);
    out += p.out.time;
  }
  if (one) return;
#pragma unroll 1
  for (; i <= p.sequences; ++i) {
    const Sequence<T> s(p, i);
    if (s.begin >= t0 + count) return;
    if (s.slot < 0 || s.begin < t0 || s.begin >= s.end) continue;
    const int64_t few = min(s.end - s.begin, int64_t(p.width - 1));
    if (p.access == StateAccess::kAny) {
      begin_any<C>(p, s, d0, few);
      continue;
    }
    begin_sequence<K>(p, s, d0, few, [&](auto& to_w, auto& to_bias) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        to_bias[c] = bias[c];
#pragma unroll
        for (int k = 0; k < K::WMAX; ++k) to_w[k][c] = w[k][c];
      }
    });
  }
}

}  // namespace causal_conv1d::gpu
