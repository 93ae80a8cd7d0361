// Update: the convolution of one or more new tokens with a running state, which takes them in.
//
// update_token: one token, W <= 4, a state of x's type of 3 or 4 inputs, which has unit stride over
//   them or over channels. A thread owns C channels and goes through kEntries batch entries; it has
//   the states in registers, where it shifts them.
// update_any: everything else, a thread per channel. It computes all outputs before it writes the
//   state, from which they read.
//
// INDEXED: with conv_state_indices, several batch entries may share a row of the state. All of them
// read it as it was, and the last one's state stays. So that no block waits for another, the thread
// of the first of them computes them all and the others nothing; to know, each warp looks at all
// indices.
#include "access.h"
#include "args.cuh"
#include "launch.cuh"
#include "parameters.cuh"
#include "taps.cuh"
#include "variants.cuh"

namespace causal_conv1d::gpu {
namespace {

struct Index {
  const int32_t* data;
  int64_t stride;  // in 32-bit words
  bool wide;       // 64 bits, the lower half first
  __device__ __forceinline__ int32_t low(int64_t b) const { return data[b * stride]; }
  __device__ __forceinline__ int64_t at(int64_t b) const {
    const int32_t* p = data + b * stride;
    const int32_t low = p[0], high = wide ? p[1] : low >> 31;
    return static_cast<int64_t>(high) << 32 | static_cast<uint32_t>(low);
  }
};

Index index_view(const Tensor& t) {
  if (!given(t)) return {nullptr, 0, false};
  const bool wide = t.dtype == CAUSAL_CONV1D_INT64;
  return {static_cast<const int32_t*>(t.data), t.strides[0] * (wide ? 2 : 1), wide};
}

template <typename T>
struct UpdateArgs : CommonArgs<T> {
  View<T> out;
  AnyView<Compute<T>> state;
  Index cache_seqlens, conv_state_indices;
  int64_t states, state_len;
  int entries = 1;      // update_token: batch entries per thread,
  Divisor by_column;    // and threads per so many
  int64_t columns = 0;  // update_any: threads per batch entry
  bool index_packs;     // conv_state_indices can be read four at a time

  explicit UpdateArgs(const UpdateParams& params)
      : CommonArgs<T>(params),
        out(view<T>(params.out)),
        state(any_view<Compute<T>>(params.conv_state)),
        cache_seqlens(index_view(params.cache_seqlens)),
        conv_state_indices(index_view(params.conv_state_indices)),
        states(params.conv_state.sizes[0]),
        state_len(params.conv_state.sizes[2]) {
    const Index& rows = conv_state_indices;
    index_packs = rows.data != nullptr && rows.stride == 1 && !rows.wide && this->batch % 4 == 0 &&
                  reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  }

  // The state row of batch entry b by its index, or -1 if it has none: then its outputs, of
  // channels d .. d + channels - 1, are written here. An index out of range gives NaN: reading that
  // row would be worse, and the host cannot be told.
  __device__ __forceinline__ int64_t state_row(int64_t b, int64_t d, int channels) const {
    const int64_t row = conv_state_indices.at(b);
    if (row >= 0 && row < states) return row;
    const Compute<T> v = row < 0 ? Compute<T>(0) : Compute<T>(NAN);
    for (int c = 0; c < channels; ++c) {
      for (int64_t t = 0; t < this->seqlen; ++t) *out.at(b, d + c, t) = from_compute<T>(v);
    }
    return -1;
  }

  // The first batch entry of [from, to) with that row, or to.
  template <typename Int>
  __device__ __forceinline__ Int find(Int row, Int from, Int to) const {
#pragma unroll 1
    while (from < to && conv_state_indices.at(from) != row) ++from;
    return from;
  }

  // Where in the ring batch entry b's first token goes.
  __device__ __forceinline__ int ring_start(int64_t b) const {
    const int64_t start = cache_seqlens.at(b) % state_len;
    return static_cast<int>(start < 0 ? start + state_len : start);
  }
};

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

struct NoSharedRows {
  template <typename Args>
  __device__ __forceinline__ explicit NoSharedRows(const Args&) {}
};

// A warp's look at all indices, for other batch entries with the rows of its own, which are N or,
// if that is 2, p.entries from b on. It compares 31 bits: what is no row may be taken for one,
// which costs time and nothing else.
template <int N>
class SharedRows {
  static constexpr int kPacks = 2, kStep = 4 * 32;  // of four indices per lane

 public:
  // Starts to load the first of them.
  template <typename Args>
  __device__ __forceinline__ explicit SharedRows(const Args& p) {
    if (!p.index_packs) return;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs_[i] = load(p, lane() * 4 + i * kStep);
  }

