// Update: the convolution of one or more new tokens with a running state, which takes them in.
//
// update_token: one token, W <= S, a state of x's type whose rows of S inputs are one aligned
//   vector. A thread owns a channel: it loads its state at once, shifts it in registers and stores
//   it at once.
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
  View<T> x, out;
  AnyView<Compute<T>> state, weight, bias;
  Index cache_seqlens, conv_state_indices;
  int64_t batch, dim, seqlen, states, state_len;
  int width;
  bool silu;

  // The state row of batch entry b, or -1 if it has none: then its output is written here. A row
  // out of range gives NaN, since reading it would be worse and nobody can be told.
  __device__ __forceinline__ int64_t state_row(int64_t b, int64_t d) const {
    if (conv_state_indices.data == nullptr) return b;
    const int64_t row = conv_state_indices.at(b);
    if (row >= 0 && row < states) return row;
    const Compute<T> v = row < 0 ? Compute<T>(0) : Compute<T>(NAN);
    for (int64_t t = 0; t < seqlen; ++t) *out.at(b, d, t) = from_compute<T>(v);
    return -1;
  }
};

template <typename T, int S>
__global__ void __launch_bounds__(kThreads) update_token(const UpdateArgs<T> p) {
  int64_t d;
  const int64_t b = split(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, p.dim, &d);
  if (b >= p.batch) return;
  const int64_t row = p.state_row(b, d);
  if (row < 0) return;
  T* state = static_cast<T*>(p.state.data) + row * p.state.strides[0] + d * p.state.strides[1];
  const Pack<T, S> old = Pack<T, S>::load(state);
  const T x = *p.x.at(b, d, 0);
  float w[S][1];
  load_weights<S, 1>(p.weight, d, p.width, w);
  float z = p.bias.given() ? p.bias.load(d) : 0.0f;
  Pack<T, S> taken;  // the last S inputs, of which the last W meet a weight
#pragma unroll
  for (int k = 0; k < S; ++k) {
    taken.set_element(k, k + 1 < S ? old.element(k + 1) : x);
    if (k >= S - p.width) z = fmaf(w[k][0], taken.get(k), z);
  }
  taken.store(state);
  if (p.silu) z = silu<T>(z);
  *p.out.at(b, d, 0) = from_compute<T>(z);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) update_any(const UpdateArgs<T> p) {
  using F = Compute<T>;
  int64_t d;
  const int64_t b = split(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, p.dim, &d);
  if (b >= p.batch) return;
  const int64_t row = p.state_row(b, d);
  if (row < 0) return;
  const int64_t S = p.state_len, L = p.seqlen;
  const bool ring = p.cache_seqlens.data != nullptr;
  int64_t start = 0;  // where in the state token 0 goes; in a shifted state: after its end
  if (ring && S > 0) {
    start = p.cache_seqlens.at(b) % S;
    if (start < 0) start += S;
  }
  const F bias = p.bias.given() ? p.bias.load(d) : F(0);
  for (int64_t t = 0; t < L; ++t) {
    F z = bias;
    for (int k = 0; k < p.width; ++k) {
      const int64_t s = t - (p.width - 1) + k;
      int64_t j = ring ? start + s : S + s;
      if (ring && j < 0) j += S;
      const F v = s >= 0 ? to_compute(*p.x.at(b, d, s)) : p.state.load(row, d, j);
      z = fma(p.weight.load(d, k), v, z);
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

// The vector length if update_token can run, else 0.
template <typename T>
int token_state_len(const UpdateParams& params) {
  const Tensor& state = params.conv_state;
  const bool one = params.x.ndim == 2 || params.x.sizes[2] == 1;
  if (!one || given(params.cache_seqlens) || state.dtype != params.x.dtype) return 0;
  const int64_t S = state.sizes[2];
  if ((S != 2 && S != 4 && S != 8) || params.weight.sizes[1] > S) return 0;
  return vector_width(state, 2, static_cast<int>(S), sizeof(T)) == S ? static_cast<int>(S) : 0;
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
  if (p.seqlen == 0) return cudaSuccess;
  const int64_t threads = p.batch * p.dim;
  if constexpr (sizeof(T) <= 4) {
    switch (token_state_len<T>(params)) {
      case 2: return launch(update_token<T, 2>, threads, stream, p);
      case 4: return launch(update_token<T, 4>, threads, stream, p);
      case 8: return launch(update_token<T, 8>, threads, stream, p);
      default: break;
    }
  }
  return launch(update_any<T>, threads, stream, p);
}

}  // namespace
}  // namespace causal_conv1d::gpu

causal_conv1d_status causal_conv1d_cuda_update(const causal_conv1d_update_params* params,
                                               int device, void* stream) {
  using namespace causal_conv1d;
  return gpu::run_operator("causal_conv1d_update", *params, device, [&](auto zero, int) {
    return gpu::run<decltype(zero)>(*params, static_cast<cudaStream_t>(stream));
  });
}
