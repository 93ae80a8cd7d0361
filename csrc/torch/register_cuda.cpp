// Registers the CUDA kernels with the torch of this process; the schemas are the CPU library's.
#include "register.h"

#include <stdexcept>

#include "../layout.h"
#include "boxed.h"
#include "options_boxed.h"
#include "pool_boxed.h"

#ifndef CAUSAL_CONV1D_HIP  // which has no scan
#include "scan_boxed.h"
#endif

namespace causal_conv1d::torch_abi {
namespace {

void* current_stream(int32_t device) {
  void* stream = nullptr;
  if (functions().aoti_torch_get_current_cuda_stream(device, &stream) != 0) {
    throw std::runtime_error("causal_conv1d: torch has no current CUDA stream");
  }
  return stream;
}

// Device memory from torch's caching allocator, which orders its reuse by stream.
class Workspace {
 public:
  Workspace(int64_t size, int32_t device) {
    if (size <= 0) return;
    const Functions& f = functions();
    const int64_t stride = 1;
    if (f.aoti_torch_empty_strided(1, &size, &stride, f.uint8, f.cuda, device, &handle_) != 0 ||
        f.aoti_torch_get_data_ptr(handle_, &data_) != 0) {
      throw std::runtime_error("causal_conv1d: out of memory for a workspace of " +
                               std::to_string(size) + " bytes");
    }
  }
  ~Workspace() {
    if (handle_ != nullptr) functions().aoti_torch_delete_tensor_object(handle_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  TensorHandle handle_ = nullptr;
  void* data_ = nullptr;
};

std::string python_namespace;  // of the Python operators that calls are passed on to
thread_local std::string python_error;

// Whether a kernel may be used on a device: until its self-test finds something.
bool is_usable(int kernel, int32_t device) {
  int verdict = causal_conv1d_cuda_verdict(kernel, device);
  if (verdict == CAUSAL_CONV1D_UNTESTED) {
    try {
      const Workspace memory(causal_conv1d_cuda_self_test_size(), device);
      verdict = causal_conv1d_cuda_self_test(kernel, device, current_stream(device), memory.data());
    } catch (const std::exception&) {  // out of memory: a later call tests
      return true;
    }
  }
  return verdict != CAUSAL_CONV1D_WRONG;
}

struct Cuda {
  // A kernel that its self-test found wrong passes the call on to the Python operator of its name,
  // which then owns the stack.
  static bool replaced(const Signature& signature, Operation operation, StableIValue* stack) {
    const Functions& f = functions();
    const int index = static_cast<int>(operation);
    const int leader = operation == Operation::kStateUpdate ? 1 : 0;  // x comes second there
    const auto x = reinterpret_cast<TensorHandle>(stack[leader]);
    int32_t device = 0, torch_dtype = 0;
    if (f.aoti_torch_get_device_index(x, &device) != 0) return false;
    if (f.aoti_torch_get_dtype(x, &torch_dtype) != 0) return false;
    const int32_t dtype = core_dtype(torch_dtype);
    if (dtype > CAUSAL_CONV1D_FLOAT64) return false;
    bool channel_last = false;
    int64_t ndim = 0, *sizes = nullptr, *strides = nullptr;
    if (index < 2 && f.aoti_torch_get_dim(x, &ndim) == 0 && ndim == 3 &&
        f.aoti_torch_get_sizes(x, &sizes) == 0 && f.aoti_torch_get_strides(x, &strides) == 0) {
      channel_last = is_channel_last(sizes[1], sizes[2], strides[1], strides[2]);
    }
    if (is_usable(8 * index + 4 * channel_last + dtype, device)) return false;
    python_error.clear();
    const std::string name = python_namespace + "::python_" + std::string(signature.name);
    const Error failed = f.aoti_torch_call_dispatcher(name.c_str(), "", stack);
    if (!python_error.empty()) throw std::runtime_error(python_error);
    if (failed != 0) throw std::runtime_error(name + " failed");
    return true;
  }

  static void run(const ForwardParams& p, int32_t device) {
    throw_if_failed(causal_conv1d_cuda_forward(&p, device, current_stream(device)));
  }
  static void run(const BackwardParams& p, int32_t device) {
    const int64_t size = causal_conv1d_cuda_backward_workspace_size(&p);
    const Workspace workspace(size, device);
    throw_if_failed(
        causal_conv1d_cuda_backward(&p, device, current_stream(device), workspace.data(), size));
  }
  static void run(const ForwardParams& p, const Options& options, int32_t device) {
    const int64_t size = causal_conv1d_cuda_forward_with_workspace_size(&p, &options);
    const Workspace workspace(size, device);
    throw_if_failed(causal_conv1d_cuda_forward_with(&p, &options, device, current_stream(device),
                                                    workspace.data(), size));
  }
  static void run(const BackwardParams& p, const Options& options, const OptionGradients& gradients,
                  int32_t device) {
    const int64_t size = causal_conv1d_cuda_backward_with_workspace_size(&p, &options, &gradients);
    const Workspace workspace(size, device);
    throw_if_failed(causal_conv1d_cuda_backward_with(
        &p, &options, &gradients, device, current_stream(device), workspace.data(), size));
  }
  static void run(const UpdateParams& p, int32_t device) {
    throw_if_failed(causal_conv1d_cuda_update(&p, device, current_stream(device)));
  }
  static void run(const PoolParams& p, int32_t device) {
    throw_if_failed(causal_conv1d_cuda_pool(&p, device, current_stream(device)));
  }
  static void run(const VarlenStatesParams& p, int32_t device) {
    throw_if_failed(causal_conv1d_cuda_varlen_states(&p, device, current_stream(device)));
  }
#ifndef CAUSAL_CONV1D_HIP
  static void run(const ScanForwardParams& p, int32_t device) {
    const int64_t size = causal_conv1d_cuda_scan_forward_workspace_size(&p, device);
    const Workspace workspace(size, device);
    throw_if_failed(causal_conv1d_cuda_scan_forward(&p, device, current_stream(device),
                                                    workspace.data(), size));
  }
  static void run(const ScanBackwardParams& p, int32_t device) {
    const int64_t size = causal_conv1d_cuda_scan_backward_workspace_size(&p, device);
    const Workspace workspace(size, device);
    throw_if_failed(causal_conv1d_cuda_scan_backward(&p, device, current_stream(device),
                                                     workspace.data(), size));
  }
  static void run(const StateUpdateParams& p, int32_t device) {
    throw_if_failed(causal_conv1d_cuda_state_update(&p, device, current_stream(device)));
  }
#endif
};

}  // namespace
}  // namespace causal_conv1d::torch_abi

causal_conv1d_status causal_conv1d_register_cuda(const char* name_space) {
  using namespace causal_conv1d;
  try {
    if (torch_abi::functions().aoti_torch_get_current_cuda_stream == nullptr) {
      return error(CAUSAL_CONV1D_RUNTIME_ERROR, "the loaded torch has no CUDA");
    }
    if (torch_abi::python_namespace.empty()) torch_abi::python_namespace = name_space;
    torch_abi::Boxed<torch_abi::Cuda>::register_all(name_space, "CUDA");
    torch_abi::OptionsBoxed<torch_abi::Cuda>::register_all(name_space, "CUDA");
    torch_abi::PoolBoxed<torch_abi::Cuda>::register_all(name_space, "CUDA");
#ifndef CAUSAL_CONV1D_HIP
    torch_abi::ScanBoxed<torch_abi::Cuda>::register_all(name_space, "CUDA");
#endif
    return ok();
  } catch (const std::exception& e) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s", e.what());
  }
}

void causal_conv1d_cuda_set_error(const char* message) {
  causal_conv1d::torch_abi::python_error = message;
}
