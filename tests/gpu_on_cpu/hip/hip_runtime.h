// HIP, with waves of 64 lanes: as on such a GPU, a shuffle without a width would go across 64, and
// those of one width wait for the lanes of that width alone.
#pragma once

#include "../device.h"

constexpr int warpSize = 64;

// As AMD's: a lane that the group does not have gives the own value.
template <typename T>
T __shfl(T v, int from, int width = warpSize) {
  return gpu_on_cpu::exchange(v, from & (width - 1), width);
}
template <typename T>
T __shfl_down(T v, unsigned n, int width = warpSize) {
  const int own = static_cast<int>(threadIdx.x) % width, from = own + static_cast<int>(n);
  return gpu_on_cpu::exchange(v, from < width ? from : own, width);
}
template <typename T>
T __shfl_xor(T v, int mask, int width = warpSize) {
  const int own = static_cast<int>(threadIdx.x) % width, from = own ^ mask;
  return gpu_on_cpu::exchange(v, from < width ? from : own, width);
}

enum hipError_t { hipSuccess, hipErrorInvalidValue, hipErrorInvalidConfiguration };
enum hipMemcpyKind { hipMemcpyHostToDevice, hipMemcpyDeviceToHost };
enum hipStreamCaptureStatus { hipStreamCaptureStatusNone };
enum hipStreamCaptureMode { hipStreamCaptureModeRelaxed };
using hipStream_t = struct Stream*;

inline hipError_t hipGetLastError() { return hipSuccess; }
inline const char* hipGetErrorName(hipError_t e) {
  return e == hipSuccess ? "hipSuccess" : "an error";
}
inline const char* hipGetErrorString(hipError_t e) { return hipGetErrorName(e); }
inline hipError_t hipGetDevice(int* device) { return *device = 0, hipSuccess; }
inline hipError_t hipSetDevice(int) { return hipSuccess; }
inline hipError_t hipStreamSynchronize(hipStream_t) { return hipSuccess; }
inline hipError_t hipThreadExchangeStreamCaptureMode(hipStreamCaptureMode*) { return hipSuccess; }
inline hipError_t hipStreamIsCapturing(hipStream_t, hipStreamCaptureStatus* status) {
  return *status = hipStreamCaptureStatusNone, hipSuccess;
}
inline hipError_t hipMemcpyAsync(void* to, const void* from, size_t size, hipMemcpyKind,
                                 hipStream_t) {
  return std::memcpy(to, from, size), hipSuccess;
}

template <typename... Parameters, typename... Arguments>
void hipLaunchKernelGGL(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, unsigned bytes,
                        hipStream_t, const Arguments&... arguments) {
  gpu_on_cpu::run(blocks, threads.x, bytes, [&] { kernel(arguments...); });
}
