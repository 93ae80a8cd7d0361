// The convolution of sequences whose states lie in a pool: see causal_conv1d_pool_params.
//
// pool_walk: W <= 8. A thread owns C adjacent channels over a part of the tokens, and walks along
// it
//   from sequence to sequence with the last W - 1 inputs in registers. A part is a tile of all
//   tokens or, where sequences are short or out is x, one sequence. Who has a sequence's first
//   token has its first W - 1, and with them its slot: it alone reads the history, and then writes
//   the new state. All others need inputs of x alone.
// pool_any: wider filters; a thread has a channel of a sequence.
//
// Tokens before the first sequence and after the last one count as a sequence that is skipped.
#pragma once

#include "../element_size.h"
#include "../pool_check.h"
#include "args.cuh"
#include "index.cuh"
#include "parameters.cuh"
#include "taps.cuh"
#include "variants.cuh"

namespace causal_conv1d::gpu {

// has_initial_state, by the bytes of an element.
struct Flags {
  const uint8_t* data;
  int64_t stride;
  int size;
  __device__ __forceinline__ bool at(int64_t i) const {
    if (data == nullptr) return true;
    const uint8_t* p = data + i * stride;
    if (size == 1) return *p != 0;
    if (size == 4) return *reinterpret_cast<const int32_t*>(p) != 0;
    return *reinterpret_cast<const int64_t*>(p) != 0;
  }
};

inline Flags flags_view(const Tensor& t) {
  const int64_t size = element_size(t.dtype);
  if (!given(t)) return {nullptr, 0, 0};
  return {static_cast<const uint8_t*>(t.data), t.strides[0] * size, static_cast<int>(size)};
}

// What CommonArgs takes of a pool's parameters.
struct PoolInputs {
  Tensor x, weight, bias;
  int32_t silu;
};

template <typename T>
struct PoolArgs : CommonArgs<T> {
  using F = Compute<T>;
  View<T> out;
  AnyView<F> states, windows;
  Index starts, slots, accepted, window_rows;
  Flags has_state;
  int64_t sequences, slot_count, state_len, window_count, window_tokens, pad_slot;
  bool state_packs = false;  // a thread's channels of a state are one access
  int64_t tile = 0;          // tokens of a part, or 0: a sequence
  Columns columns;

  explicit PoolArgs(const PoolParams& p)
      : CommonArgs<T>(PoolInputs{as_row(p.x), p.weight, p.bias, p.silu}),
        out(view<T>(as_row(p.out))),
        states(any_view<F>(p.conv_states)),
        windows(any_view<F>(p.windows_out)),
        starts(index_view(p.query_start_loc)),
        slots(index_view(p.cache_indices)),
        accepted(index_view(p.num_accepted_tokens)),
        window_rows(index_view(p.window_indices)),
        has_state(flags_view(p.has_initial_state)),
        sequences(sequences_of(p)),
        slot_count(p.conv_states.sizes[0]),
        state_len(p.conv_states.sizes[2]),
        window_count(p.windows_out.sizes[0]),
        window_tokens(p.windows_out.sizes[1]),
        pad_slot(p.pad_slot) {}

  // Where sequence i begins. -1 is the tokens before the first, `sequences` those after the last.
  __device__ __forceinline__ int64_t start(int64_t i) const {
    if (i < 0) return 0;
    if (i > sequences) return this->seqlen;
    if (starts.data == nullptr) return i;
    return min(max(starts.at(i), int64_t(0)), this->seqlen);
  }

  // The last sequence that begins at t or before.
  __device__ __forceinline__ int64_t sequence_of(int64_t t) const {
    int64_t below = -1, above = sequences + 1;
#pragma unroll 1
    while (above - below > 1) {
      const int64_t i = (below + above) / 2;
      (start(i) <= t ? below : above) = i;
    }
    return below;
  }

  // Its slot, or -1 if it is skipped.
  __device__ __forceinline__ int64_t slot_of(int64_t i) const {
    if (i < 0 || i >= sequences) return -1;
    const int64_t slot = slots.data == nullptr ? i : slots.at(i);
    return slot == pad_slot || slot < 0 || slot >= slot_count ? -1 : slot;
  }
};

// A sequence that is not skipped: its history is columns `first_column` on of its slot, or zeros,
// and its tokens begin .. end - 1 of x follow.
template <typename T>
struct Sequence {
  int64_t slot, begin, end, first_column;
  bool has_state;

