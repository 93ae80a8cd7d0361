// Host side of the scan's operators: checks, device, type of the sums.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../scan_check.h"

namespace causal_conv1d::gpu::scan {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Makes device current for its lifetime.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) : device_(device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) status_ = cudaSetDevice(device);
  }
  ~CurrentDevice() {
    if (status_ == cudaSuccess && previous_ != device_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int device_, previous_ = 0;
  cudaError_t status_;
};

// Starts kernel, if it has blocks, with bytes of dynamic shared memory.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, size_t bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  constexpr size_t without_asking = 48 << 10;
  if (bytes > without_asking) {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(bytes));
    if (e != cudaSuccess) return e;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

// Checks params, makes device current and calls f(a zero of the type of the sums).
template <typename Params, typename F>
Status run_checked(const char* caller, const Params* params, int32_t dtype, int device, F&& f) {
  if (!has_work(*params)) return ok();
  const CurrentDevice current(device);
  cudaError_t e = current.status();
  if (e == cudaSuccess) e = dtype == CAUSAL_CONV1D_FLOAT64 ? f(double{}) : f(float{});
  if (e == cudaSuccess) return ok();
  cudaGetLastError();  // or whoever launches the next kernel would find this error again
  return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s: CUDA: %s (%s)", caller, cudaGetErrorString(e),
               cudaGetErrorName(e));
}

}  // namespace causal_conv1d::gpu::scan
