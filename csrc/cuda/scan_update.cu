// One token of the selective scan: a kernel for the types and strides that models use, which only
// has to keep up with memory, and one for all others.
#include <initializer_list>

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
  int lanes;    // a channel, a power of two
  int entries;  // up to kEntries
  bool wide_indices, softplus;

  // The state row of a batch entry; negative: padding.
  __device__ __forceinline__ int64_t row(int64_t b) const {
    if (indices == nullptr) return b;
    return wide_indices ? static_cast<const int64_t*>(indices)[b * index_stride]
                        : static_cast<const int32_t*>(indices)[b * index_stride];
  }
};

// Eight adjacent elements of BYTES, as they lie in memory: all loads of a thread start before it
// waits for any.
template <int BYTES>
struct Eight {
  uint32_t w[2 * BYTES];

  __device__ __forceinline__ void load(const char* from) {
    const uint4 q = *reinterpret_cast<const uint4*>(from);
    w[0] = q.x, w[1] = q.y, w[2] = q.z, w[3] = q.w;
    if constexpr (BYTES == 4) {
      const uint4 r = *reinterpret_cast<const uint4*>(from + 16);
      w[4] = r.x, w[5] = r.y, w[6] = r.z, w[7] = r.w;
    }
  }
  __device__ __forceinline__ void get(bool bfloat16, float (&x)[8]) const {
    if constexpr (BYTES == 4) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(w[i]);
    } else {
      unpack<8>(w, bfloat16, x);
    }
  }
};
template <int BYTES>
__device__ __forceinline__ void store_eight(const float (&x)[8], bool bfloat16, char* to) {
  if constexpr (BYTES == 4) {
    store_vector(reinterpret_cast<float*>(to), x);
  } else {
    uint32_t w[4];
    pack<8>(x, bfloat16, w);
    store_words<8>(w, to);
  }
}
template <int BYTES>
__device__ __forceinline__ uint32_t load_bits(const char* from) {
  return BYTES == 4 ? *reinterpret_cast<const uint32_t*>(from)
                    : *reinterpret_cast<const uint16_t*>(from);
}

constexpr int kEntries = 4;  // of the batch, at most, a thread of the fast kernel

template <int STATE, int X>
constexpr int kBlocks = STATE == 4 && X == 2 ? 3 : 4;  // a multiprocessor; more would spill

