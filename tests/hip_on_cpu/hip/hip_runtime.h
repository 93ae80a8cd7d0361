// A stand-in for HIP that runs kernels on the CPU, so that the sources of the HIP library, compiled
// by g++, can be tested by value where there is no AMD GPU. Each thread of a block is a fiber,
// which goes on until it meets a barrier or a shuffle; fibers take turns upwards in one block and
// downwards in the next. Device memory is the host's, and streams have nothing to wait for. A wave
// has 64 lanes: as on such a GPU, a shuffle without a width would go across 64, and those of one
// width wait for the lanes of that width alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1) : x(x_), y(1), z(1) {}
};

namespace hip_on_cpu {

extern dim3 thread, block;
void wait_for_block();
bool any_of_block(bool v);
// What lane `from` of the calling lane's group of `width` gives; all lanes of that must call it.
uint64_t exchange(uint64_t v, int from, int width);
void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel);

template <typename T>
T exchange_of(T v, int from, int width) {
  static_assert(sizeof v <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  bits = exchange(bits, from, width);
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

}  // namespace hip_on_cpu

#define threadIdx hip_on_cpu::thread
#define blockIdx hip_on_cpu::block

constexpr int warpSize = 64;

inline void __syncthreads() { hip_on_cpu::wait_for_block(); }
inline int __syncthreads_or(int v) { return hip_on_cpu::any_of_block(v != 0); }

// As AMD's: a lane that the group does not have gives the own value.
template <typename T>
T __shfl(T v, int from, int width = warpSize) {
  return hip_on_cpu::exchange_of(v, from & (width - 1), width);
}
template <typename T>
T __shfl_down(T v, unsigned n, int width = warpSize) {
  const int own = static_cast<int>(threadIdx.x) % width, from = own + static_cast<int>(n);
  return hip_on_cpu::exchange_of(v, from < width ? from : own, width);
}
template <typename T>
T __shfl_xor(T v, int mask, int width = warpSize) {
  const int own = static_cast<int>(threadIdx.x) % width, from = own ^ mask;
  return hip_on_cpu::exchange_of(v, from < width ? from : own, width);
}
inline int atomicMin(int* p, int v) {  // fibers do not preempt each other
  const int old = *p;
  if (v < old) *p = v;
  return old;
}

inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dadd_rn(double a, double b) { return a + b; }
using std::exp, std::fma;
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
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
void hipLaunchKernelGGL(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, unsigned,
                        hipStream_t, const Arguments&... arguments) {
  hip_on_cpu::run(blocks.x, threads.x, [&] { kernel(arguments...); });
}
