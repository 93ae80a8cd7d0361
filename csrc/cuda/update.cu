// Update: the convolution of one or more new tokens with a running state, which takes them in.
//
// update_token: one token, W <= 4, a state of x's type of 3 or 4 inputs, which has unit stride over
//   them or over channels. A thread owns C channels and goes through kEntries batch entries; it has
//   the states in registers, where it shifts them.
// update_any: everything else, a thread a channel. All outputs come before the first write of the
//   state, from which they read.
#include "common.cuh"
#include "launch.cuh"

namespace causal_conv1d::gpu {
namespace {

struct Index {
  const int32_t* data;
  int64_t stride;
  __device__ __forceinline__ int64_t at(int64_t b) const { return data[b * stride]; }
};

template <typename T>
struct UpdateArgs {
  using Element = T;
  View<T> x, out;
  AnyView<Compute<T>> state, weight, bias;
  Index cache_seqlens, conv_state_indices;
  int64_t batch, dim, seqlen, states, state_len;
  int entries;        // update_token: batch entries a thread
  Divisor by_column;  // and of C channels
  int width;
  bool silu;
  Compute<T> scale;  // pre_activation_scale

  // The state row of batch entry b, or -1 if it has none: then the outputs of channels d .. d +
  // channels - 1 are written here. A row out of range gives NaN, since reading it would be worse
  // and nobody can be told.
  __device__ __forceinline__ int64_t state_row(int64_t b, int64_t d, int channels) const {
    if (conv_state_indices.data == nullptr) return b;
    const int64_t row = conv_state_indices.at(b);
    if (row >= 0 && row < states) return row;
    const Compute<T> v = row < 0 ? Compute<T>(0) : Compute<T>(NAN);
    for (int c = 0; c < channels; ++c) {
      for (int64_t t = 0; t < seqlen; ++t) *out.at(b, d + c, t) = from_compute<T>(v);
    }
    return -1;
  }

