// Host side of the scan's operators: device, type of the sums, kernel launch.
#pragma once

#include "../scan_check.h"
#include "launch.cuh"

namespace causal_conv1d::gpu::scan {

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

// Makes device current and calls f(a zero of the type of the sums), which returns a cudaError_t or
// a Status. params have been checked.
template <typename Params, typename F>
Status run_checked(const char* caller, const Params* params, int32_t dtype, int device, F&& f) {
  if (!has_work(*params)) return ok();
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return to_status(caller, guard.status());
  return to_status(caller, dtype == CAUSAL_CONV1D_FLOAT64 ? f(double{}) : f(float{}));
}

}  // namespace causal_conv1d::gpu::scan
