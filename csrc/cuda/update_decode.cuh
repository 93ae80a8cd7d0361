// The update of a decoding step, one token of the common form: see update.cuh.
#pragma once

#include "ptx.cuh"
#include "shared_rows.cuh"
#include "update_token.cuh"

namespace causal_conv1d::gpu {

// What update_decode reads, in few lines of the constant cache.
template <typename T>
struct DecodeArgs {
  const T *x, *weight, *bias;
  T *state, *out;
  int64_t x_batch, out_batch, state_batch, state_input;
  Index conv_state_indices;
  Divisor by_column;
  uint32_t batch, columns;  // columns: of C channels each
  uint32_t states, pad_slot;
  float scale;
  bool silu, slots, may_share, whole_warps;
};

// With indices; `general` is for rows that entries share.
template <typename T>
struct IndexedDecodeArgs : DecodeArgs<T> {
  UpdateArgs<T> general;
};

// A variant of Token for up to E batch entries of a thread. If there are several, their states and
// x come through shared memory: all are on their way at once, which registers have no room for, so
// that waiting for an index before its state costs little.
template <typename K_, int E_>
struct Decode : K_ {
  using K = K_;
  using T = typename K::Element;
  static constexpr int E = E_, C = K::C, S = K::S;
  static constexpr bool STAGED = E > 1;
  // A state is so many pieces, those of DIM_FASTEST the rows that are needed.
  static constexpr int kPieceBytes = K::DIM_FASTEST ? C * sizeof(T) : K::State::kAlignment;
  static constexpr int kPieces = K::DIM_FASTEST ? 3 : K::State::kBytes / kPieceBytes;
  static constexpr int kTokenBytes = C * sizeof(T);
  static constexpr int kEntryBytes = kThreads * (kPieces * kPieceBytes + kTokenBytes);
  static constexpr int kBlocks = STAGED ? 8 : 10;
  using Args = std::conditional_t<K::INDEXED, IndexedDecodeArgs<T>, DecodeArgs<T>>;
};

// wait_for_copies(), of up to N groups in flight.
template <int N>
__device__ __forceinline__ void wait_until(int in_flight) {
  if (in_flight == N) {
    wait_for_copies<N>();
  } else if constexpr (N > 0) {
    wait_until<N - 1>(in_flight);
  }
}

// A thread's places in shared memory for its entries.
template <typename D>
struct DecodeStage {
  using T = typename D::T;
  using State = typename D::K::State;
  using Token = typename D::K::Tokens;
  char* own;

  __device__ __forceinline__ char* piece(int e, int i) const {
    return own + e * D::kEntryBytes + (i * kThreads + threadIdx.x) * D::kPieceBytes;
  }
  __device__ __forceinline__ char* token(int e) const {
    constexpr int after = D::kPieces * kThreads * D::kPieceBytes;
    return own + e * D::kEntryBytes + after + threadIdx.x * D::kTokenBytes;
  }
  // Starts to load entry e.
  __device__ __forceinline__ void start(int e, bool inside, const T* state, int64_t stride,
                                        const T* x) const {
#pragma unroll
    for (int i = 0; i < D::kPieces; ++i) {
      const char* from = reinterpret_cast<const char*>(state) + i * D::kPieceBytes;
      if constexpr (D::DIM_FASTEST) {
        from = reinterpret_cast<const char*>(state + (D::S - 3 + i) * stride);
      }
      copy_async_or_zero<D::kPieceBytes>(inside, shared_address(piece(e, i)), from);
    }
    copy_async_or_zero<D::kTokenBytes>(inside, shared_address(token(e)), x);
    commit_copies();
  }
  __device__ __forceinline__ void get(int e, State& state, Token& x) const {
    constexpr int words = D::kPieceBytes / 4, first = D::DIM_FASTEST ? D::S - 3 : 0;
#pragma unroll
    for (int i = 0; i < D::kPieces; ++i) {
      __builtin_memcpy(state.w + (first + i) * words, piece(e, i), D::kPieceBytes);
    }
    __builtin_memcpy(x.w, token(e), D::kTokenBytes);
  }
};

// Writes out and the state of a batch entry.
template <typename D, typename T>
__device__ __forceinline__ void decode_entry(const DecodeArgs<T>& p, T* state, T* out,
                                             const typename D::K::State& old,
                                             const typename D::K::Tokens& x,
                                             const Pack<T, D::C * 4>& weight,
                                             const Pack<T, D::C>& bias,
                                             typename D::K::Vector* staged) {
  using K = typename D::K;
  constexpr int C = D::C, S = D::S;
  float z[C];
  typename K::State taken;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    T inputs[S];
#pragma unroll
    for (int j = 0; j < S; ++j) inputs[j] = old.element(K::entry(c, j));
    z[c] = convolve<4>(
        bias.get(c) * p.scale, 0, [&](int k) { return weight.get(c * 4 + k) * p.scale; },
        [&](int k) { return k < 3 ? to_compute(inputs[(S - 3 + k) % S]) : x.get(c); });
#pragma unroll
    for (int j = 0; j < S; ++j) {
      taken.set_element(K::entry(c, j), j + 1 < S ? inputs[(j + 1) % S] : x.element(c));
    }
    if (p.silu) z[c] = silu<T>(z[c]);
  }
  store_state<K>(p.whole_warps, p.state_input, staged, state, taken);
  pack<T>(z).store(out);
}

