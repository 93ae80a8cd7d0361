// The forward of channel-last tensors: see forward.cuh.
#pragma once

#include "forward.cuh"
#include "parameters.cuh"
#include "seq_ids.cuh"
#include "states.cuh"
#include "taps.cuh"

namespace causal_conv1d::gpu {

// Steps that a thread has in flight, as many as registers allow, and in all.
template <typename K>
constexpr int kBurst = K::FUSED ? (K::WMAX == 8 ? 6 : 4) : (K::WMAX == 8 ? 12 : 16);
template <typename K>
constexpr int kChunk = K::WMAX == 4 ? 16 : (kBurst<K> % 6 == 0 ? 36 : 32);

// A thread's columns over its chunk.
template <typename K>
class ForwardColumns {
  using T = typename K::Element;
  using Args = ForwardArgs<T>;
  static constexpr int C = K::C, H = K::H, WMAX = K::WMAX, N = kBurst<K>;
  using Inputs = History<T, H, C, K::FUSED>;

 public:
  // The next rows of x and of what goes with it.
  template <int ROWS>
  struct Rows {
    using Row = Pack<T, C>;
    Row x[ROWS];
    Row pre_gate[K::FUSED ? ROWS : 1], post_gate[K::FUSED ? ROWS : 1];
    Row residual[K::FUSED ? ROWS : 1];
  };

  __device__ __forceinline__ ForwardColumns(const Args& p, int64_t b, int64_t d0, int64_t t0)
      : p_(p), b_(b), d0_(d0), t0_(t0), first_(K::EXACT ? 0 : WMAX - p.width) {
    go_to(0);
  }

  // The first rows of a whole chunk.
  __device__ __forceinline__ Rows<N> load_first() { return load<N>(N); }

  // The inputs before a chunk near the row's beginning: before the others, for fewer registers.
  __device__ __forceinline__ void load_first_inputs(float (&h)[H][C]) const {
    Inputs::load_first(p_, b_, d0_, t0_, h);
  }

  // Weights, and h: the inputs before the chunk.
  __device__ __forceinline__ void start(float (&w)[WMAX][C], float (&bias)[C],
                                        float (&h)[H][C]) const {
    const Inputs history(p_, b_, d0_, t0_);
    const Parameters<WMAX, C, K::EXACT, true> parameters(p_, d0_);
    history.get(p_, t0_, h);
    parameters.get(p_.scale, w, bias);
  }

  // The whole chunk, whose first rows are there. CUT: where ids begin, earlier inputs are dropped;
  // the warp's lanes have the same steps. Returns the first step that is not done: ids that come
  // back within W steps are left to any().
  template <bool CUT>
  __device__ __forceinline__ int whole(Rows<N>& rows, const float (&w)[WMAX][C],
                                       const float (&bias)[C], float (&h)[H][C]) {
#pragma unroll 1
    for (int t = 0; t < kChunk<K>; t += N) {
      IdCuts<N, H> cuts;
      if (CUT && !cuts.find(p_.seq_idx.from(b_, 0), t0_ + t, p_.seqlen)) return t;
      if constexpr (CUT) {
#pragma unroll
        for (int j = 0; j < H; ++j) {
          if (cuts.begins_after(j)) clear(h[j]);
        }
      }
      steps<CUT ? kCut : kPlain>(cuts, N, t + N < kChunk<K>, rows, w, bias, h);
    }
    return kChunk<K>;
  }

  // The steps from t on, of `count`, which may have any ids.
  __device__ __forceinline__ void any(int t, int count, const float (&w)[WMAX][C],
                                      const float (&bias)[C], float (&h)[H][C]) {
    go_to(t);
    if (t > 0) {  // whole() may have dropped some
      Inputs::load_first(p_, b_, d0_, t0_ + t, h);
      Inputs(p_, b_, d0_, t0_ + t).get(p_, t0_ + t, h);
    }
#pragma unroll 1
    for (; t < count; t += 4) {
      IdMatches<4, H> same;
      if (K::SEQ) load_ids(p_.seq_idx.from(b_, 0), t0_ + t - H, p_.seqlen, same.id);
      Rows<4> rows = load<4>(count - t);
      steps<kAny>(same, count - t, false, rows, w, bias, h);
    }
  }

