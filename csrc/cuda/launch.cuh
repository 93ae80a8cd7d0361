// Host side of all operators: checks, device, choice of layout, kernel launch.
#pragma once

#include <atomic>
#include <initializer_list>

#include "common.cuh"
#include "tiles.cuh"

namespace causal_conv1d::gpu {

// Starts kernel with one thread for each of threads items, in blocks of kThreads.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

// Whether the current device has programmatic dependent launch, the machine code is for that (a
// kernel made of older PTX would not wait), and graphs can capture it. Asked once a device.
template <typename Kernel>
bool may_start_early(Kernel* kernel) {
  constexpr int kDevices = 64;
  enum : char { kUnknown, kNo, kYes };
  static std::atomic<char> known[kDevices];
  int device = 0, driver = 0, runtime = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= kDevices) return false;
  char answer = known[device].load(std::memory_order_relaxed);
  if (answer == kUnknown) {
    cudaFuncAttributes code{};
    const bool can = cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12040 &&
                     cudaRuntimeGetVersion(&runtime) == cudaSuccess && runtime >= 12040 &&
                     cudaFuncGetAttributes(&code, kernel) == cudaSuccess && code.ptxVersion >= 90;
    if (!can) cudaGetLastError();
    answer = can ? kYes : kNo;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == kYes;
}

// launch() for a kernel that calls wait_for_kernel_before() before it touches memory: it may be
// brought to the GPU while the one before it on the stream still runs.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), int64_t threads, cudaStream_t stream,
                         const Arguments&... arguments) {
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks == 0 || blocks > 0x7fffffff || !may_start_early(kernel)) {
    return launch(kernel, threads, stream, arguments...);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// Checks params, makes device current and calls f(a zero of x's element type).
template <typename Params, typename F>
Status run_operator(const char* caller, const Params* params, int device, F&& f) {
  const Status status = check(params);
  if (status.code != CAUSAL_CONV1D_OK || !has_work(*params)) return status;
  const DeviceGuard guard(device);
  cudaError_t e = guard.status();
  if (e == cudaSuccess) dispatch_dtype(params->x.dtype, [&](auto zero) { e = f(zero); });
  return to_status(caller, e);
}

// Time is the contiguous axis of channel-first tensors; a single time step or channel decides
// nothing, so the other axis' stride does.
inline bool is_channel_last(const Tensor& x) {
  const bool unit_dim = x.strides[1] == 1 || x.sizes[1] == 1;
  const bool unit_time = x.strides[2] == 1 || x.sizes[2] == 1;
  if (unit_dim && unit_time) return x.sizes[1] >= x.sizes[2];
  return unit_dim || (!unit_time && x.strides[1] < x.strides[2]);
}

// How many adjacent channels, at most max, all tensors can give in one access; 0 or 1: no more than
// one by one.
inline int common_channels(int max, int size, int64_t dim,
                           std::initializer_list<const Tensor*> tensors) {
  int n = max;
  for (const Tensor* t : tensors) {
    const int width = vector_width(*t, 1, max, size);
    n = width < n ? width : n;
  }
  while (n > 1 && dim % n != 0) n /= 2;
  return n;
}

}  // namespace causal_conv1d::gpu
