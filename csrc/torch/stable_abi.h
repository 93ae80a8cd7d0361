// torch's stable C ABI: what STABLE_TORCH_LIBRARY (torch >= 2.9) expands to, without torch's
// headers and without a link to any of torch's libraries. The functions are looked up in the
// libtorch that the process has already loaded, so one binary serves every torch.
// The declarations follow torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h;
// tests/cpp/abi_test.cpp compares them with the headers of an installed torch.
#pragma once

#include <cstdint>
#include <string>

namespace causal_conv1d::torch_abi {

using StableIValue = uint64_t;  // a bool in the low byte, a tensor handle, or 0 for None
using TensorHandle = struct AtenTensorOpaque*;
using LibraryHandle = struct TorchLibraryOpaque*;
using BoxedFunction = void (*)(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);
using Error = int32_t;  // 0 is success

// X(return type, name, parameters)
#define CAUSAL_CONV1D_TORCH_FUNCTIONS(X)                                                        \
  X(Error, aoti_torch_library_init_fragment,                                                    \
    (const char* ns, const char* file, uint32_t line, LibraryHandle* library))                  \
  X(Error, aoti_torch_library_init_impl,                                                        \
    (const char* ns, const char* key, const char* file, uint32_t line, LibraryHandle* library)) \
  X(Error, aoti_torch_library_def, (LibraryHandle library, const char* schema))                 \
  X(Error, aoti_torch_library_impl,                                                             \
    (LibraryHandle library, const char* name, BoxedFunction function))                          \
  X(Error, aoti_torch_call_dispatcher,                                                          \
    (const char* name, const char* overload_name, StableIValue* stack))                         \
  X(Error, aoti_torch_delete_tensor_object, (TensorHandle tensor))                              \
  X(Error, aoti_torch_get_data_ptr, (TensorHandle tensor, void** data))                         \
  X(Error, aoti_torch_get_dim, (TensorHandle tensor, int64_t * ndim))                           \
  X(Error, aoti_torch_get_sizes, (TensorHandle tensor, int64_t * *sizes))                       \
  X(Error, aoti_torch_get_strides, (TensorHandle tensor, int64_t * *strides))                   \
  X(Error, aoti_torch_get_dtype, (TensorHandle tensor, int32_t * dtype))                        \
  X(Error, aoti_torch_get_device_type, (TensorHandle tensor, int32_t * type))                   \
  X(Error, aoti_torch_get_device_index, (TensorHandle tensor, int32_t * index))                 \
  X(Error, aoti_torch_empty_strided,                                                            \
    (int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype,                 \
     int32_t device_type, int32_t device_index, TensorHandle* tensor))                          \
  X(int32_t, aoti_torch_device_type_cpu, ())                                                    \
  X(int32_t, aoti_torch_device_type_cuda, ())                                                   \
  X(int32_t, aoti_torch_dtype_float32, ())                                                      \
  X(int32_t, aoti_torch_dtype_float16, ())                                                      \
  X(int32_t, aoti_torch_dtype_bfloat16, ())                                                     \
  X(int32_t, aoti_torch_dtype_float64, ())                                                      \
  X(int32_t, aoti_torch_dtype_int32, ())                                                        \
  X(int32_t, aoti_torch_dtype_int64, ())                                                        \
  X(int32_t, aoti_torch_dtype_uint8, ())

// May be missing: in a CPU-only torch, or before torch 2.10.
#define CAUSAL_CONV1D_TORCH_OPTIONAL_FUNCTIONS(X)                                     \
  X(Error, aoti_torch_get_current_cuda_stream, (int32_t device_index, void** stream)) \
  X(Error, torch_get_num_threads, (uint32_t * num_threads))

struct Functions {
  // Not part of the C ABI, which has nothing for it: torch::autograd::impl::bump_version of the
  // at::Tensor that a handle points to. It is what torch's own in-place operators call.
  void (*bump_version)(TensorHandle tensor) = nullptr;
#define CAUSAL_CONV1D_MEMBER(type, name, parameters) type(*name) parameters = nullptr;
  CAUSAL_CONV1D_TORCH_FUNCTIONS(CAUSAL_CONV1D_MEMBER)
  CAUSAL_CONV1D_TORCH_OPTIONAL_FUNCTIONS(CAUSAL_CONV1D_MEMBER)
#undef CAUSAL_CONV1D_MEMBER
  int32_t cpu, cuda;  // torch's codes of device types
  int32_t float32, float16, bfloat16, float64, int32, int64, uint8;  // and of dtypes
};

// The functions of the loaded torch. Throws std::runtime_error if one is missing, naming it.
const Functions& functions();

// The address of a symbol in the torch libraries of this process, or nullptr.
void* find_symbol(const char* name);

}  // namespace causal_conv1d::torch_abi
