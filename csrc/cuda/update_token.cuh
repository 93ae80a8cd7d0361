// The update by one token or a few: see update.cuh.
#pragma once

#include "parameters.cuh"
#include "update_any.cuh"
#include "variants.cuh"

namespace causal_conv1d::gpu {

// A variant of update_token: C channels per thread, a state of S inputs, [channel][input] in memory
// or [input][channel] if DIM_FASTEST, L tokens, [channel][token] in memory.
template <typename T, int C_, int S_, bool DIM_FASTEST_, bool INDEXED_, int L_ = 1>
struct Token {
  using Element = T;
  static constexpr int C = C_, S = S_, L = L_, WMAX = 4;
  static constexpr bool DIM_FASTEST = DIM_FASTEST_, INDEXED = INDEXED_;
  static constexpr int ENTRIES = 2;  // per thread, which shares its weights between them
  using Tokens = Pack<T, L * C>;
  using State = Pack<T, S * C>;
  // A warp writes states by adjacent vectors, not each lane its own, which would be parts of
  // sectors.
  static constexpr bool EXCHANGED = !DIM_FASTEST && S == 3 && sizeof(T) * C % 4 == 0;
  using Vector = std::conditional_t<State::kWords == 6, uint2, uint32_t>;
  // As many blocks per SM as registers allow without spills: it waits for memory alone.
  static constexpr int kBlocks = C == 4 ? 7 : (L > 1 || State::kBytes >= 24 ? 8 : 10 - INDEXED);

  // Where input j of channel c is in State.
  static __device__ __forceinline__ constexpr int entry(int c, int j) {
    return DIM_FASTEST ? j * C + c : c * S + j;
  }

  // stride: of the inputs. ring: the oldest may be any; else it is the first and not needed.
  static __device__ __forceinline__ State load(const T* state, int64_t stride, bool ring) {
    if constexpr (!DIM_FASTEST) return State::load(state);
    State inputs;
#pragma unroll
    for (int j = 0; j < S; ++j) {
      if (j < S - 3 && !ring) continue;
      inputs.template set_part<C>(j, Pack<T, C>::load(state + j * stride));
    }
    return inputs;
  }
  static __device__ __forceinline__ void store(const State& inputs, T* state, int64_t stride) {
    if constexpr (DIM_FASTEST) {
#pragma unroll
      for (int j = 0; j < S; ++j) inputs.template part<C>(j).store(state + j * stride);
    } else {
      inputs.store(state);
    }
  }
};

// Each lane gives the 3 vectors of its own state, and gets vectors lane, lane + 32 and lane + 64 of
// the warp's 96.
template <typename V, int WORDS>
__device__ __forceinline__ void exchange(V* staged, uint32_t (&w)[WORDS]) {
  static_assert(sizeof(V) * 3 == WORDS * 4, "three vectors");
  constexpr int N = WORDS / 3;
  const int lane = threadIdx.x % 32;
  V* const own = staged + threadIdx.x * 3;
  V* const all = own - lane * 2;
#pragma unroll
  for (int i = 0; i < 3; ++i) __builtin_memcpy(own + i, w + i * N, sizeof(V));
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 3; ++i) __builtin_memcpy(w + i * N, all + i * 32, sizeof(V));
}

// stride: of the inputs.
template <typename K, typename T>
__device__ __forceinline__ void store_state(bool whole_warps, int64_t stride,
                                            typename K::Vector* staged, T* state,
                                            typename K::State& taken) {
  if constexpr (K::EXCHANGED) {
    if (whole_warps) {
      constexpr int N = K::State::kWords / 3;  // words of a vector
      exchange(staged, taken.w);
      char* const to = reinterpret_cast<char*>(state) - threadIdx.x % 32 * 8 * N;
#pragma unroll
      for (int i = 0; i < 3; ++i) taken.template part<N * 4 / sizeof(T)>(i).store(to + i * 128 * N);
      return;
    }
  }
  K::store(taken, state, stride);
}

// The inputs of a channel, of which the one at `at` is the oldest, in order of time.
template <int S, typename T>
__device__ __forceinline__ void in_order(int at, T (&inputs)[S]) {
  T v[S];
#pragma unroll
  for (int j = 0; j < S; ++j) v[j] = at & 2 ? inputs[(j + 2) % S] : inputs[j];
#pragma unroll
  for (int j = 0; j < S; ++j) inputs[j] = at & 1 ? v[(j + 1) % S] : v[j];
}

// A ring with x in the place of the oldest.
template <typename K, typename T>
__device__ __forceinline__ typename K::State with_newest(const typename K::State& old, int at,
                                                         const Pack<T, K::C>& x) {
  constexpr int C = K::C, S = K::S;
  typename K::State taken;
#pragma unroll
  for (int i = 0; i < C * S; ++i) taken.set_element(i, x.element(i / S));
  uint32_t here[S];
#pragma unroll
  for (int j = 0; j < S; ++j) here[j] = j == at ? 0xffffffff : 0;
#pragma unroll
  for (int i = 0; i < K::State::kWords; ++i) {
    uint32_t mask = here[i % S];
    if constexpr (sizeof(T) == 2) {
      mask = (here[2 * i % S] & 0xffff) | (here[(2 * i + 1) % S] & 0xffff0000);
    }
    taken.w[i] = (taken.w[i] & mask) | (old.w[i] & ~mask);
  }
  return taken;
}

