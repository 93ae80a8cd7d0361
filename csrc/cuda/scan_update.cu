// One token of the selective scan: a kernel for the types and strides that models use, and one for
// all others.
#include <initializer_list>

#include "scan_launch.cuh"
#include "scan_update_fast.cuh"

namespace causal_conv1d::gpu::scan {
namespace {

constexpr int kThreads = kUpdateThreads;
template <typename F>
constexpr int kVector = sizeof(F) == 8 ? 2 : 4;

struct UpdateArgs {
  View state, x, dt, A, B, C, D, z, dt_bias, out;
  StateRows rows;
  int64_t batch, heads, dim, heads_a_group, dstate;
  int64_t channel_blocks;
  int lane_bits;  // of a channel
  bool softplus;
};

// A channel is a few lanes, each with kVector adjacent states, again and again if there are more.
template <typename F>
__global__ void __launch_bounds__(kThreads, 1) update_any(const UpdateArgs p) {
  constexpr int V = kVector<F>;
  const int lanes = 1 << p.lane_bits, lane = threadIdx.x & (lanes - 1);
  const int64_t thread = blockIdx.x % p.channel_blocks * kThreads + threadIdx.x;
  const int64_t channel = thread >> p.lane_bits, b = blockIdx.x / p.channel_blocks;
  const int64_t row = p.rows.of(b);
  const bool active = channel < p.heads * p.dim, used = row >= 0 && row < p.rows.count;
  const int64_t h = active ? channel / p.dim : 0, d = channel - h * p.dim;
  const int64_t group = h / p.heads_a_group;
  F dt = 0, x = 0, y = 0;
  if (active) {
    dt = load_number<F>(p.dt.at(b, h, d), p.dt.dtype) + load_or(p.dt_bias, F(0), h, d);
    x = load_number<F>(p.x.at(b, h, d), p.x.dtype);
    if (p.softplus) dt = softplus(dt);
  }
  for (int64_t n = lane * V; active && used && n < p.dstate; n += lanes * V) {
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
  for (int mask = lanes / 2; mask > 0; mask /= 2) y += __shfl_xor_sync(~0u, y, mask);
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
    p.rows.indices = params.state_indices.data;
    p.rows.stride = params.state_indices.strides[0];
    p.rows.wide = params.state_indices.dtype == CAUSAL_CONV1D_INT64;
  }
  p.rows.count = params.state.sizes[0];
  p.batch = params.x.sizes[0];
  p.heads = params.x.sizes[1];
  p.dim = params.x.sizes[2];
  p.heads_a_group = p.heads / params.B.sizes[1];
  p.dstate = params.A.sizes[2];
  p.softplus = params.dt_softplus != 0;
  return p;
}

void set_lanes(UpdateArgs& p, int64_t enough) {
  while (p.lane_bits < 5 && int64_t{1} << p.lane_bits < enough) ++p.lane_bits;
  p.channel_blocks = ceil_div((p.heads * p.dim) << p.lane_bits, kThreads);
}

bool are_fast_types(const UpdateArgs& p) {
  for (const View* v : {&p.dt, &p.z, &p.B, &p.C, &p.out}) {
    if (v->given() && v->dtype != p.x.dtype) return false;
  }
  for (const View* v : {&p.A, &p.D, &p.dt_bias}) {
    if (v->given() && v->dtype != CAUSAL_CONV1D_FLOAT32) return false;
  }
  return p.state.dtype == CAUSAL_CONV1D_FLOAT32 || p.state.dtype == p.x.dtype;
}

bool is_fast(const UpdateArgs& p) {
  if (p.dstate < 16 || (p.dstate & (p.dstate - 1)) != 0 || !are_fast_types(p)) return false;
  for (const View* v : {&p.state, &p.B, &p.C}) {
    if (!v->vectors) return false;
  }
  if (!p.A.vectors && p.A.step != 0) return false;
  // blockIdx.y, and numbers of threads, have fewer bits.
  if (p.batch > 0xffff || p.heads * p.dim > int64_t{1} << 26) return false;
  // A few entries of B and C are within 32 bits.
  for (const View* v : {&p.state, &p.x, &p.dt, &p.A, &p.B, &p.C, &p.D, &p.z, &p.dt_bias, &p.out}) {
    for (int i = v == &p.state ? 1 : 0; i < 3; ++i) {
      if (v->strides[i] < 0 || v->strides[i] >= int64_t{1} << 29) return false;
    }
  }
  return true;
}

FastView fast_view(const View& v) {
  FastView f{v.data, {}};
  for (int i = 0; i < 3; ++i) f.strides[i] = static_cast<uint32_t>(v.strides[i]);
  return f;
}

template <typename K>
cudaError_t run_form(UpdateArgs& p, cudaStream_t stream) {
  set_lanes(p, p.dstate / (K::V * K::P));
  FastUpdateArgs f{};
  f.state = fast_view(p.state);
  f.x = fast_view(p.x);
  f.dt = fast_view(p.dt);
  f.A = fast_view(p.A);
  f.B = fast_view(p.B);
  f.C = fast_view(p.C);
  f.D = fast_view(p.D);
  f.z = fast_view(p.z);
  f.dt_bias = fast_view(p.dt_bias);
  f.out = fast_view(p.out);
  f.rows = p.rows;
  f.state_stride = p.state.strides[0];
  f.batch = static_cast<uint32_t>(p.batch);
  f.heads = static_cast<uint32_t>(p.heads);
  f.dim = static_cast<uint32_t>(p.dim);
  f.heads_a_group = static_cast<uint32_t>(p.heads_a_group);
  f.lane_bits = p.lane_bits;
  f.tied = p.A.step == 0;
  f.softplus = p.softplus;
  const dim3 blocks(static_cast<unsigned>(p.channel_blocks),
                    static_cast<unsigned>(ceil_div(p.batch, K::E)));
  update_fast<K><<<blocks, kThreads, 0, stream>>>(f);
  return cudaGetLastError();
}

template <int32_t STATE, int32_t X>
cudaError_t run_fast(UpdateArgs& p, cudaStream_t stream) {
  if constexpr (STATE == CAUSAL_CONV1D_FLOAT32) {
    if (p.dstate > 128) return run_form<UpdateForm<STATE, X, 1, 2>>(p, stream);
  }
  // Several entries a lane where there are enough lanes even so.
  const bool several = p.batch * p.heads * p.dim * p.dstate >= 1 << 20;
  return several ? run_form<UpdateForm<STATE, X, 4, 1>>(p, stream)
                 : run_form<UpdateForm<STATE, X, 1, 1>>(p, stream);
}

template <int32_t X>
cudaError_t run_fast(UpdateArgs& p, cudaStream_t stream) {
  return p.state.dtype == X ? run_fast<X, X>(p, stream)
                            : run_fast<CAUSAL_CONV1D_FLOAT32, X>(p, stream);
}

template <typename F>
cudaError_t run(const StateUpdateParams& params, cudaStream_t stream) {
  UpdateArgs p = make_args<F>(params);
  if constexpr (sizeof(F) == 4) {
    if (is_fast(p)) {
      return p.x.dtype == CAUSAL_CONV1D_FLOAT32   ? run_fast<CAUSAL_CONV1D_FLOAT32>(p, stream)
             : p.x.dtype == CAUSAL_CONV1D_FLOAT16 ? run_fast<CAUSAL_CONV1D_FLOAT16>(p, stream)
                                                  : run_fast<CAUSAL_CONV1D_BFLOAT16>(p, stream);
    }
  }
  set_lanes(p, ceil_div(p.dstate, kVector<F>));
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