  // Whether there is one; rows: < 0 if b has none. It waits for all loads in flight, so that others
  // should start later.
  template <typename Args>
  __device__ __forceinline__ bool seen(const Args& p, int64_t b, const int (&rows)[N]) const {
    bool found = N > 1 && rows[0] == rows[N - 1];
    auto look = [&](int64_t at, int row) {
      const bool own = N == 1 ? at == b : static_cast<uint64_t>(at - b) < uint64_t(p.entries);
#pragma unroll
      for (int n = 0; n < N; ++n) found |= (row & 0x7fffffff) == rows[n] && !own;
    };
    auto look_at_pack = [&](int64_t at, const int4& pack) {
      look(at, pack.x);
      look(at + 1, pack.y);
      look(at + 2, pack.z);
      look(at + 3, pack.w);
    };
    if (p.index_packs) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) look_at_pack(lane() * 4 + i * kStep, packs_[i]);
#pragma unroll 1
      for (int64_t at = lane() * 4 + kPacks * kStep; at < p.batch; at += kStep) {
        look_at_pack(at, load(p, at));
      }
    } else {
#pragma unroll 1
      for (int64_t at = lane(); at < p.batch; at += 32) look(at, p.conv_state_indices.low(at));
    }
    return __any_sync(0xffffffff, found);
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

  // -1 past the last; p.batch is a multiple of four.
  template <typename Args>
  static __device__ __forceinline__ int4 load(const Args& p, int64_t at) {
    if (at >= p.batch) return make_int4(-1, -1, -1, -1);
    return *reinterpret_cast<const int4*>(p.conv_state_indices.data + at);
  }

  int4 packs_[kPacks];
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

int64_t whole_blocks(int64_t threads) { return ceil_div(threads, kThreads) * kThreads; }

// Whether a variant of update_token suits, with or without indices.
template <typename K>
bool suits(const UpdateParams& params) {
  constexpr int C = K::C, S = K::S, size = sizeof(typename K::Element);
  const Tensor &x = params.x, &state = params.conv_state;
  const bool one = x.ndim == 2 || x.sizes[2] == 1;
  if (!one || state.dtype != x.dtype || state.sizes[2] != S || params.weight.sizes[1] > K::WMAX) {
    return false;
  }
  if (x.sizes[1] % C != 0 || vector_width(x, 1, C, size) != C ||
      vector_width(params.out, 1, C, size) != C) {
    return false;
  }
  if (K::DIM_FASTEST) return vector_width(state, 1, C, size) == C;
  // A thread's channels are one dense block.
  constexpr int kAlignment = Pack<typename K::Element, S * C>::kAlignment;
  return state.strides[2] == 1 && (state.strides[1] == S || C == 1) &&
         reinterpret_cast<uintptr_t>(state.data) % kAlignment == 0 &&
         state.strides[0] * size % kAlignment == 0 &&
         (C * state.strides[1]) * size % kAlignment == 0;
}

template <typename T, int C, int S, bool DIM_FASTEST>
bool launch_token(const UpdateParams& params, UpdateArgs<T>& p, cudaStream_t stream,
                  cudaError_t* e) {
  using Plain = Token<T, C, S, DIM_FASTEST, false>;
  using Indexed = Token<T, C, S, DIM_FASTEST, true>;
  if (!has_every_kernel() || !suits<Plain>(params)) return false;
  const bool indexed = p.conv_state_indices.data != nullptr;
  const int64_t columns = indexed ? whole_blocks(p.dim / C) : p.dim / C;
  const int64_t threads = p.batch * columns;
  if (threads > kMaxParts || p.states > kMaxParts) return false;
  p.entries = threads >= (1 << 18) ? kEntries : 1;  // where there are enough for every thread
  p.by_column = Divisor(columns);
  auto kernel = indexed ? update_token<Indexed> : update_token<Plain>;
  *e = launch_pdl(kernel, ceil_div(p.batch, p.entries) * columns, stream, p);
  return true;
}

template <typename T>
cudaError_t run(const UpdateParams& params, cudaStream_t stream) {
  UpdateArgs<T> p(params);
  if (p.seqlen == 0) return cudaSuccess;
  if constexpr (sizeof(T) <= 4) {
    cudaError_t e = cudaSuccess;
    constexpr int half = sizeof(T) == 2 ? 2 : 1;
    if (launch_token<T, half, 4, false>(params, p, stream, &e) ||
        launch_token<T, 2 * half, 4, true>(params, p, stream, &e) ||
        launch_token<T, 2 * half, 3, false>(params, p, stream, &e) ||
        launch_token<T, 2 * half, 3, true>(params, p, stream, &e)) {
      return e;
    }
  }
  if (p.conv_state_indices.data == nullptr) {
    return launch(update_any<T, false>, p.batch * p.dim, stream, p);
  }
  p.columns = whole_blocks(p.dim);
  return launch(update_any<T, true>, p.batch * p.columns, stream, p);
}

}  // namespace
}  // namespace causal_conv1d::gpu

causal_conv1d_status causal_conv1d_cuda_update(const causal_conv1d_update_params* params,
                                               int device, void* stream) {
  using namespace causal_conv1d;
  return gpu::run_operator("causal_conv1d_update", params, device, [&](auto zero) {
    return gpu::run<decltype(zero)>(*params, static_cast<cudaStream_t>(stream));
  });
}