 private:
  // What is known of some steps: all are to be done, and have one id; or are, with cuts; or
  // nothing.
  enum Ids { kPlain, kCut, kAny };

  __device__ __forceinline__ void go_to(int t) {
    x_ = p_.x.at(b_, d0_, t0_ + t);
    out_ = p_.out.at(b_, d0_, t0_ + t);
    if constexpr (K::FUSED) {
      pre_gate_ = p_.pre_gate.at(b_, d0_, t0_ + t);
      post_gate_ = p_.post_gate.at(b_, d0_, t0_ + t);
      residual_ = p_.residual.at(b_, d0_, t0_ + t);
    }
  }

  // The next rows, of which count are inside.
  template <int ROWS>
  __device__ __forceinline__ Rows<ROWS> load(int count) {
    Rows<ROWS> rows;
#pragma unroll
    for (int u = 0; u < ROWS; ++u) load_row(u < count, rows, u);
    return rows;
  }
  template <int ROWS>
  __device__ __forceinline__ void load_row(bool inside, Rows<ROWS>& rows, int u) {
    if (inside) rows.x[u] = Pack<T, C>::load(x_);
    x_ += p_.x.time;
    if constexpr (K::FUSED) {
      load_row(inside, p_.pre_gate, pre_gate_, rows.pre_gate[u]);
      load_row(inside, p_.post_gate, post_gate_, rows.post_gate[u]);
      // The residual that is x itself comes from L1 then.
      load_row(inside, p_.residual, residual_, rows.residual[u]);
    }
  }
  static __device__ __forceinline__ void load_row(bool inside, const View<T>& view, const T*& from,
                                                  Pack<T, C>& row) {
    if (!view.given()) return;
    if (inside) row = Pack<T, C>::load(from);
    from += view.time;
  }

  static __device__ __forceinline__ void clear(float (&v)[C]) {
#pragma unroll
    for (int c = 0; c < C; ++c) v[c] = 0.0f;
  }

  // The next rows; count of them are inside. more: each row then takes the one ROWS later, so that
  // as many are in flight all the time. ids: IdCuts or IdMatches.
  template <Ids IDS, int ROWS, typename IdsOfSteps>
  __device__ __forceinline__ void steps(const IdsOfSteps& ids, int count, bool more,
                                        Rows<ROWS>& rows, const float (&w)[WMAX][C],
                                        const float (&bias)[C], float (&h)[H][C]) {
    constexpr bool MIXED = K::SEQ && IDS == kAny;
    float v[H + ROWS][C];
#pragma unroll
    for (int j = 0; j < H; ++j) {
#pragma unroll
      for (int c = 0; c < C; ++c) v[j][c] = h[j][c];
    }
#pragma unroll
    for (int u = 0; u < ROWS; ++u) {
      if constexpr (IDS == kCut) {
        if (__builtin_expect(ids.begins(u), 0)) {
#pragma unroll
          for (int j = 0; j < H; ++j) clear(v[u + j]);
        }
      }
      const Pack<T, C> x = input(rows, u);
      float z[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        v[H + u][c] = x.get(c);
        z[c] = convolve<WMAX>(
            bias[c], first_, [&](int k) { return w[k][c]; },
            [&](int k) {
              if constexpr (MIXED) return ids.takes(u, k) ? v[u + k][c] : 0.0f;
              return v[u + k][c];
            });
      }
      if (p_.silu) {
#pragma unroll
        for (int c = 0; c < C; ++c) z[c] = silu<T>(z[c]);
      }
      if constexpr (K::FUSED) finish(rows, u, z);
      if constexpr (MIXED || IDS == kCut) {
        if (__builtin_expect(ids.is_padding(u), 0)) {
          clear(z);
          if constexpr (K::FUSED) take_residual(rows, u, z);
        }
      }
      if (IDS != kAny || u < count) pack<T>(z).store(out_);
      out_ += p_.out.time;
      if (IDS != kAny && kChunk<K> > N) load_row(more, rows, u);
    }
#pragma unroll
    for (int j = 0; j < H; ++j) {
#pragma unroll
      for (int c = 0; c < C; ++c) h[j][c] = v[ROWS + j][c];
    }
  }

