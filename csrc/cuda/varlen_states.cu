// states[i,d,j] = x[cu_seqlens[i+1] - S + j, d], or 0 where that lies before cu_seqlens[i].
#include "launch.cuh"
#include "schedule.cuh"
#include "views.cuh"

namespace causal_conv1d::gpu {
namespace {

template <typename T>
struct VarlenStatesArgs {
  const T* x;
  int64_t x_time, x_dim, tokens;
  const void* cu_seqlens;
  int64_t cu_stride;
  bool cu_int64;
  View<T> states;
  int64_t batch, dim, state_len;

  __device__ __forceinline__ int64_t offset(int64_t i) const {
    const int64_t o = cu_int64 ? static_cast<const int64_t*>(cu_seqlens)[i * cu_stride]
                               : static_cast<const int32_t*>(cu_seqlens)[i * cu_stride];
    return o < 0 ? 0 : (o > tokens ? tokens : o);
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) varlen_states(const VarlenStatesArgs<T> p) {
  int64_t j, d;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t i = split(split(n, p.dim, &d), p.state_len, &j);  // x is (tokens, dim)
  if (i >= p.batch) return;
  const int64_t t = p.offset(i + 1) - p.state_len + j;
  *p.states.at(i, d, j) = t >= p.offset(i) ? p.x[t * p.x_time + d * p.x_dim] : from_compute<T>(0);
}

template <typename T>
cudaError_t run(const VarlenStatesParams& params, cudaStream_t stream) {
  VarlenStatesArgs<T> p{};
  p.x = static_cast<const T*>(params.x.data);
  p.x_time = params.x.strides[0];
  p.x_dim = params.x.strides[1];
  p.tokens = params.x.sizes[0];
  p.cu_seqlens = params.cu_seqlens.data;
  p.cu_stride = params.cu_seqlens.strides[0];
  p.cu_int64 = params.cu_seqlens.dtype == CAUSAL_CONV1D_INT64;
  p.states = view<T>(params.states);
  p.batch = params.states.sizes[0];
  p.dim = params.states.sizes[1];
  p.state_len = params.states.sizes[2];
  return launch(varlen_states<T>, p.batch * p.dim * p.state_len, stream, p);
}

}  // namespace
}  // namespace causal_conv1d::gpu

causal_conv1d_status causal_conv1d_cuda_varlen_states(
    const causal_conv1d_varlen_states_params* params, int device, void* stream) {
  using namespace causal_conv1d;
  return gpu::run_operator("causal_conv1d_varlen_states", params, device, [&](auto zero) {
    return gpu::run<decltype(zero)>(*params, static_cast<cudaStream_t>(stream));
  });
}

#ifndef CAUSAL_CONV1D_ARCHITECTURES
#error "CMakeLists.txt defines CAUSAL_CONV1D_ARCHITECTURES"
#endif
const char* causal_conv1d_cuda_architectures(void) { return CAUSAL_CONV1D_ARCHITECTURES; }
