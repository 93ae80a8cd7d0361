// The update by one token: see update.cuh.
#pragma once

#include <type_traits>

#include "parameters.cuh"
#include "shared_rows.cuh"
#include "taps.cuh"
#include "variants.cuh"

namespace causal_conv1d::gpu {

constexpr int kEntries = 2;  // per thread of update_token, which shares its weights between them

// A variant of update_token: C channels per thread, a state of S inputs, [channel][input] in memory
// or [input][channel] if DIM_FASTEST.
template <typename T, int C_, int S_, bool DIM_FASTEST_, bool INDEXED_>
struct Token {
  using Element = T;
  static constexpr int C = C_, S = S_, WMAX = 4;
  static constexpr bool DIM_FASTEST = DIM_FASTEST_, INDEXED = INDEXED_;
  // As many blocks per SM as registers allow without spills: it waits for memory alone.
  static constexpr int kBlocks = C == 4 ? 7 : (S * C * sizeof(T) > 24 ? 8 : 10 - INDEXED);
};

// update_token for channel d of all batch entries with that row, if b is the first.
template <typename T, int S>
__device__ __forceinline__ void update_shared(const UpdateArgs<T>& p, int row, int b, int64_t d) {
  const int batch = static_cast<int>(p.batch);
  if (p.find(row, 0, b) < b) return;
  auto state = [&](int j) {
    return static_cast<T*>(p.state.data) + row * p.state.strides[0] + d * p.state.strides[1] +
           j * p.state.strides[2];
  };
  const bool ring = p.cache_seqlens.data != nullptr;
  int at = 0;  // where x goes, and the oldest input is
  T x;
#pragma unroll 1
  while (b < batch) {
    asm volatile("" : "+l"(d), "+r"(row));  // or addresses would be kept in registers
    if (ring) at = p.ring_start(b);
    x = *p.x.at(b, d, 0);
    float z = convolve_any<1>(p, d, load_bias(p, d), [&](int k) {
      const int from = at - (p.width - 1 - k);  // x, and what was there before
      return to_compute(from == at ? x : *state(from < 0 ? from + S : from));
    });
    if (p.silu) z = silu<T>(z);
    *p.out.at(b, d, 0) = from_compute<T>(z);
    b = p.find(row, b + 1, batch);
  }
  if (!ring) {
#pragma unroll 1
    for (at = 0; at < S - 1; ++at) *state(at) = *state(at + 1);
  }
  *state(at) = x;
}

// A thread's part of a batch entry's state: C channels.
template <typename K>
struct TokenState {
  using T = typename K::Element;
  static constexpr int C = K::C, S = K::S;
  using Inputs = Pack<T, S * C>;

  static __device__ __forceinline__ Inputs load(const T* state, int64_t stride) {
    if constexpr (!K::DIM_FASTEST) return Inputs::load(state);
    Inputs inputs;
#pragma unroll
    for (int j = 0; j < S; ++j) {
      inputs.template set_part<C>(j, Pack<T, C>::load(state + j * stride));
    }
    return inputs;
  }

  // In a ring only the input at `at` is stored.
  static __device__ __forceinline__ void store(const Inputs& inputs, bool ring, int at, T* state,
                                               int64_t stride) {
    if constexpr (K::DIM_FASTEST) {
#pragma unroll
      for (int j = 0; j < S; ++j) {
        if (!ring || j == at) inputs.template part<C>(j).store(state + j * stride);
      }
    } else {
      inputs.store(state);
    }
  }

  // Where input j of channel c is in the state.
  static __device__ __forceinline__ int entry(int c, int j) {
    return K::DIM_FASTEST ? j * C + c : c * S + j;
  }

