// CUDA, of a GPU whose compute capability the stand-in's build gives as __CUDA_ARCH__.
#pragma once

#include <algorithm>

#include "../device.h"
#include "ptx.h"

#define __align__(n) alignas(n)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline int64_t max(int64_t a, int b) { return std::max(a, int64_t{b}); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffsll(unsigned long long v) { return __builtin_ffsll(static_cast<long long>(v)); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, unsigned n) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (n & 31));
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t chosen) {
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned from = chosen >> 4 * i & 7;
    r |= static_cast<uint32_t>((uint64_t{b} << 32 | a) >> 8 * from & 0xff) << 8 * i;
  }
  return r;
}

// Lanes of a warp. Of a smaller width each part of the warp is one of its own.
inline int lane_from(int width, int from) {
  const int lane = static_cast<int>(threadIdx.x % 32), first = lane - lane % width;
  return from < first || from >= first + width ? lane : from;
}
inline void check_mask(unsigned mask) {
  if (mask != ~0u) gpu_on_cpu::fail("not all lanes are asked for");
}
template <typename T>
T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
  check_mask(mask);
  const int lane = static_cast<int>(threadIdx.x % 32);
  return gpu_on_cpu::exchange(v, lane - lane % width + (from & (width - 1)), 32);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, int n, int width = 32) {
  check_mask(mask);
  return gpu_on_cpu::exchange(v, lane_from(width, static_cast<int>(threadIdx.x % 32) - n), 32);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, int n, int width = 32) {
  check_mask(mask);
  return gpu_on_cpu::exchange(v, lane_from(width, static_cast<int>(threadIdx.x % 32) + n), 32);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int n, int width = 32) {
  check_mask(mask);
  return gpu_on_cpu::exchange(v, lane_from(width, static_cast<int>(threadIdx.x % 32) ^ n), 32);
}
inline void __syncwarp() { gpu_on_cpu::together(gpu_on_cpu::Together::kSync, 0, 0, 32); }
inline unsigned __ballot_sync(unsigned mask, bool v) {
  check_mask(mask);
  return static_cast<unsigned>(gpu_on_cpu::together(gpu_on_cpu::Together::kBallot, v, 0, 32));
}
inline bool __any_sync(unsigned mask, bool v) { return __ballot_sync(mask, v) != 0; }
inline bool __all_sync(unsigned mask, bool v) { return __ballot_sync(mask, v) == ~0u; }
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) {
  check_mask(mask);
  return static_cast<unsigned>(gpu_on_cpu::together(gpu_on_cpu::Together::kLeast, v, 0, 32));
}
inline size_t __cvta_generic_to_shared(const void* p) {
  return static_cast<size_t>(static_cast<const char*>(p) - gpu_on_cpu::shared_memory);
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
using cudaStream_t = struct Stream*;
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t e) {
  return e == cudaSuccess ? "cudaSuccess" : "an error";
}
inline const char* cudaGetErrorString(cudaError_t e) { return cudaGetErrorName(e); }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *value = __CUDA_ARCH__ / 100; break;
    case cudaDevAttrComputeCapabilityMinor: *value = __CUDA_ARCH__ / 10 % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = 16; break;
    default: *value = static_cast<int>(gpu_on_cpu::kMostDynamic);
  }
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, Kernel*) {
  return found->ptxVersion = __CUDA_ARCH__ / 10, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                                   cudaStream_t) {
  return std::memcpy(to, from, size), cudaSuccess;
}

namespace gpu_on_cpu {

// kernel<<<blocks, threads, bytes, stream>>>(arguments) is launch(kernel, ...)(arguments).
template <typename... Parameters>
auto launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t bytes, cudaStream_t) {
  return [=](const Parameters&... arguments) {
    run(blocks, threads.x, bytes, [&] { kernel(arguments...); });
  };
}

}  // namespace gpu_on_cpu

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  gpu_on_cpu::launch(kernel, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream)(arguments...);
  return cudaSuccess;
}