  // Row u of what is convolved.
  template <int ROWS>
  __device__ __forceinline__ Pack<T, C> input(const Rows<ROWS>& rows, int u) const {
    if constexpr (K::FUSED) {
      if (p_.pre_gate.given()) return product(rows.x[u], rows.pre_gate[u]);
    }
    return rows.x[u];
  }

  // What comes after the activation.
  template <int ROWS>
  __device__ __forceinline__ void finish(const Rows<ROWS>& rows, int u, float (&z)[C]) const {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const float gate = p_.post_gate.given() ? rows.post_gate[u].get(c) : 1.0f;
      const float residual = p_.residual.given() ? rows.residual[u].get(c) : -0.0f;
      z[c] = fmaf(z[c], gate, residual);
    }
  }

  // The outputs of padding.
  template <int ROWS>
  __device__ __forceinline__ void take_residual(const Rows<ROWS>& rows, int u,
                                                float (&z)[C]) const {
    if (!p_.residual.given()) return;
#pragma unroll
    for (int c = 0; c < C; ++c) z[c] = rows.residual[u].get(c);
  }

  const Args& p_;
  int64_t b_, d0_, t0_;
  int first_;
  const T *x_, *pre_gate_, *post_gate_, *residual_;  // the next row
  T* out_;
};

// Blocks that an SM has registers for.
template <typename K>
constexpr int kForwardLastBlocks = K::WMAX > 4 && K::C == 4                           ? 3 + K::EXACT
                                   : K::FUSED                                         ? 4
                                   : sizeof(typename K::Element) == 4 && K::WMAX == 4 ? 6
                                                                                      : 5;

template <typename K>
__global__ void __launch_bounds__(kThreads, kForwardLastBlocks<K>)
    forward_channel_last(const ForwardArgs<typename K::Element> p) {
  if (kSmallPtx && !K::kAnyStride) return;
  constexpr int N = kChunk<K>;
  const ColumnChunk at(p.columns);
  if (at.chunk >= p.columns.chunks || at.b >= p.batch) return;
  // Lanes after the last column do as that one's, so that warps are whole; the last chunk may
  // overlap the one before it. What is written twice is the same.
  const int64_t d0 = min(int64_t(at.column), p.columns.count - 1) * K::C;
  const int64_t t0 = max(min(int64_t(at.chunk) * N, p.seqlen - N), int64_t(0));
  ForwardColumns<K> columns(p, at.b, d0, t0);
  pdl_wait();
  if (gridDim.x > kManyBlocks) pdl_launch();

  const bool one_chunk = p.columns.bits == 5;  // per warp
  const int count = static_cast<int>(min(p.seqlen, int64_t(N)));
  const bool has_ids = K::SEQ && p.seq_idx.data != nullptr;
  OneId<N + K::H> ids;
  if (has_ids && one_chunk && count == N) {
    ids.load(p.seq_idx.from(at.b, t0), -static_cast<int>(min(t0, int64_t(K::H))), N);
  }
  float w[K::WMAX][K::C], bias[K::C], h[K::H][K::C];
  typename ForwardColumns<K>::template Rows<kBurst<K>> rows;
  columns.load_first_inputs(h);
  if (count == N) rows = columns.load_first();
  columns.start(w, bias, h);
  int done = 0;
  if (count == N && (!has_ids || (one_chunk && ids.one()))) {
    done = columns.template whole<false>(rows, w, bias, h);
  } else if (K::SEQ && !K::kAnyStride && count == N && one_chunk) {
    done = columns.template whole<true>(rows, w, bias, h);
  }
  if (done < count) columns.any(done, count, w, bias, h);
}

}  // namespace causal_conv1d::gpu
