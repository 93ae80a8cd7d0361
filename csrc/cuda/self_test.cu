// At the first call of a kernel on a GPU a small call of it is compared by value with the CPU's.
// One that is missing, was compiled wrongly or is not meant for the GPU is then not used there.
#include "../scan_self_test.h"
#include "../self_test.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "../torch/register.h"
#include "launch.cuh"

namespace causal_conv1d::gpu {
namespace {

constexpr int kDevices = 64;
constexpr int kConvolutions = 4;           // the first operations; the others are the scan's
constexpr int64_t kWorkspace = 256 << 10;  // where the backwards' begin, after the tensors
constexpr int64_t kMemory = 1 << 20;

struct Expected {
  decltype(&causal_conv1d_cpu_forward) forward;
  decltype(&causal_conv1d_cpu_backward) backward;
  decltype(&causal_conv1d_cpu_update) update;
  decltype(&causal_conv1d_cpu_varlen_states) varlen_states;
  decltype(&causal_conv1d_cpu_scan_forward) scan_forward;
  decltype(&causal_conv1d_cpu_scan_backward) scan_backward;
  decltype(&causal_conv1d_cpu_state_update) state_update;

  Status operator()(const ForwardParams& p) const { return forward(&p, 1); }
  Status operator()(const BackwardParams& p) const { return backward(&p, 1); }
  Status operator()(const UpdateParams& p) const { return update(&p, 1); }
  Status operator()(const VarlenStatesParams& p) const { return varlen_states(&p, 1); }
  Status operator()(const ScanForwardParams& p) const { return scan_forward(&p, 1); }
  Status operator()(const ScanBackwardParams& p) const { return scan_backward(&p, 1); }
  Status operator()(const StateUpdateParams& p) const { return state_update(&p, 1); }
};

struct Tested {
  int device;
  void* stream;
  char* workspace;

  Status operator()(const ForwardParams& p) const {
    return causal_conv1d_cuda_forward(&p, device, stream);
  }
  Status operator()(const BackwardParams& p) const {
    const int64_t size = causal_conv1d_cuda_backward_workspace_size(&p);
    if (size > kMemory - kWorkspace) return too_small();
    return causal_conv1d_cuda_backward(&p, device, stream, workspace, size);
  }
  Status operator()(const UpdateParams& p) const {
    return causal_conv1d_cuda_update(&p, device, stream);
  }
  Status operator()(const VarlenStatesParams& p) const {
    return causal_conv1d_cuda_varlen_states(&p, device, stream);
  }
#ifndef CAUSAL_CONV1D_HIP  // which has no scan
  Status operator()(const ScanForwardParams& p) const {
    const int64_t size = causal_conv1d_cuda_scan_forward_workspace_size(&p, device);
    if (size > kMemory - kWorkspace) return too_small();
    return causal_conv1d_cuda_scan_forward(&p, device, stream, workspace, size);
  }
  Status operator()(const ScanBackwardParams& p) const {
    const int64_t size = causal_conv1d_cuda_scan_backward_workspace_size(&p, device);
    if (size > kMemory - kWorkspace) return too_small();
    return causal_conv1d_cuda_scan_backward(&p, device, stream, workspace, size);
  }
  Status operator()(const StateUpdateParams& p) const {
    return causal_conv1d_cuda_state_update(&p, device, stream);
  }
#endif

