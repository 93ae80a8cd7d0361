// The host's side of all operators: checks, device, kernel launch.
#pragma once

#include <atomic>

#include "../check.h"
#include "gpu.h"
#include "schedule.h"
#include "types.cuh"

namespace causal_conv1d::gpu {

// Starts kernel in blocks of kThreads, at least `threads` in all, each with so many bytes of
// dynamic shared memory.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_shared(void (*kernel)(Parameters...), int64_t threads, int64_t bytes,
                          cudaStream_t stream, const Arguments&... arguments) {
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
#ifdef CAUSAL_CONV1D_HIP
  hipLaunchKernelGGL(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                     static_cast<unsigned>(bytes), stream, arguments...);
#else
  kernel<<<static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(bytes), stream>>>(
      arguments...);
#endif
  return cudaGetLastError();
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  return launch_shared(kernel, threads, 0, stream, arguments...);
}

#ifdef CAUSAL_CONV1D_HIP  // which has no programmatic dependent launch

template <typename... Parameters, typename... Arguments>
cudaError_t launch_pdl_shared(void (*kernel)(Parameters...), int64_t threads, int64_t bytes,
                              cudaStream_t stream, const Arguments&... arguments) {
  return launch_shared(kernel, threads, bytes, stream, arguments...);
}

#else

// What ask() says of the current device, which must be the same each time: asked once per device.
class OncePerDevice {
 public:
  template <typename F>
  bool get(F&& ask) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= kDevices) return false;
    char answer = known_[device].load(std::memory_order_relaxed);
    if (answer == kUnknown) {
      answer = ask() ? kYes : kNo;
      if (answer == kNo) cudaGetLastError();
      known_[device].store(answer, std::memory_order_relaxed);
    }
    return answer == kYes;
  }

 private:
  static constexpr int kDevices = 64;
  enum : char { kUnknown, kNo, kYes };
  std::atomic<char> known_[kDevices] = {};
};

// Whether programmatic dependent launch works on the current device: the device has it, the machine
// code is for that (a kernel of older PTX would not wait), and graphs can capture it.
template <typename Kernel>
bool has_pdl(Kernel* kernel) {
  static OncePerDevice known;
  return known.get([&] {
    int driver = 0, runtime = 0;
    cudaFuncAttributes code{};
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12040 &&
           cudaRuntimeGetVersion(&runtime) == cudaSuccess && runtime >= 12040 &&
           cudaFuncGetAttributes(&code, kernel) == cudaSuccess && code.ptxVersion >= 90;
  });
}

// Whether the library has code of kernel, and of others with these parameters, for the current
// device.
template <typename Kernel>
bool has_code(Kernel* kernel) {
  static OncePerDevice known;
  return known.get([&] {
    cudaFuncAttributes code{};
    return cudaFuncGetAttributes(&code, kernel) == cudaSuccess;
  });
}

// launch_shared() for a kernel that calls pdl_wait() before it touches memory: its blocks may start
// while the kernel before it on the stream still runs.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_pdl_shared(void (*kernel)(Parameters...), int64_t threads, int64_t bytes,
                              cudaStream_t stream, const Arguments&... arguments) {
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks == 0 || blocks > 0x7fffffff || !has_pdl(kernel)) {
    return launch_shared(kernel, threads, bytes, stream, arguments...);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

#endif

template <typename... Parameters, typename... Arguments>
cudaError_t launch_pdl(void (*kernel)(Parameters...), int64_t threads, cudaStream_t stream,
                       const Arguments&... arguments) {
  return launch_pdl_shared(kernel, threads, 0, stream, arguments...);
}

// Makes device current for its lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) status_ = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (status_ == cudaSuccess && previous_ != device_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int device_, previous_ = 0;
  cudaError_t status_;
};

inline Status to_status(const char* caller, cudaError_t e) {
  if (e == cudaSuccess) return ok();
  (void)cudaGetLastError();  // or whoever launches the next kernel would find this error again
  return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s: %s: %s (%s)", caller, kRuntime,
               cudaGetErrorString(e), cudaGetErrorName(e));
}

inline Status to_status(const char*, const Status& status) { return status; }

// Makes device current and calls f(a zero of x's element type), which returns a cudaError_t or a
// Status, if the call is valid and has work.
template <typename Params, typename F>
Status run_checked(const char* caller, const Status& checked, const Params* params, int device,
                   F&& f) {
  if (checked.code != CAUSAL_CONV1D_OK || !has_work(*params)) return checked;
  const DeviceGuard guard(device);
  Status status = to_status(caller, guard.status());
  if (status.code == CAUSAL_CONV1D_OK) {
    dispatch_dtype(params->x.dtype, [&](auto zero) { status = to_status(caller, f(zero)); });
  }
  return status;
}

// Checks params first.
template <typename Params, typename F>
Status run_operator(const char* caller, const Params* params, int device, F&& f) {
  return run_checked(caller, check(params), params, device, static_cast<F&&>(f));
}

// Calls f() if a caller's workspace is what is needed.
template <typename F>
Status run_in_workspace(const char* caller, int64_t needed, const void* workspace, int64_t size,
                        F&& f) {
  if (size < needed) {
    return error(CAUSAL_CONV1D_INVALID_ARGUMENT, "%s: workspace must have %lld bytes, got %lld",
                 caller, static_cast<long long>(needed), static_cast<long long>(size));
  }
  if (needed > 0 && (workspace == nullptr || reinterpret_cast<uintptr_t>(workspace) % 16 != 0)) {
    return error(CAUSAL_CONV1D_INVALID_ARGUMENT,
                 "%s: workspace must be memory that is aligned to 16 bytes, got %p", caller,
                 workspace);
  }
  return to_status(caller, f());
}

}  // namespace causal_conv1d::gpu