  // Where in the ring batch entry b's first token goes.
  __device__ __forceinline__ int ring_start(int64_t b) const {
    const int64_t start = cache_seqlens.at(b) % state_len;
    return static_cast<int>(start < 0 ? start + state_len : start);
  }
};

constexpr int kEntries = 2;

// As many blocks at a time as registers allow without spills: it waits for memory alone.
template <typename T, int C, int S, bool DIM_FASTEST>
__global__ void __launch_bounds__(kThreads, C == 4 ? 7 : (S * C * sizeof(T) > 24 ? 8 : 10))
    update_token(const UpdateArgs<T> p) {
  if (kSmallPtx) return;
  constexpr int WMAX = 4;
  uint32_t column;
  const int64_t b0 =
      int64_t(p.by_column.split(blockIdx.x * kThreads + threadIdx.x, &column)) * p.entries;
  const int64_t d0 = int64_t(column) * C;
  if (b0 >= p.batch) return;
  wait_for_kernel_before();
  let_next_kernel_start();
  const Parameters<WMAX, C> parameters(p, d0);
  T* state[kEntries];
  Pack<T, S * C> old[kEntries];  // [channel][input], or [input][channel] if DIM_FASTEST
  Pack<T, C> x[kEntries];
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    const int64_t b = b0 + i;
    state[i] = nullptr;
    if (i >= p.entries || b >= p.batch) continue;
    const int64_t row = p.state_row(b, d0, C);
    if (row < 0) continue;
    state[i] = static_cast<T*>(p.state.data) + row * p.state.strides[0] + d0 * p.state.strides[1];
    if constexpr (DIM_FASTEST) {
#pragma unroll
      for (int j = 0; j < S; ++j) {
        old[i].template set_part<C>(j, Pack<T, C>::load(state[i] + j * p.state.strides[2]));
      }
    } else {
      old[i] = Pack<T, S * C>::load(state[i]);
    }
    x[i] = Pack<T, C>::load(p.x.at(b, d0, 0));
  }
  float w[WMAX][C], bias[C];
  parameters.get(p.scale, w, bias);
  const int first = WMAX - p.width;
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    if (state[i] == nullptr) continue;
    const bool ring = p.cache_seqlens.data != nullptr;
    int at = S - 1;  // where x goes
    if (ring) at = p.ring_start(b0 + i);
    Pack<T, S * C> taken;
    float z[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      T inputs[S + 1];  // in order of time
      auto entry = [&](int j) { return DIM_FASTEST ? j * C + c : c * S + j; };
#pragma unroll
      for (int j = 0; j < S; ++j) {
        inputs[j] = old[i].element(entry(j));
        if (ring) {
#pragma unroll
          for (int k = 0; k < S; ++k) {
            if (k == at + j || k == at + j - S) inputs[j] = old[i].element(entry(k));
          }
        }
      }
      inputs[S] = x[i].element(c);
      z[c] = bias[c];
#pragma unroll
      for (int k = 0; k < WMAX; ++k) {
        if (k < WMAX - 1 - S) continue;
        const float v = to_compute(inputs[S - (WMAX - 1) + k]);
        if (k >= first) z[c] = fmaf(w[k][c], v, z[c]);
      }
#pragma unroll
      for (int j = 0; j < S; ++j) {
        const T kept = ring ? old[i].element(entry(j)) : inputs[j + 1];
        taken.set_element(entry(j), ring && j == at ? inputs[S] : kept);
      }
    }
    if (p.silu) {
#pragma unroll
      for (int c = 0; c < C; ++c) z[c] = silu<T>(z[c]);
    }
    if constexpr (DIM_FASTEST) {
#pragma unroll
      for (int j = 0; j < S; ++j) {
        if (!ring || j == at) {
          taken.template part<C>(j).store(state[i] + j * p.state.strides[2]);
        }
      }
    } else {
      taken.store(state[i]);
    }
    pack<T>(z).store(p.out.at(b0 + i, d0, 0));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) update_any(const UpdateArgs<T> p) {
  using F = Compute<T>;
  int64_t d;
  const int64_t b = split(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, p.dim, &d);
  if (b >= p.batch) return;
  const int64_t row = p.state_row(b, d, 1);
  if (row < 0) return;
  const int64_t S = p.state_len, L = p.seqlen;
  const bool ring = p.cache_seqlens.data != nullptr;
  int64_t start = 0;  // where in the state token 0 goes; in a shifted state: after its end
  if (ring && S > 0) start = p.ring_start(b);
  const F bias = p.bias.given() ? p.bias.load(d) * p.scale : F(0);
  for (int64_t t = 0; t < L; ++t) {
    F z = bias;
    for (int k = 0; k < p.width; ++k) {
      const int64_t s = t - (p.width - 1) + k;
      int64_t j = ring ? start + s : S + s;
      if (ring && j < 0) j += S;
      const F v = s >= 0 ? to_compute(*p.x.at(b, d, s)) : p.state.load(row, d, j);
      z = fma(p.weight.load(d, k) * p.scale, v, z);
    }
    if (p.silu) z = silu<T>(z);
    *p.out.at(b, d, t) = from_compute<T>(z);
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

// Whether update_token<T, C, S, DIM_FASTEST> suits.
template <typename T, int C, int S, bool DIM_FASTEST>
bool token_fits(const UpdateParams& params) {
  constexpr int size = sizeof(T);
  const Tensor &x = params.x, &state = params.conv_state;
  const bool one = x.ndim == 2 || x.sizes[2] == 1;
  if (!one || state.dtype != x.dtype || state.sizes[2] != S || params.weight.sizes[1] > 4) {
    return false;
  }
  if (x.sizes[1] % C != 0 || vector_width(x, 1, C, size) != C ||
      vector_width(params.out, 1, C, size) != C) {
    return false;
  }
  if (DIM_FASTEST) return vector_width(state, 1, C, size) == C;
  // A thread's channels are one dense block.
  constexpr int kAlignment = Pack<T, S * C>::kAlignment;
  return state.strides[2] == 1 && (state.strides[1] == S || C == 1) &&
         reinterpret_cast<uintptr_t>(state.data) % kAlignment == 0 &&
         state.strides[0] * size % kAlignment == 0 &&
         (C * state.strides[1]) * size % kAlignment == 0;
}

template <typename T, int C, int S, bool DIM_FASTEST>
bool launch_token(const UpdateParams& params, UpdateArgs<T>& p, cudaStream_t stream,
                  cudaError_t* e) {
  if (!has_every_kernel() || !token_fits<T, C, S, DIM_FASTEST>(params)) return false;
  // Several entries a thread share its weights, where there are enough for every thread.
  const int64_t threads = p.batch * (p.dim / C);
  if (threads > kMostParts) return false;
  p.entries = threads >= (1 << 18) ? kEntries : 1;
  p.by_column = Divisor(p.dim / C);
  *e = launch_early(update_token<T, C, S, DIM_FASTEST>, ceil_div(p.batch, p.entries) * (p.dim / C),
                    stream, p);
  return true;
}

template <typename T>
cudaError_t run(const UpdateParams& params, cudaStream_t stream) {
  UpdateArgs<T> p{};
  p.x = view<T>(params.x);
  p.out = view<T>(params.out);
  p.state = any_view<Compute<T>>(params.conv_state);
  p.weight = any_view<Compute<T>>(params.weight);
  p.bias = any_view<Compute<T>>(params.bias);
  if (given(params.cache_seqlens)) {
    p.cache_seqlens = {static_cast<const int32_t*>(params.cache_seqlens.data),
                       params.cache_seqlens.strides[0]};
  }
  if (given(params.conv_state_indices)) {
    p.conv_state_indices = {static_cast<const int32_t*>(params.conv_state_indices.data),
                            params.conv_state_indices.strides[0]};
  }
  p.batch = params.x.sizes[0];
  p.dim = params.x.sizes[1];
  p.seqlen = params.x.ndim == 3 ? params.x.sizes[2] : 1;
  p.states = params.conv_state.sizes[0];
  p.state_len = params.conv_state.sizes[2];
  p.width = static_cast<int>(params.weight.sizes[1]);
  p.silu = params.silu != 0;
  p.scale = pre_activation_scale<T>(p.silu);
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
  return launch(update_any<T>, p.batch * p.dim, stream, p);
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