  // Channel c of a state and of x, which goes to `at`, in order of time.
  static __device__ __forceinline__ void in_order(const Inputs& old, const Pack<T, C>& x, int c,
                                                  bool ring, int at, T (&inputs)[S + 1]) {
#pragma unroll
    for (int j = 0; j < S; ++j) {
      inputs[j] = old.element(entry(c, j));
      if (ring) {
#pragma unroll
        for (int k = 0; k < S; ++k) {
          if (k == at + j || k == at + j - S) inputs[j] = old.element(entry(c, k));
        }
      }
    }
    inputs[S] = x.element(c);
  }
};

// Writes out and the state of batch entry b.
template <typename K, typename T>
__device__ __forceinline__ void update_entry(const UpdateArgs<T>& p, int64_t b, int64_t d0,
                                             T* state, const Pack<T, K::S * K::C>& old,
                                             const Pack<T, K::C>& x, int first,
                                             const float (&w)[K::WMAX][K::C],
                                             const float (&bias)[K::C]) {
  constexpr int C = K::C, S = K::S;
  const bool ring = p.cache_seqlens.data != nullptr;
  int at = S - 1;  // where x goes
  if (ring) at = p.ring_start(b);
  Pack<T, S * C> taken;
  float z[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    T inputs[S + 1];
    TokenState<K>::in_order(old, x, c, ring, at, inputs);
    z[c] = convolve<K::WMAX>(
        bias[c], first, [&](int k) { return w[k][c]; },
        [&](int k) { return to_compute(inputs[S + 1 - K::WMAX + k]); });
#pragma unroll
    for (int j = 0; j < S; ++j) {
      const int i = TokenState<K>::entry(c, j);
      const T kept = ring ? old.element(i) : inputs[j + 1];
      taken.set_element(i, ring && j == at ? inputs[S] : kept);
    }
  }
  if (p.silu) {
#pragma unroll
    for (int c = 0; c < C; ++c) z[c] = silu<T>(z[c]);
  }
  TokenState<K>::store(taken, ring, at, state, p.state.strides[2]);
  pack<T>(z).store(p.out.at(b, d0, 0));
}

template <typename K>
__global__ void __launch_bounds__(kThreads, K::kBlocks)
    update_token(const UpdateArgs<typename K::Element> p) {
  if (kSmallPtx) return;
  using T = typename K::Element;
  constexpr int C = K::C;
  constexpr bool INDEXED = K::INDEXED;
  uint32_t column;
  const int64_t b0 =
      int64_t(split(blockIdx.x * kThreads + threadIdx.x, p.by_column, &column)) * p.entries;
  if (b0 >= p.batch) return;
  // Threads after the last column only look at indices.
  const bool inside = !INDEXED || int64_t(column) * C < p.dim;
  const int64_t d0 = inside ? int64_t(column) * C : 0;
  pdl_wait();
  pdl_launch();
  const Parameters<K::WMAX, C> parameters(p, d0);
  [[maybe_unused]] const std::conditional_t<INDEXED, SharedRows<kEntries>, NoSharedRows>
      shared_rows(p);
  int row[kEntries];
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    row[i] = -1 - i;
    if (INDEXED && i < p.entries && b0 + i < p.batch) {
      const int64_t r = p.state_row(b0 + i, d0, C);
      if (r >= 0) row[i] = static_cast<int>(r);
    }
  }
  bool shared = false;
  if constexpr (INDEXED) shared = shared_rows.seen(p, b0, row);
  // In flight, per batch entry.
  T* state[kEntries];
  Pack<T, K::S * C> old[kEntries];
  Pack<T, C> x[kEntries];
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    const int64_t b = b0 + i;
    state[i] = nullptr;
    if (INDEXED ? row[i] < 0 : i >= p.entries || b >= p.batch) continue;
    state[i] = static_cast<T*>(p.state.data) + (INDEXED ? row[i] : b) * p.state.strides[0] +
               d0 * p.state.strides[1];
    old[i] = TokenState<K>::load(state[i], p.state.strides[2]);
    x[i] = Pack<T, C>::load(p.x.at(b, d0, 0));
  }
  if constexpr (INDEXED) {
    if (!inside) return;
    if (shared) {  // rare enough for code that is small, and takes no registers from the other
      asm volatile("" : "+r"(column));
#pragma unroll 1
      for (int n = 0; n < p.entries * C; ++n) {
        const int64_t b = b0 + n / C;
        const int64_t r = b < p.batch ? p.conv_state_indices.at(b) : -1;
        if (r < 0 || r >= p.states) continue;
        update_shared<T, K::S>(p, static_cast<int>(r), static_cast<int>(b),
                               int64_t(column) * C + n % C);
      }
      return;
    }
  }
  float w[K::WMAX][C], bias[C];
  parameters.get(p.scale, w, bias);
  const int first = K::WMAX - p.width;
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    if (state[i] == nullptr) continue;
    update_entry<K>(p, b0 + i, d0, state[i], old[i], x[i], first, w, bias);
  }
}

}  // namespace causal_conv1d::gpu
