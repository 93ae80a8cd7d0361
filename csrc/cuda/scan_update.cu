// One token of the selective scan. A channel is a few lanes, each with kVector adjacent states of
// kEntries batch entries, so that A is read once for those.
#include "scan_launch.cuh"
#include "scan_math.cuh"
#include "scan_view.cuh"

namespace causal_conv1d::gpu::scan {
namespace {

constexpr int kThreads = 256;
template <typename F>
constexpr int kVector = sizeof(F) == 8 ? 2 : 4;

struct UpdateArgs {
  View state, x, dt, A, B, C, D, z, dt_bias, out;
  const void* indices;
  int64_t index_stride, states, batch, heads, dim, heads_a_group, dstate;
  int64_t channel_blocks;
  int lanes;  // a channel, a power of two
  bool wide_indices, softplus;

  // The state row of a batch entry; negative: padding.
  __device__ __forceinline__ int64_t row(int64_t b) const {
    if (indices == nullptr) return b;
    return wide_indices ? static_cast<const int64_t*>(indices)[b * index_stride]
                        : static_cast<const int32_t*>(indices)[b * index_stride];
  }
};

// States n .. n + kVector - 1, zero beyond dstate. step and vectors are of that dimension.
template <typename F>
__device__ __forceinline__ void load_states(const View& v, const char* row, int64_t n,
                                            int64_t dstate, F (&x)[kVector<F>]) {
  load_times(v, row, n, 0, dstate, x);
}

// The sum over the states of C h for one batch entry, of which the lane has a part; changes h.
template <typename F>
__device__ __forceinline__ F advance(const F (&A)[kVector<F>], const F (&B)[kVector<F>],
                                     const F (&C)[kVector<F>], F dt, F dtx, F (&h)[kVector<F>]) {
  F y = 0;
#pragma unroll
  for (int i = 0; i < kVector<F>; ++i) {
    h[i] = fma(exp2_of(dt * A[i]), h[i], dtx * B[i]);
    y = fma(C[i], h[i], y);
  }
  return y;
}

template <typename F, int ENTRIES>
__global__ void __launch_bounds__(kThreads) update(const UpdateArgs p) {
  constexpr int V = kVector<F>;
  const int lane = threadIdx.x & (p.lanes - 1), a_block = kThreads / p.lanes;
  const int64_t channel = blockIdx.x % p.channel_blocks * a_block + threadIdx.x / p.lanes;
  const int64_t first = blockIdx.x / p.channel_blocks * ENTRIES;
  const bool active = channel < p.heads * p.dim;
  const int64_t h = active && p.heads > 1 ? channel / p.dim : 0, d = channel - h * p.dim;
  const int64_t group = p.heads > 1 ? h / p.heads_a_group : 0;
  int64_t rows[ENTRIES];
  bool used[ENTRIES];
  F dt[ENTRIES], dtx[ENTRIES], x[ENTRIES], y[ENTRIES];
  const F bias = active ? load_or(p.dt_bias, F(0), h, d) : F(0);
#pragma unroll
  for (int e = 0; e < ENTRIES; ++e) {
    const int64_t b = first + e;
    const bool there = active && b < p.batch;
    rows[e] = there ? p.row(b) : -1;
    used[e] = rows[e] >= 0 && rows[e] < p.states;
    dt[e] = there ? load<F>(p.dt.at(b, h, d), p.dt.dtype) + bias : F(0);
    x[e] = there ? load<F>(p.x.at(b, h, d), p.x.dtype) : F(0);
    if (p.softplus) dt[e] = softplus(dt[e]);
    dtx[e] = dt[e] * x[e];
    y[e] = 0;
  }
  for (int64_t n = lane * V; active && n < p.dstate; n += p.lanes * V) {
    F A[V], state[ENTRIES][V];
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
      if (used[e]) load_states<F>(p.state, p.state.at(rows[e], h, d), n, p.dstate, state[e]);
    }
    load_states<F>(p.A, p.A.at(h, d), n, p.dstate, A);
#pragma unroll
    for (int i = 0; i < V; ++i) A[i] *= F(kLog2e);
#pragma unroll
    for (int e = 0; e < ENTRIES; ++e) {
      if (!used[e]) continue;
      F B[V], C[V];
      load_states<F>(p.B, p.B.at(first + e, group), n, p.dstate, B);
      load_states<F>(p.C, p.C.at(first + e, group), n, p.dstate, C);
      y[e] += advance<F>(A, B, C, dt[e], dtx[e], state[e]);
      store_times(p.state, p.state.at(rows[e], h, d), n, 0, p.dstate, state[e]);
    }
  }
  const F skip = active ? load_or(p.D, F(0), h, d) : F(0);
#pragma unroll
  for (int e = 0; e < ENTRIES; ++e) {
    for (int mask = p.lanes / 2; mask > 0; mask /= 2) y[e] += __shfl_xor_sync(~0u, y[e], mask);
    const int64_t b = first + e;
    if (!active || b >= p.batch || lane != 0) continue;
    F out = fma(skip, x[e], y[e]);
    if (p.z.given()) {
      const F z = load<F>(p.z.at(b, h, d), p.z.dtype);
      out *= z * sigmoid(z);
    }
    if (!used[e]) out = rows[e] < 0 ? F(0) : F(NAN);
    store(p.out.at(b, h, d), p.out.dtype, out);
  }
}

template <typename F>
View state_view(const Tensor4& t) {
  View v = view(t);
  v.vectors = v.vectors && t.sizes[t.ndim - 1] % kVector<F> == 0;
  return v;
}

template <typename F>
cudaError_t run(const StateUpdateParams& params, cudaStream_t stream) {
  UpdateArgs p{};
  p.state = state_view<F>(params.state);
  p.A = state_view<F>(params.A);
  p.B = state_view<F>(params.B);
  p.C = state_view<F>(params.C);
  p.x = view(params.x);
  p.dt = view(params.dt);
  p.D = view(params.D);
  p.z = view(params.z);
  p.dt_bias = view(params.dt_bias);
  p.out = view(params.out);
  if (given(params.state_indices)) {
    p.indices = params.state_indices.data;
    p.index_stride = params.state_indices.strides[0];
    p.wide_indices = params.state_indices.dtype == CAUSAL_CONV1D_INT64;
  }
  p.states = params.state.sizes[0];
  p.batch = params.x.sizes[0];
  p.heads = params.x.sizes[1];
  p.dim = params.x.sizes[2];
  p.heads_a_group = p.heads / params.B.sizes[1];
  p.dstate = params.A.sizes[2];
  p.softplus = params.dt_softplus != 0;
  p.lanes = 1;
  while (p.lanes < 32 && p.lanes * kVector<F> < p.dstate) p.lanes *= 2;
  p.channel_blocks = divide_up(p.heads * p.dim * p.lanes, kThreads);
  constexpr int entries = sizeof(F) == 8 ? 2 : 4;
  // Where there are enough blocks for it.
  if (p.batch * p.channel_blocks < 2048) {
    return launch(update<F, 1>, p.batch * p.channel_blocks, dim3(kThreads), 0, stream, p);
  }
  return launch(update<F, entries>, divide_up(p.batch, entries) * p.channel_blocks, dim3(kThreads),
                0, stream, p);
}

}  // namespace
}  // namespace causal_conv1d::gpu::scan

causal_conv1d_status causal_conv1d_cuda_state_update(
    const causal_conv1d_state_update_params* params, int device, void* stream) {
  using namespace causal_conv1d;
  using namespace causal_conv1d::gpu::scan;
  const Status status = check(params);
  if (status.code != CAUSAL_CONV1D_OK) return status;
  return run_checked("selective_state_update", params, params->x.dtype, device, [&](auto zero) {
    return run<decltype(zero)>(*params, static_cast<cudaStream_t>(stream));
  });
}
