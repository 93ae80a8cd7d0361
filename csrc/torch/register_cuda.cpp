// Registers the CUDA kernels with the torch of this process; the schemas are the CPU library's.
#include "register.h"

#include <stdexcept>

#include "ops.h"

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

// Whether the call was passed on to the Python operator of that name, the index-th in the schemas,
// which then owns the stack.
bool pass_on(const char* python_operator, int index, StableIValue* stack) {
  const Functions& f = functions();
  const auto x = reinterpret_cast<TensorHandle>(stack[0]);
  int32_t device = 0, torch_dtype = 0;
  if (f.aoti_torch_get_device_index(x, &device) != 0) return false;
  if (f.aoti_torch_get_dtype(x, &torch_dtype) != 0) return false;
  const int32_t dtype = core_dtype(torch_dtype);
  if (dtype > CAUSAL_CONV1D_FLOAT64) return false;
  bool channel_last = false;
  int64_t ndim = 0, *strides = nullptr;
  if (index < 2 && f.aoti_torch_get_dim(x, &ndim) == 0 && ndim == 3 &&
      f.aoti_torch_get_strides(x, &strides) == 0) {
    channel_last = strides[1] < strides[2];
  }
  if (is_usable(8 * index + 4 * channel_last + dtype, device)) return false;
  python_error.clear();
  const Error failed = f.aoti_torch_call_dispatcher(python_operator, "", stack);
  if (!python_error.empty()) throw std::runtime_error(python_error);
  if (failed != 0) throw std::runtime_error(std::string(python_operator) + " failed");
  return true;
}

void forward(StableIValue* stack, uint64_t, uint64_t) {
  if (pass_on("causal_conv1d::python_forward", 0, stack)) return;
  const Arguments a(kForward, stack);
  const ForwardParams p = a.forward_params();
  const int32_t device = a.device_index();
  throw_if_failed(causal_conv1d_cuda_forward(&p, device, current_stream(device)));
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  if (pass_on("causal_conv1d::python_backward", 1, stack)) return;
  const Arguments a(kBackward, stack);
  const BackwardParams p = a.backward_params();
  const int32_t device = a.device_index();
  const int64_t size = causal_conv1d_cuda_backward_workspace_size(&p);
  const Workspace workspace(size, device);
  throw_if_failed(
      causal_conv1d_cuda_backward(&p, device, current_stream(device), workspace.data(), size));
}

void update(StableIValue* stack, uint64_t, uint64_t) {
  if (pass_on("causal_conv1d::python_update", 2, stack)) return;
  const Arguments a(kUpdate, stack);
  const UpdateParams p = a.update_params();
  const int32_t device = a.device_index();
  throw_if_failed(causal_conv1d_cuda_update(&p, device, current_stream(device)));
}

void varlen_states(StableIValue* stack, uint64_t, uint64_t) {
  if (pass_on("causal_conv1d::python_varlen_states", 3, stack)) return;
  const Arguments a(kVarlenStates, stack);
  const VarlenStatesParams p = a.varlen_states_params();
  const int32_t device = a.device_index();
  throw_if_failed(causal_conv1d_cuda_varlen_states(&p, device, current_stream(device)));
}

}  // namespace
}  // namespace causal_conv1d::torch_abi

causal_conv1d_status causal_conv1d_register_cuda(void) {
  using namespace causal_conv1d;
  try {
    if (torch_abi::functions().aoti_torch_get_current_cuda_stream == nullptr) {
      return error(CAUSAL_CONV1D_RUNTIME_ERROR, "the loaded torch has no CUDA");
    }
    torch_abi::register_kernels("CUDA", {torch_abi::forward, torch_abi::backward, torch_abi::update,
                                         torch_abi::varlen_states});
    return ok();
  } catch (const std::exception& e) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s", e.what());
  }
}

void causal_conv1d_cuda_set_error(const char* message) {
  causal_conv1d::torch_abi::python_error = message;
}