  static Status too_small() {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "the self-test's workspace is too small");
  }
};

// Lets this thread make calls that a capture of another stream forbids by default.
class Uncaptured {
 public:
  Uncaptured() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Uncaptured() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  Uncaptured(const Uncaptured&) = delete;
  Uncaptured& operator=(const Uncaptured&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// What this process knows of its GPUs.
Expected expected{};
std::mutex mutex;
std::atomic<uint64_t> right[kDevices], wrong[kDevices];  // a bit for each kernel
char problems[kDevices][sizeof(Status::message)];

// Whether the kernel was tested; problem is then what is wrong, or nothing.
template <class Test>
bool compare(const Test& self_test, int device, cudaStream_t stream, char* memory,
             std::string* problem) {
  std::vector<char> found = self_test.inputs(), wanted = found;
  const bool fits = static_cast<int64_t>(found.size()) <= kWorkspace;
  if (!fits || self_test.call(wanted.data(), expected).code != CAUSAL_CONV1D_OK) return false;
  // An error of work that was on the stream before is not the kernel's.
  if (cudaMemcpyAsync(memory, found.data(), found.size(), cudaMemcpyHostToDevice, stream) !=
          cudaSuccess ||
      cudaStreamSynchronize(stream) != cudaSuccess) {
    return false;
  }
  Status status = self_test.call(memory, Tested{device, stream, memory + kWorkspace});
  if (status.code == CAUSAL_CONV1D_OK) {
    cudaError_t e =
        cudaMemcpyAsync(found.data(), memory, found.size(), cudaMemcpyDeviceToHost, stream);
    if (e == cudaSuccess) e = cudaStreamSynchronize(stream);
    status = to_status("the self-test's kernel", e);
  }
  if (status.code != CAUSAL_CONV1D_OK) {
    *problem = status.message;
    return std::strstr(status.message, kNoMemory) == nullptr;
  }
  *problem = self_test.problem(found.data(), wanted.data());
  return true;
}

bool test(int kernel, int device, cudaStream_t stream, char* memory, std::string* problem) {
  const DeviceGuard guard(device);
  const Uncaptured uncaptured;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (guard.status() != cudaSuccess || cudaStreamIsCapturing(stream, &capture) != cudaSuccess ||
      capture != cudaStreamCaptureStatusNone) {
    return false;
  }
  const int operation = kernel / 8, dtype = kernel % 4;
  if (operation < kConvolutions) {
    const SelfTest self_test(static_cast<SelfTest::Operator>(operation), dtype,
                             kernel / 4 % 2 != 0);
    return compare(self_test, device, stream, memory, problem);
  }
#ifndef CAUSAL_CONV1D_HIP
  const ScanSelfTest self_test(static_cast<ScanSelfTest::Operator>(operation - kConvolutions),
                               dtype);
  return compare(self_test, device, stream, memory, problem);
#else
  return false;
#endif
}

}  // namespace
}  // namespace causal_conv1d::gpu

using namespace causal_conv1d::gpu;

void causal_conv1d_cuda_set_expected(void* const functions[7]) {
  expected = {reinterpret_cast<decltype(expected.forward)>(functions[0]),
              reinterpret_cast<decltype(expected.backward)>(functions[1]),
              reinterpret_cast<decltype(expected.update)>(functions[2]),
              reinterpret_cast<decltype(expected.varlen_states)>(functions[3]),
              reinterpret_cast<decltype(expected.scan_forward)>(functions[4]),
              reinterpret_cast<decltype(expected.scan_backward)>(functions[5]),
              reinterpret_cast<decltype(expected.state_update)>(functions[6])};
}

int causal_conv1d_cuda_verdict(int kernel, int device) {
  if (device < 0 || device >= kDevices || expected.forward == nullptr) return CAUSAL_CONV1D_RIGHT;
  if (right[device].load(std::memory_order_relaxed) >> kernel & 1) return CAUSAL_CONV1D_RIGHT;
  return wrong[device].load(std::memory_order_relaxed) >> kernel & 1 ? CAUSAL_CONV1D_WRONG
                                                                     : CAUSAL_CONV1D_UNTESTED;
}

int causal_conv1d_cuda_self_test(int kernel, int device, void* stream, void* memory) {
  const std::lock_guard<std::mutex> lock(mutex);
  const int known = causal_conv1d_cuda_verdict(kernel, device);
  if (known != CAUSAL_CONV1D_UNTESTED) return known;
  std::string problem;
  if (!test(kernel, device, static_cast<cudaStream_t>(stream), static_cast<char*>(memory),
            &problem)) {
    (void)cudaGetLastError();
    return CAUSAL_CONV1D_UNTESTED;
  }
  if (problem.empty()) {
    right[device] |= uint64_t{1} << kernel;
    return CAUSAL_CONV1D_RIGHT;
  }
  if (wrong[device] == 0) {
    std::snprintf(problems[device], sizeof problems[device], "%s", problem.c_str());
  }
  wrong[device] |= uint64_t{1} << kernel;
  return CAUSAL_CONV1D_WRONG;
}

int64_t causal_conv1d_cuda_self_test_size() { return kMemory; }

const char* causal_conv1d_cuda_problem(int device) {
  return device < 0 || device >= kDevices ? "" : problems[device];
}

void causal_conv1d_cuda_set_verdicts(int device, uint64_t right_kernels, uint64_t wrong_kernels,
                                     const char* problem) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (device < 0 || device >= kDevices) return;
  right[device] = right_kernels;
  wrong[device] = wrong_kernels;
  std::snprintf(problems[device], sizeof problems[device], "%s", problem);
}