  __device__ __forceinline__ Sequence(const PoolArgs<T>& p, int64_t i, int64_t slot_,
                                      int64_t begin_, int64_t end_)
      : slot(slot_), begin(begin_), end(end_), first_column(0), has_state(p.has_state.at(i)) {
    if (p.accepted.data == nullptr) return;
    const int64_t last = p.state_len - (p.width - 1);
    first_column = min(max(p.accepted.at(i) - 1, int64_t(0)), last);
  }

  // Input j of history ++ tokens, of channel d.
  __device__ __forceinline__ Compute<T> input(const PoolArgs<T>& p, int64_t d, int64_t j) const {
    const int64_t t = j - (p.width - 1);
    if (t >= 0) return to_compute(*p.x.at(0, d, begin + t));
    return has_state ? p.states.load(slot, d, first_column + j) : Compute<T>(0);
  }

  // The state afterwards is inputs `shift` on of history ++ tokens, so many columns.
  __device__ __forceinline__ int64_t columns(const PoolArgs<T>& p) const {
    const int64_t kept = p.width - 2 + (end - begin);
    return p.accepted.data == nullptr ? p.width - 1 : min(p.state_len, kept);
  }
  __device__ __forceinline__ int64_t shift(const PoolArgs<T>& p) const {
    return p.width - 1 + (end - begin) - columns(p);
  }
};

// The windows of tokens from .. to - 1, of C channels.
template <int C, typename T>
__device__ __forceinline__ void write_windows(const PoolArgs<T>& p, const Sequence<T>& s, int64_t i,
                                              int64_t d0, int64_t from, int64_t to) {
  const int64_t row = p.window_rows.data == nullptr ? i : p.window_rows.at(i);
  if (row < 0 || row >= p.window_count) return;
  const int H = p.width - 1;
  const int64_t last = min(to - s.begin, p.window_tokens);
#pragma unroll 1
  for (int64_t t = from - s.begin; t < last; ++t) {
#pragma unroll 1
    for (int n = 0; n < C * H; ++n) {
      const int64_t d = d0 + n / H;
      p.windows.store(s.input(p, d, t + 1 + n % H), row, t, d * H + n % H);
    }
  }
}

// The state afterwards, of C channels. Columns move down, so that in ascending order none is
// written before it is read.
template <int C, typename T>
__device__ __forceinline__ void write_state(const PoolArgs<T>& p, const Sequence<T>& s,
                                            int64_t d0) {
  constexpr int N = 4;  // columns in flight
  const int64_t columns = s.columns(p), shift = s.shift(p);
  if constexpr (C > 1) {
    if (p.state_packs) {
      using Row = Pack<T, C>;
      T* const state =
          static_cast<T*>(p.states.data) + s.slot * p.states.strides[0] + d0 * p.states.strides[1];
#pragma unroll 1
      for (int64_t j0 = 0; j0 < columns; j0 += N) {
        Row rows[N];
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const int64_t from = j0 + j + shift, t = from - (p.width - 1);
          if (j0 + j >= columns) continue;
          if (t >= 0) {
            rows[j] = Row::load(p.x.at(0, d0, s.begin + t));
          } else if (s.has_state) {
            rows[j] = Row::load(state + (s.first_column + from) * p.states.strides[2]);
          }
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
          if (j0 + j < columns) rows[j].store(state + (j0 + j) * p.states.strides[2]);
        }
      }
      return;
    }
  }
#pragma unroll 1
  for (int64_t j0 = 0; j0 < columns; j0 += N) {
#pragma unroll 1
    for (int64_t d = d0; d < d0 + C; ++d) {
      Compute<T> v[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (j0 + j < columns) v[j] = s.input(p, d, j0 + j + shift);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (j0 + j < columns) p.states.store(v[j], s.slot, d, j0 + j);
      }
    }
  }
}