// A lane has eight states of a channel, of up to `entries` batch entries one after another. The
// state's elements have STATE bytes, those of x, dt, z, B, C and out, of one type, X.
template <int STATE, int X>
__global__ void __launch_bounds__(kThreads, kBlocks<STATE, X>) update_fast(const UpdateArgs p) {
  const int lane = threadIdx.x & (p.lanes - 1), a_block = kThreads / p.lanes;
  const uint32_t blocks = static_cast<uint32_t>(p.channel_blocks);
  const uint32_t entry = blockIdx.x / blocks * p.entries, block = blockIdx.x % blocks;
  const uint32_t all = static_cast<uint32_t>(p.heads * p.dim), dim = static_cast<uint32_t>(p.dim);
  const uint32_t own = block * a_block + threadIdx.x / p.lanes, channel = min(own, all - 1);
  const uint32_t h = p.heads > 1 ? channel / dim : 0, d = channel - h * dim;
  const uint32_t group = p.heads > 1 ? h / static_cast<uint32_t>(p.heads_a_group) : 0;
  const bool gated = p.z.given(), bfloat16 = p.x.dtype == CAUSAL_CONV1D_BFLOAT16;
  const float bias = load_or(p.dt_bias, 0.f, h, d), skip = load_or(p.D, 0.f, h, d);
  float A[8];
  if (p.A.step == 0) {
    const float tied = *reinterpret_cast<const float*>(p.A.at(h, d));
#pragma unroll
    for (int i = 0; i < 8; ++i) A[i] = tied;
  } else {
    load_vector(reinterpret_cast<const float*>(p.A.at(h, d)) + lane * 8, A);
  }
  const char* const state_from = p.state.at(0, h, d) + lane * 8 * STATE;
  const char *x_at = p.x.at(entry, h, d), *dt_at = p.dt.at(entry, h, d);
  const char *z_at = p.z.at(entry, h, d), *B_at = p.B.at(entry, group) + lane * 8 * X;
  const char* C_at = p.C.at(entry, group) + lane * 8 * X;
  char* out_at = p.out.at(entry, h, d);
  const uint32_t last = min(entry + p.entries, static_cast<uint32_t>(p.batch));
#pragma unroll 1
  for (uint32_t b = entry; b < last; ++b) {
    const int64_t row = p.row(b);
    const bool used = row >= 0 && row < p.states;
    char* const place = const_cast<char*>(state_from) + (used ? row : 0) * p.state.strides[0];
    Eight<STATE> state;
    Eight<X> raw_B, raw_C;
    state.load(place);
    const uint32_t raw_dt = load_bits<X>(dt_at), raw_x = load_bits<X>(x_at);
    const uint32_t raw_z = gated ? load_bits<X>(z_at) : 0;
    raw_B.load(B_at);
    raw_C.load(C_at);
    const float x = to_float(raw_x, p.x.dtype);
    float dt = to_float(raw_dt, p.x.dtype) + bias, y = 0;
    if (p.softplus) dt = softplus(dt);
    const float dtx = dt * x, rate = dt * static_cast<float>(kLog2e);
    float B[8], C[8], s[8];
    raw_B.get(bfloat16, B);
    raw_C.get(bfloat16, C);
    state.get(p.state.dtype == CAUSAL_CONV1D_BFLOAT16, s);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      s[i] = fmaf(exp2_of(rate * A[i]), s[i], dtx * B[i]);
      y = fmaf(C[i], s[i], y);
    }
    if (used && own == channel) {
      store_eight<STATE>(s, p.state.dtype == CAUSAL_CONV1D_BFLOAT16, place);
    }
    for (int mask = p.lanes / 2; mask > 0; mask /= 2) y += __shfl_xor_sync(~0u, y, mask);
    y = fmaf(skip, x, y);
    const float z = to_float(raw_z, p.x.dtype);
    if (gated) y *= z * sigmoid(z);
    if (!used) y = row < 0 ? 0.f : NAN;
    if (own == channel && lane == 0) store(out_at, p.out.dtype, y);
    x_at += p.x.strides[0], dt_at += p.dt.strides[0], z_at += p.z.strides[0];
    B_at += p.B.strides[0], C_at += p.C.strides[0], out_at += p.out.strides[0];
  }
}

// A channel is a few lanes, each with kVector adjacent states, again and again if there are more.
template <typename F>
__global__ void __launch_bounds__(kThreads) update_any(const UpdateArgs p) {
  constexpr int V = kVector<F>;
  const int lane = threadIdx.x & (p.lanes - 1), a_block = kThreads / p.lanes;
  const int64_t channel = blockIdx.x % p.channel_blocks * a_block + threadIdx.x / p.lanes;
  const int64_t b = blockIdx.x / p.channel_blocks, row = p.row(b);
  const bool active = channel < p.heads * p.dim, used = row >= 0 && row < p.states;
  const int64_t h = active ? channel / p.dim : 0, d = channel - h * p.dim;
  const int64_t group = h / p.heads_a_group;
  F dt = 0, x = 0, y = 0;
  if (active) {
    dt = load_number<F>(p.dt.at(b, h, d), p.dt.dtype) + load_or(p.dt_bias, F(0), h, d);
    x = load_number<F>(p.x.at(b, h, d), p.x.dtype);
    if (p.softplus) dt = softplus(dt);
  }
  for (int64_t n = lane * V; active && used && n < p.dstate; n += p.lanes * V) {
    F A[V], B[V], C[V], s[V];
    const Part part{0, static_cast<int>(p.dstate - n)};
    char* const place = p.state.at(row, h, d) + n * p.state.step;
    load_part(p.state, place, part, s);
    load_part(p.A, p.A.at(h, d) + n * p.A.step, part, A);
    load_part(p.B, p.B.at(b, group) + n * p.B.step, part, B);
    load_part(p.C, p.C.at(b, group) + n * p.C.step, part, C);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      s[i] = fma(exp2_of(dt * F(kLog2e) * A[i]), s[i], dt * x * B[i]);
      y = fma(C[i], s[i], y);
    }
    store_part(p.state, place, part, s);
  }
  for (int mask = p.lanes / 2; mask > 0; mask /= 2) y += __shfl_xor_sync(~0u, y, mask);
  if (!active || lane != 0) return;
  y = fma(load_or(p.D, F(0), h, d), x, y);
  if (p.z.given()) {
    const F z = load_number<F>(p.z.at(b, h, d), p.z.dtype);
    y *= z * sigmoid(z);
  }
  if (!used) y = row < 0 ? F(0) : F(NAN);
  store(p.out.at(b, h, d), p.out.dtype, y);
}

