// The forward of channel-last tensors: see forward.cuh.
#pragma once

#include "forward.cuh"
#include "parameters.cuh"
#include "states.cuh"
#include "taps.cuh"

namespace causal_conv1d::gpu {

template <int WMAX>
constexpr int kBurst = WMAX == 8 ? 8 : 16;  // steps that a thread loads at once,
template <int WMAX>
constexpr int kChunk = WMAX == 8 ? 32 : 16;  // and in all

// A thread's columns over its chunk.
template <typename K>
class ForwardColumns {
  using T = typename K::Element;
  using Args = ForwardArgs<T>;
  static constexpr int C = K::C, H = K::H, WMAX = K::WMAX;

 public:
  __device__ __forceinline__ ForwardColumns(const Args& p, int64_t b, int64_t d0, int64_t t0)
      : p_(p),
        b_(b),
        d0_(d0),
        t0_(t0),
        first_(K::EXACT ? 0 : WMAX - p.width),
        x_(p.x.at(b, d0, t0)),
        out_(p.out.at(b, d0, t0)) {}

  // Starts to bring the rows of the first burst to L2.
  __device__ __forceinline__ void prefetch_burst() const {
    for (int u = 0; u < kBurst<WMAX>; ++u) prefetch_l2(x_ + u * p_.x.time);
  }

  // The whole chunk, which has one id. full: the warp has 32 columns.
  __device__ __forceinline__ void whole(bool full) {
    constexpr int N = kBurst<WMAX>;
    Rows<N> next = load<N>(N);
    // What a warp loads later comes as far as L2 now, a row per lane, in sectors of 32 bytes. fp32
    // has enough in flight without, and is slower with it.
    if (sizeof(T) == 2 && N < kChunk<WMAX> && full) {
      const int lane = threadIdx.x % 32;
      const T* row = p_.x.at(b_, d0_ - lane * C, t0_ + N + lane);
#pragma unroll
      for (int i = 0; i < C * static_cast<int>(sizeof(T)); ++i) {
        if (lane < kChunk<WMAX> - N) prefetch_l2(row + i * (32 / sizeof(T)));
      }
    }
    float w[WMAX][C], bias[C], h[H][C];
    start(w, bias, h);
#pragma unroll 1
    for (int t = 0; t < kChunk<WMAX>; t += N) {
      const Rows<N> rows = next;
      if (t + N < kChunk<WMAX>) next = load<N>(N);
      steps<false>(t, N, rows, w, bias, h);
    }
  }

  // `count` steps, which may have several ids.
  __device__ __forceinline__ void any(int count) {
    float w[WMAX][C], bias[C], h[H][C];
    start(w, bias, h);
#pragma unroll 1
    for (int t = 0; t < count; t += WMAX) {
      steps<true>(t, count - t, load<WMAX>(count - t), w, bias, h);
    }
  }

 private:
  template <int N>
  struct Rows {  // an array that a function can return
    Pack<T, C> of[N];
  };

  // The next N rows, of which count are inside.
  template <int N>
  __device__ __forceinline__ Rows<N> load(int count) {
    Rows<N> rows;
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (u < count) rows.of[u] = Pack<T, C>::load(x_);
      x_ += p_.x.time;
    }
    return rows;
  }

  // h: the inputs before the next row.
  __device__ __forceinline__ void start(float (&w)[WMAX][C], float (&bias)[C],
                                        float (&h)[H][C]) const {
    const History<T, H, C> history(p_, b_, d0_, t0_);
    const Parameters<WMAX, C> parameters(p_, d0_);
    history.get(p_, b_, d0_, t0_, h);
    parameters.get(p_.scale, w, bias);
  }

  // Those rows, at t0 + t. EDGE: count of them are inside, and they may have several ids.
  template <bool EDGE, int N>
  __device__ __forceinline__ void steps(int t, int count, const Rows<N>& rows,
                                        const float (&w)[WMAX][C], const float (&bias)[C],
                                        float (&h)[H][C]) {
    constexpr bool MIXED = K::SEQ && EDGE;
    float v[H + N][C];
    IdMatches<N, H> same;
#pragma unroll
    for (int j = 0; j < H; ++j) {
#pragma unroll
      for (int c = 0; c < C; ++c) v[j][c] = h[j][c];
    }
    if (MIXED) load_ids(p_.seq_idx.from(b_, 0), t0_ + t - H, p_.seqlen, same.id);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      float z[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        v[H + u][c] = rows.of[u].get(c);
        z[c] = convolve<WMAX>(
            bias[c], first_, [&](int k) { return w[k][c]; },
            [&](int k) { return !MIXED || same.takes(u, k) ? v[u + k][c] : 0.0f; });
      }
      if (p_.silu) {
#pragma unroll
        for (int c = 0; c < C; ++c) z[c] = silu<T>(z[c]);
      }
      if (MIXED && same.is_padding(u)) {
#pragma unroll
        for (int c = 0; c < C; ++c) z[c] = 0.0f;
      }
      if (!EDGE || u < count) pack<T>(z).store(out_);
      out_ += p_.out.time;
    }
#pragma unroll
    for (int j = 0; j < H; ++j) {
#pragma unroll
      for (int c = 0; c < C; ++c) h[j][c] = v[N + j][c];
    }
  }

  const Args& p_;
  int64_t b_, d0_, t0_;
  int first_;
  const T* x_;  // the next row
  T* out_;
};

template <typename K>
constexpr int kForwardLastBlocks = sizeof(typename K::Element) == 4 && K::WMAX == 4 ? 6 : 5;

template <typename K>
__global__ void __launch_bounds__(kThreads, kForwardLastBlocks<K>)
    forward_channel_last(const ForwardArgs<typename K::Element> p) {
  if (kSmallPtx && !K::kAnyStride) return;
  constexpr int N = kChunk<K::WMAX>;
  const ColumnChunk at(p.columns);
  [[maybe_unused]] const int lanes = __popc(__ballot_sync(0xffffffff, at.inside));
  if (!at.inside || at.b >= p.batch) return;
  // The last chunk may overlap the one before it: both write the same there.
  const int64_t t0 = max(min(int64_t(at.chunk) * N, p.seqlen - N), int64_t(0));
  ForwardColumns<K> columns(p, at.b, int64_t(at.column) * K::C, t0);
  pdl_wait();
  if (gridDim.x > kManyBlocks) pdl_launch();

  const bool one_chunk = p.columns.bits == 5;  // per warp
  const int count = static_cast<int>(min(p.seqlen, int64_t(N)));
  bool plain = count == N && !K::SEQ;
  // Where a warp has one chunk, it is quick to tell whether that has one id.
  if (K::SEQ && count == N && one_chunk) {
    columns.prefetch_burst();  // while the ids come
    const int before = static_cast<int>(min(t0, int64_t(K::H)));
    plain = one_id(p.seq_idx.from(at.b, t0), -before, N, lanes);
  }
  if (plain) {
    columns.whole(lanes == 32 && one_chunk);
  } else {
    columns.any(count);
  }
}

}  // namespace causal_conv1d::gpu