// Variants of pool_walk.
template <typename T, int WMAX_, int C_>
struct Pool {
  using Element = T;
  static constexpr int WMAX = WMAX_, H = WMAX - 1, C = C_;
  static constexpr int N = WMAX == 4 ? 8 : 4;  // tokens that are loaded at once
  static constexpr int kBlocks = 4;
};

// A thread's C channels of pool_walk.
template <typename K>
struct PoolColumns {
  using T = typename K::Element;
  using F = Compute<T>;
  static constexpr int C = K::C, H = K::H, WMAX = K::WMAX, N = K::N;
  // Weights and bias on their way; of single channels nothing.
  struct Nothing {
    __device__ __forceinline__ Nothing(const PoolArgs<T>&, int64_t) {}
  };
  using Loaded = std::conditional_t<C == 1, Nothing, Parameters<WMAX, C>>;

  // Of x or out.
  static __device__ __forceinline__ void load(const T* from, F (&values)[C]) {
    if constexpr (C == 1) {
      values[0] = to_compute(*from);
    } else {
      const Pack<T, C> row = Pack<T, C>::load(from);
#pragma unroll
      for (int c = 0; c < C; ++c) values[c] = row.get(c);
    }
  }
  static __device__ __forceinline__ void store(const F (&values)[C], T* to) {
    if constexpr (C == 1) {
      *to = from_compute<T>(values[0]);
    } else {
      pack<T>(values).store(to);
    }
  }

  static __device__ __forceinline__ void parameters(const PoolArgs<T>& p, int64_t d0,
                                                    const Loaded& loaded, F (&w)[WMAX][C],
                                                    F (&bias)[C]) {
    if constexpr (C == 1) {
#pragma unroll
      for (int k = 0; k < WMAX; ++k) {
        const int from = k - (WMAX - p.width);
        w[k][0] = from < 0 ? F(0) : p.weight.load(d0, from) * p.scale;
      }
      bias[0] = load_bias(p, d0);
    } else {
      loaded.get(p.scale, w, bias);
    }
  }

  // The W - 1 inputs before token t: of a sequence's first token its history, else tokens.
  static __device__ __forceinline__ void history(const PoolArgs<T>& p, const Sequence<T>& s,
                                                 int64_t d0, int64_t t, F (&h)[H][C]) {
    const int first = WMAX - p.width;
    const T* state = static_cast<const T*>(p.states.data) + s.slot * p.states.strides[0] +
                     d0 * p.states.strides[1];
#pragma unroll
    for (int j = 0; j < H; ++j) {
#pragma unroll
      for (int c = 0; c < C; ++c) h[j][c] = F(0);
      if (j < first) continue;
      const int64_t column = s.first_column + j - first;
      if (t > s.begin) {
        load(p.x.at(0, d0, t - H + j), h[j]);
      } else if (!s.has_state) {
        continue;
      } else if (C > 1 && p.state_packs) {
        load(state + column * p.states.strides[2], h[j]);
      } else {
#pragma unroll
        for (int c = 0; c < C; ++c) h[j][c] = p.states.load(s.slot, d0 + c, column);
      }
    }
  }

  // The next N tokens, of which `count` are there.
  static __device__ __forceinline__ void tokens(const PoolArgs<T>& p, int64_t d0, int64_t t,
                                                int count, const F (&w)[WMAX][C],
                                                const F (&bias)[C], F (&h)[H][C]) {
    const int first = WMAX - p.width;
    F v[H + N][C];
#pragma unroll
    for (int j = 0; j < H + N; ++j) {
#pragma unroll
      for (int c = 0; c < C; ++c) v[j][c] = j < H ? h[j][c] : F(0);
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (u < count) load(p.x.at(0, d0, t + u), v[H + u]);
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (u >= count) break;
      F z[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        z[c] = bias[c];
#pragma unroll
        for (int k = 0; k < WMAX; ++k) {
          if (k >= first) z[c] = fma(w[k][c], v[u + k][c], z[c]);
        }
      }
      if (p.silu) {
#pragma unroll
        for (int c = 0; c < C; ++c) z[c] = silu<T>(z[c]);
      }
      store(z, p.out.at(0, d0, t + u));
    }
#pragma unroll
    for (int j = 0; j < H; ++j) {
#pragma unroll
      for (int c = 0; c < C; ++c) h[j][c] = v[N + j][c];
    }
  }