template <typename F>
View state_view(const Tensor4& t) {
  View v = view(t);
  v.vectors = v.vectors && t.sizes[t.ndim - 1] % kVector<F> == 0;
  return v;
}

template <typename F>
UpdateArgs make_args(const StateUpdateParams& params) {
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
  return p;
}

bool is_fast(const UpdateArgs& p) {
  const int64_t lanes = p.dstate / 8;
  if (p.dstate % 8 != 0 || (lanes & (lanes - 1)) != 0) return false;
  for (const View* v : {&p.state, &p.B, &p.C}) {
    if (!v->vectors) return false;
  }
  for (const View* v : {&p.dt, &p.z, &p.B, &p.C, &p.out}) {
    if (v->given() && v->dtype != p.x.dtype) return false;
  }
  for (const View* v : {&p.A, &p.D, &p.dt_bias}) {
    if (v->given() && v->dtype != CAUSAL_CONV1D_FLOAT32) return false;
  }
  if (p.heads * p.dim >= int64_t{1} << 31 || p.batch >= int64_t{1} << 31) return false;
  return p.A.vectors || p.A.step == 0;
}

template <int STATE, int X>
cudaError_t run_fast(UpdateArgs& p, cudaStream_t stream) {
  p.lanes = static_cast<int>(p.dstate / 8);
  p.channel_blocks = ceil_div(p.heads * p.dim * p.lanes, kThreads);
  // Several where there are enough blocks for it.
  p.entries = p.batch * p.channel_blocks >= 1024 ? kEntries : 1;
  return launch(update_fast<STATE, X>, ceil_div(p.batch, p.entries) * p.channel_blocks,
                dim3(kThreads), 0, stream, p);
}

template <typename F>
cudaError_t run(const StateUpdateParams& params, cudaStream_t stream) {
  UpdateArgs p = make_args<F>(params);
  if constexpr (sizeof(F) == 4) {
    const bool wide = p.state.dtype == CAUSAL_CONV1D_FLOAT32;
    const bool wide_x = p.x.dtype == CAUSAL_CONV1D_FLOAT32;
    if (is_fast(p)) {
      return wide     ? wide_x ? run_fast<4, 4>(p, stream) : run_fast<4, 2>(p, stream)
                 : wide_x ? run_fast<2, 4>(p, stream)
                      : run_fast<2, 2>(p, stream);
    }
  }
  p.lanes = 1;
  while (p.lanes < 32 && p.lanes * kVector<F> < p.dstate) p.lanes *= 2;
  p.channel_blocks = ceil_div(p.heads * p.dim * p.lanes, kThreads);
  return launch(update_any<F>, p.batch * p.channel_blocks, dim3(kThreads), 0, stream, p);
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
