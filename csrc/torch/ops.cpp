#include "ops.h"

#include <cstring>
#include <sstream>
#include <stdexcept>

namespace causal_conv1d::torch_abi {
namespace {

// One a line.
constexpr const char kSchemas[] =
    "forward(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, "
    "Tensor(a!) out, Tensor(b!)? final_states_out, bool silu) -> ()\n"
    "backward(Tensor x, Tensor weight, Tensor? bias, Tensor dout, Tensor? seq_idx, "
    "Tensor? initial_states, Tensor? dfinal_states, Tensor(a!) dx, Tensor(b!)? dweight, "
    "Tensor(c!)? dbias, Tensor(d!)? dinitial_states, bool silu) -> ()\n"
    "update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor(b!) out, "
    "bool silu, Tensor? cache_seqlens, Tensor? conv_state_indices) -> ()\n"
    "varlen_states(Tensor x, Tensor cu_seqlens, Tensor(a!) states) -> ()\n";

void require(Error error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("causal_conv1d: torch failed to ") + what);
}

std::string device_name(const Functions& f, int32_t type, int32_t index) {
  if (type == f.cpu) return "cpu";
  if (type == f.cuda) return "cuda:" + std::to_string(index);
  return "a device of another type";
}

}  // namespace

int32_t core_dtype(int32_t torch_dtype) {
  const Functions& f = functions();
  if (torch_dtype == f.float32) return CAUSAL_CONV1D_FLOAT32;
  if (torch_dtype == f.float16) return CAUSAL_CONV1D_FLOAT16;
  if (torch_dtype == f.bfloat16) return CAUSAL_CONV1D_BFLOAT16;
  if (torch_dtype == f.float64) return CAUSAL_CONV1D_FLOAT64;
  if (torch_dtype == f.int32) return CAUSAL_CONV1D_INT32;
  if (torch_dtype == f.int64) return CAUSAL_CONV1D_INT64;
  return CAUSAL_CONV1D_UNSUPPORTED_DTYPE;
}

Arguments::Arguments(const Signature& signature, StableIValue* stack) {
  // Everything is taken off the stack first: what is not owned when an error is thrown would leak.
  for (int i = 0; signature.kinds[i] != '\0'; ++i) {
    tensors_[i].data = nullptr;
    tensors_[i].ndim = 0;
    if (signature.kinds[i] == 'T') {
      handles_[i] = reinterpret_cast<TensorHandle>(stack[i]);
    } else if (signature.kinds[i] == 'B') {
      std::memcpy(&silu_, &stack[i], sizeof silu_);
    } else if (stack[i] != 0) {
      const auto* cell = reinterpret_cast<StableIValue*>(stack[i]);
      handles_[i] = reinterpret_cast<TensorHandle>(*cell);
      delete cell;
    }
  }
  try {
    for (int i = 0; signature.kinds[i] != '\0'; ++i) {
      if (handles_[i] != nullptr) describe(signature.caller, signature.names[i], i);
    }
  } catch (...) {
    release();
    throw;
  }
}

Arguments::~Arguments() { release(); }

void Arguments::release() {
  for (TensorHandle& handle : handles_) {
    if (handle != nullptr) functions().aoti_torch_delete_tensor_object(handle);
    handle = nullptr;
  }
}

void Arguments::describe(const char* caller, const char* name, int i) {
  const Functions& f = functions();
  Tensor& t = tensors_[i];
  int64_t ndim = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0, device_type = 0, device_index = 0;
  if (f.aoti_torch_get_dim(handles_[i], &ndim) || f.aoti_torch_get_sizes(handles_[i], &sizes) ||
      f.aoti_torch_get_strides(handles_[i], &strides) ||
      f.aoti_torch_get_dtype(handles_[i], &dtype) ||
      f.aoti_torch_get_device_type(handles_[i], &device_type) ||
      f.aoti_torch_get_device_index(handles_[i], &device_index) ||
      f.aoti_torch_get_data_ptr(handles_[i], &t.data)) {
    throw std::runtime_error(std::string(caller) + ": " + name + " must be a strided tensor");
  }
  if (ndim < 1 || ndim > 3) {
    throw std::runtime_error(std::string(caller) + ": " + name +
                             " must have one to three dimensions, got " + std::to_string(ndim));
  }
  t.ndim = static_cast<int32_t>(ndim);
  t.dtype = core_dtype(dtype);
  for (int64_t k = 0; k < ndim; ++k) {
    t.sizes[k] = sizes[k];
    t.strides[k] = strides[k];
  }
  if (device_type_ < 0) {
    device_type_ = device_type;
    device_index_ = device_index;
  } else if (device_type != device_type_ || device_index != device_index_) {
    throw std::runtime_error(std::string(caller) + ": " + name + " must be on x's device " +
                             device_name(f, device_type_, device_index_) + ", got " +
                             device_name(f, device_type, device_index));
  }
}

// The structs' members are in the order of the schemas' arguments.
ForwardParams Arguments::forward_params() const {
  const Tensor* t = tensors_;
  return {t[0], t[1], t[2], t[3], t[4], t[5], t[6], silu_};
}

BackwardParams Arguments::backward_params() const {
  const Tensor* t = tensors_;
  return {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10], silu_};
}

UpdateParams Arguments::update_params() const {
  const Tensor* t = tensors_;
  return {t[0], t[1], t[2], t[3], t[4], t[6], t[7], silu_};
}

VarlenStatesParams Arguments::varlen_states_params() const {
  return {tensors_[0], tensors_[1], tensors_[2]};
}

void throw_if_failed(const Status& status) {
  if (status.code != CAUSAL_CONV1D_OK) throw std::runtime_error(status.message);
}

// The library handles live as long as the process: torch drops the operators with their library.
void define_schemas() {
  LibraryHandle library = nullptr;
  require(
      functions().aoti_torch_library_init_fragment("causal_conv1d", __FILE__, __LINE__, &library),
      "open the namespace causal_conv1d");
  std::istringstream lines(kSchemas);
  for (std::string schema; std::getline(lines, schema);) {
    require(functions().aoti_torch_library_def(library, schema.c_str()), schema.c_str());
  }
}

void register_kernels(const char* dispatch_key, const Kernels& kernels) {
  LibraryHandle library = nullptr;
  require(functions().aoti_torch_library_init_impl("causal_conv1d", dispatch_key, __FILE__,
                                                   __LINE__, &library),
          "open the namespace causal_conv1d for kernels");
  require(functions().aoti_torch_library_impl(library, "forward", kernels.forward), "add forward");
  require(functions().aoti_torch_library_impl(library, "backward", kernels.backward),
          "add backward");
  require(functions().aoti_torch_library_impl(library, "update", kernels.update), "add update");
  require(functions().aoti_torch_library_impl(library, "varlen_states", kernels.varlen_states),
          "add varlen_states");
}

const char* schemas() { return kSchemas; }

}  // namespace causal_conv1d::torch_abi