// Writes out and the state of batch entry b. at: where x goes in a ring.
template <typename K, bool RING, typename T>
__device__ __forceinline__ void update_entry(const UpdateArgs<T>& p, int64_t b, int64_t d0,
                                             T* state, const typename K::State& old,
                                             const typename K::Tokens& x, int at,
                                             typename K::Vector* staged,
                                             const float (&w)[K::WMAX][K::C],
                                             const float (&bias)[K::C]) {
  constexpr int C = K::C, S = K::S, L = K::L;
  const int first = K::WMAX - p.width;
  typename K::State taken;
  float z[C * L];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    T inputs[S], newest[S];
#pragma unroll
    for (int j = 0; j < S; ++j) inputs[j] = old.element(K::entry(c, j));
    if constexpr (RING) in_order(at, inputs);
#pragma unroll
    for (int t = 0; t < L; ++t) {
      z[c * L + t] = convolve<K::WMAX>(
          bias[c], first, [&](int k) { return w[k][c]; },
          [&](int k) {
            const int j = t + k - 3;  // from the tokens' first on
            return j < 0 ? to_compute(inputs[(j + S) % S]) : x.get(c * L + max(j, 0));
          });
    }
#pragma unroll
    for (int j = 0; j < S; ++j) {
      newest[j] = j + L < S ? inputs[(j + L) % S] : x.element(c * L + max(j + L - S, 0));
    }
    if constexpr (RING && L > 1) in_order((2 * S - L % S - at) % S, newest);
#pragma unroll
    for (int j = 0; j < S; ++j) taken.set_element(K::entry(c, j), newest[j]);
  }
  if (p.silu) {
#pragma unroll
    for (int i = 0; i < C * L; ++i) z[i] = silu<T>(z[i]);
  }
  if constexpr (RING && K::DIM_FASTEST) {
    x.store(state + at * p.state.strides[2]);
  } else {
    if constexpr (RING && L == 1) taken = with_newest<K>(old, at, x);
    store_state<K>(p.whole_warps, p.state.strides[2], staged, state, taken);
  }
  pack<T>(z).store(p.out.at(b, d0, 0));
}

template <typename K>
__global__ void __launch_bounds__(kThreads, kAtMost<K::kBlocks>)
    update_token(const UpdateArgs<typename K::Element> p) {
  if (kSmallPtx) return;
  using T = typename K::Element;
  constexpr int C = K::C;
  constexpr int N = K::ENTRIES;
  constexpr bool INDEXED = K::INDEXED;
  __shared__ typename K::Vector staged[K::EXCHANGED ? N : 1][K::EXCHANGED ? kThreads * 3 : 1];
  uint32_t column;
  const int64_t b0 =
      int64_t(split(blockIdx.x * kThreads + threadIdx.x, p.by_column, &column)) * p.entries;
  if (b0 >= p.batch) return;
  // Threads after the last column only look at indices.
  const bool inside = !INDEXED || int64_t(column) * C < p.dim;
  const int64_t d0 = inside ? int64_t(column) * C : 0;
  pdl_wait();
  pdl_launch();
  // All that needs no index of the state first, then the states: nothing waits in between.
  int64_t index[N];
  int at[N] = {};  // where x goes in a ring
  typename K::Tokens x[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t b = b0 + i;
    index[i] = -1;
    if (i < p.entries && b < p.batch) {
      index[i] = INDEXED && p.has_indices() ? p.conv_state_indices.at(b) : b;
      if (p.is_ring()) at[i] = K::S == 4 ? p.cache_seqlens.low(b) & 3 : p.ring_start(b, K::S);
      x[i] = K::Tokens::load(p.x.at(b, d0, 0));
    }
  }
  const SharedRows<N> shared_rows(p);
  const Parameters<K::WMAX, C> parameters(p, d0);
  int row[N] = {};
  typename K::State old[N];
  const auto state = [&](int i) {
    return static_cast<T*>(p.state.data) + row[i] * p.state.strides[0] + d0 * p.state.strides[1];
  };
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t r = INDEXED ? p.row_of(index[i]) : index[i];
    row[i] = r < 0 ? -1 - i : static_cast<int>(r);
    if (row[i] >= 0) old[i] = K::load(state(i), p.state.strides[2], p.is_ring());
  }
  if constexpr (INDEXED) {
    const bool shared = shared_rows.seen(p, b0, p.entries, row);
    if (!inside) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (row[i] < 0 && i < p.entries && b0 + i < p.batch) {
        p.write_without_row(index[i], b0 + i, d0, C);
      }
    }
    if (shared) {  // rare enough for code that is small, and takes no registers from the other
      asm volatile("" : "+r"(column));
#pragma unroll 1
      for (int n = 0; n < p.entries * C; ++n) {
        const int64_t b = b0 + n / C;
        const int64_t r = b < p.batch ? p.row_of(p.conv_state_indices.at(b)) : -1;
        if (r < 0) continue;
        update_channel(p, r, b, int64_t(column) * C + n % C, true);
      }
      return;
    }
  }
  float w[K::WMAX][C], bias[C];
  parameters.get(p.scale, w, bias);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (row[i] < 0) continue;
    auto* const shared = staged[K::EXCHANGED ? i : 0];
    if (p.is_ring()) {
      update_entry<K, true>(p, b0 + i, d0, state(i), old[i], x[i], at[i], shared, w, bias);
    } else {
      update_entry<K, false>(p, b0 + i, d0, state(i), old[i], x[i], 0, shared, w, bias);
    }
  }
}

}  // namespace causal_conv1d::gpu
