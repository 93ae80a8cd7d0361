// CUDA's headers; or, for AMD's GPUs, the same names for what HIP has, and in plain C++ what
// ptx.cuh has otherwise. HIP builds have the kernels for any strides alone. Their warps are groups
// of 32 lanes, a wave of 64 lanes being two, which may be at different places of the code: no vote
// or shuffle goes beyond a group.
#pragma once

namespace causal_conv1d::gpu {

// Compute capability 7.5, before cp.async, cache policies and arithmetic of bf16.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kTuring = true;
#else
constexpr bool kTuring = false;
#endif

}  // namespace causal_conv1d::gpu

#ifndef CAUSAL_CONV1D_HIP

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace causal_conv1d::gpu {

constexpr const char* kRuntime = "CUDA";
constexpr const char* kNoMemory = "cudaErrorMemoryAllocation";  // as cudaGetErrorName tells it

}  // namespace causal_conv1d::gpu

#else

#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>

#include <cstdint>

#define cudaError_t hipError_t
#define cudaErrorInvalidConfiguration hipErrorInvalidConfiguration
#define cudaErrorInvalidValue hipErrorInvalidValue
#define cudaGetDevice hipGetDevice
#define cudaGetErrorName hipGetErrorName
#define cudaGetErrorString hipGetErrorString
#define cudaGetLastError hipGetLastError
#define cudaMemcpyAsync hipMemcpyAsync
#define cudaMemcpyDeviceToHost hipMemcpyDeviceToHost
#define cudaMemcpyHostToDevice hipMemcpyHostToDevice
#define cudaSetDevice hipSetDevice
#define cudaStreamCaptureMode hipStreamCaptureMode
#define cudaStreamCaptureModeRelaxed hipStreamCaptureModeRelaxed
#define cudaStreamCaptureStatus hipStreamCaptureStatus
#define cudaStreamCaptureStatusNone hipStreamCaptureStatusNone
#define cudaStreamIsCapturing hipStreamIsCapturing
#define cudaStreamSynchronize hipStreamSynchronize
#define cudaStream_t hipStream_t
#define cudaSuccess hipSuccess
#define cudaThreadExchangeStreamCaptureMode hipThreadExchangeStreamCaptureMode

// The second number of CUDA's, blocks per multiprocessor, would be waves per SIMD.
#undef __launch_bounds__
#define __launch_bounds__(threads, ...) __attribute__((amdgpu_flat_work_group_size(1, threads)))

namespace causal_conv1d::gpu {

constexpr const char* kRuntime = "HIP";
constexpr const char* kNoMemory = "hipErrorOutOfMemory";

// HIP's own differs from version to version.
struct __nv_bfloat16 {
  uint16_t bits;
};
__device__ __forceinline__ float __bfloat162float(__nv_bfloat16 v) {
  return __uint_as_float(uint32_t{v.bits} << 16);
}
__device__ __forceinline__ __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t bits = __float_as_uint(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};  // NaN
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Of a group of lanes, all of which must call it.
template <typename T>
__device__ __forceinline__ T __shfl_sync(unsigned, T v, int from) {
  return __shfl(v, from, 32);
}
template <typename T>
__device__ __forceinline__ T __shfl_down_sync(unsigned, T v, int n) {
  return __shfl_down(v, n, 32);
}
template <typename T>
__device__ __forceinline__ T __shfl_xor_sync(unsigned, T v, int n) {
  return __shfl_xor(v, n, 32);
}
__device__ __forceinline__ unsigned least_of_warp(unsigned v) {
#pragma unroll
  for (int n = 16; n > 0; n /= 2) {
    const unsigned other = __shfl_xor(v, n, 32);
    v = other < v ? other : v;
  }
  return v;
}
__device__ __forceinline__ bool __any_sync(unsigned, bool v) {
  return least_of_warp(v ? 0 : 1) == 0;
}

__device__ __forceinline__ void pdl_launch() {}
__device__ __forceinline__ void pdl_wait() {}
template <typename F>
__device__ __forceinline__ F load_evict_first(const F* from) {
  return *from;
}
template <typename... Ts>
__device__ __forceinline__ void opaque(Ts&...) {}
__device__ __forceinline__ float tanh_approx(float h) { return tanhf(h); }
__device__ __forceinline__ float reciprocal_approx(float v) { return 1.0f / v; }

}  // namespace causal_conv1d::gpu

#endif