template <typename D>
__global__ void __launch_bounds__(kThreads, kAtMost<D::kBlocks>)
    update_decode(const typename D::Args p) {
  using K = typename D::K;
  using T = typename D::T;
  constexpr int E = D::E, C = D::C, S = D::S;
  __shared__ typename K::Vector exchanged[K::EXCHANGED ? kThreads * 3 : 1];
  alignas(16) __shared__ char stage[D::STAGED ? E * D::kEntryBytes : 16];
  uint32_t column;
  const uint32_t group = split(blockIdx.x * kThreads + threadIdx.x, p.by_column, &column);
  const uint32_t b0 = group * E;
  if (b0 >= p.batch) return;
  // Threads after the last column only look at indices.
  const bool inside = column < p.columns;
  const int64_t d = inside ? int64_t(column) * C : 0;
  T* const first_state = p.state + d * (K::DIM_FASTEST ? 1 : S);
  pdl_wait();
  pdl_launch();
  int row[E];
  bool is_nan[E] = {};
#pragma unroll
  for (int e = 0; e < E; ++e) {
    row[e] = -1 - e;
    if (b0 + e >= p.batch) continue;
    const int64_t index = K::INDEXED ? p.conv_state_indices.at(b0 + e) : b0 + e;
    row[e] = index >= 0 && index < p.states ? static_cast<int>(index) : -1 - e;
    if constexpr (K::INDEXED) {
      is_nan[e] = index >= p.states && !p.slots;
      if (static_cast<uint32_t>(row[e]) == p.pad_slot) row[e] = -1 - e;
    }
  }
  const SharedRows<E> shared_rows(p);
  const auto state_of = [&](int e) { return first_state + row[e] * p.state_batch; };
  const auto x_of = [&](int e) { return p.x + (b0 + e) * p.x_batch + d; };
  const DecodeStage<D> places{stage};
  typename K::State old;
  typename K::Tokens x;
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const bool there = inside && row[e] >= 0;
    if constexpr (D::STAGED) {
      places.start(e, there, there ? state_of(e) : p.state, p.state_input, there ? x_of(e) : p.x);
    } else if (there) {
      x = K::Tokens::load(x_of(e));
      old = K::load(state_of(e), p.state_input, false);
    }
  }
  const Pack<T, C * 4> weight = Pack<T, C * 4>::load(p.weight + d * 4);
  Pack<T, C> bias;
  if (p.bias != nullptr) bias = Pack<T, C>::load(p.bias + d);
  if constexpr (K::INDEXED) {
    const bool shared = shared_rows.seen(p, b0, E, row);
    if (!inside) return;
    if (shared) {
#pragma unroll 1
      for (int n = 0; n < E * C; ++n) {
        const int64_t b = b0 + n / C, c = d + n % C;
        if (b >= p.batch) break;
        const int64_t index = p.conv_state_indices.at(b), r = p.general.row_of(index);
        if (r < 0) {
          p.general.write_without_row(index, b, c, 1);
        } else {
          update_channel(p.general, r, b, c, true);
        }
      }
      return;
    }
  }
#pragma unroll
  for (int e = 0; e < E; ++e) {
    if (b0 + e >= p.batch) return;
    T* const out = p.out + (b0 + e) * p.out_batch + d;
    if constexpr (D::STAGED) {
      wait_until<E - 1>(E - 1 - e);
      places.get(e, old, x);
    }
    if (K::INDEXED && row[e] < 0) {
      float z[C];
#pragma unroll
      for (int c = 0; c < C; ++c) z[c] = is_nan[e] ? NAN : 0.f;
      pack<T>(z).store(out);
      continue;
    }
    if (K::EXCHANGED && e > 0) __syncwarp();
    decode_entry<D>(p, state_of(e), out, old, x, weight, bias, exchanged);
  }
}

}  // namespace causal_conv1d::gpu