  static __device__ __forceinline__ void zeros(const PoolArgs<T>& p, int64_t d0, int64_t from,
                                               int64_t to) {
    const F z[C] = {};
#pragma unroll 1
    for (int64_t t = from; t < to; ++t) store(z, p.out.at(0, d0, t));
  }
};

// The part of a walk that is in one sequence: tokens from .. to - 1.
template <typename K, typename T>
__device__ __forceinline__ void walk_sequence(const PoolArgs<T>& p, const Sequence<T>& s, int64_t i,
                                              int64_t d0, int64_t from, int64_t to,
                                              const typename PoolColumns<K>::Loaded& loaded) {
  using Columns = PoolColumns<K>;
  Compute<T> w[K::WMAX][K::C], bias[K::C], h[K::H][K::C];
  Columns::history(p, s, d0, from, h);
  if (p.windows.given()) write_windows<K::C>(p, s, i, d0, from, to);
  if (from == s.begin) write_state<K::C>(p, s, d0);
  Columns::parameters(p, d0, loaded, w, bias);
#pragma unroll 1
  for (; from < to; from += K::N) {
    const int count = static_cast<int>(min(to - from, int64_t(K::N)));
    Columns::tokens(p, d0, from, count, w, bias, h);
  }
}

template <typename K>
__global__ void __launch_bounds__(kThreads, K::kBlocks)
    pool_walk(const PoolArgs<typename K::Element> p) {
  if (kSmallPtx && K::C > 1) return;
  using T = typename K::Element;
  const ColumnChunk at(p.columns);
  if (!at.inside) return;
  const int64_t d0 = int64_t(at.column) * K::C;
  pdl_wait();
  int64_t i, t, end;
  if (p.tile == 0) {
    i = int64_t(at.chunk) - 1;
    t = p.start(i);
    end = p.start(i + 1);
  } else {
    t = int64_t(at.chunk) * p.tile;
    end = min(t + p.tile, p.seqlen);
    i = p.sequence_of(t);
  }
  int64_t stop = p.start(i + 1), slot = p.slot_of(i);
  const typename PoolColumns<K>::Loaded loaded(p, d0);  // after what all else waits for
#pragma unroll 1
  while (t < end) {
    const int64_t begin = min(p.start(i), t);
    int64_t to = min(stop, end);
    if (slot < 0) {
      PoolColumns<K>::zeros(p, d0, t, to);
    } else {
      // The first W - 1 tokens belong to whoever has the first one.
      const int64_t both = min(stop, begin + p.width - 1);
      if (t > begin) t = max(t, both);
      if (t == begin) to = max(to, both);
      const Sequence<T> s(p, i, slot, begin, stop);
      if (t < to) walk_sequence<K>(p, s, i, d0, t, to, loaded);
    }
    t = max(t, to);
    if (t >= end) break;
    do {
      stop = p.start(++i + 1);
    } while (stop <= t);
    slot = p.slot_of(i);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) pool_any(const PoolArgs<T> p) {
  int64_t d;
  const int64_t i = split(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, p.dim, &d) - 1;
  if (i > p.sequences) return;
  const int64_t begin = p.start(i), end = p.start(i + 1), slot = p.slot_of(i);
  if (slot < 0) {
#pragma unroll 1
    for (int64_t t = begin; t < end; ++t) *p.out.at(0, d, t) = from_compute<T>(0);
  }
  if (slot < 0 || begin >= end) return;
  const Sequence<T> s(p, i, slot, begin, end);
  if (p.windows.given()) write_windows<1>(p, s, i, d, begin, end);
  const Compute<T> bias = load_bias(p, d);
#pragma unroll 1
  for (int64_t t = begin; t < end; ++t) {
    Compute<T> z = convolve_any<1>(p, d, bias, [&](int k) { return s.input(p, d, t - begin + k); });
    if (p.silu) z = silu<T>(z);
    *p.out.at(0, d, t) = from_compute<T>(z);
  }
  write_state<1>(p, s, d);
}

}  // namespace causal_conv1d::gpu
