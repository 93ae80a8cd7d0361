#include "ops.h"

#include <cstring>
#include <sstream>
#include <stdexcept>

#include "../checker.h"
#include "strides.h"

namespace causal_conv1d::torch_abi {
namespace {

// The overload that autograd and other transformations leave alone: causal_conv1d/_dispatch.py
// calls it where there are none.
constexpr const char kPlain[] = ".plain";

constexpr const Signature* kSignatures[] = {&schema::kForward,      &schema::kForwardStates,
                                            &schema::kForwardOut,   &schema::kBackward,
                                            &schema::kBackwardOut,  &schema::kUpdate,
                                            &schema::kUpdateOut,    &schema::kVarlenStates,
                                            &schema::kScanForward,  &schema::kScanForwardOut,
                                            &schema::kScanBackward, &schema::kScanBackwardOut,
                                            &schema::kStateUpdate,  &schema::kStateUpdateOut,
                                            &schema::kConvForward,  &schema::kConvForwardOut,
                                            &schema::kConvBackward, &schema::kConvBackwardOut,
                                            &schema::kPool};

std::string name_of(const Signature& signature, const char* overload) {
  return std::string(signature.name) + overload;
}

std::string schema_of(const Signature& signature, const char* overload = "") {
  return name_of(signature, overload).append(signature.schema.substr(signature.name.size()));
}

void require(Error error, const std::string& what) {
  if (error != 0) throw std::runtime_error("causal_conv1d: torch failed to " + what);
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
  // Some others have a number so that an error can name them.
  const std::string unknown = dtype_name(CAUSAL_CONV1D_UNSUPPORTED_DTYPE);
  for (int32_t dtype = CAUSAL_CONV1D_UNSUPPORTED_DTYPE + 1; dtype_name(dtype) != unknown; ++dtype) {
    const std::string getter = std::string("aoti_torch_dtype_") + dtype_name(dtype);
    const auto get = reinterpret_cast<int32_t (*)()>(find_symbol(getter.c_str()));
    if (get != nullptr && get() == torch_dtype) return dtype;
  }
  return CAUSAL_CONV1D_UNSUPPORTED_DTYPE;
}

template <class T>
OutputOf<T>::OutputOf(const T& like, int32_t torch_dtype, int32_t device_type, int32_t device_index)
    : tensor_(like) {
  const Functions& f = functions();
  if (f.aoti_torch_empty_strided(like.ndim, like.sizes, like.strides, torch_dtype, device_type,
                                 device_index, &handle_) != 0 ||
      f.aoti_torch_get_data_ptr(handle_, &tensor_.data) != 0) {
    throw std::runtime_error("causal_conv1d: torch could not make a tensor: out of memory");
  }
}

template <class T>
OutputOf<T>::~OutputOf() {
  if (handle_ != nullptr) functions().aoti_torch_delete_tensor_object(handle_);
}

template <class T>
StableIValue OutputOf<T>::release() {
  const auto value = reinterpret_cast<StableIValue>(handle_);
  handle_ = nullptr;
  return value;
}

template <class T, int N>
ArgumentsOf<T, N>::ArgumentsOf(const Signature& signature, StableIValue* stack) {
  // Everything is taken off the stack first: what is not owned when an error is thrown would leak.
  for (int i = 0; i < signature.count; ++i) {
    const std::string_view type = signature.arguments[i].type;
    if (type == "bool") {
      bool value;
      std::memcpy(&value, &stack[i], sizeof value);
      values_[i] = value;
    } else if (type == "int") {
      std::memcpy(&values_[i], &stack[i], sizeof values_[i]);
    } else if (type.back() != '?') {
      handles_[i] = reinterpret_cast<TensorHandle>(stack[i]);
    } else if (stack[i] != 0) {
      const auto* cell = reinterpret_cast<StableIValue*>(stack[i]);
      handles_[i] = reinterpret_cast<TensorHandle>(*cell);
      delete cell;
    }
  }
  try {
    for (int i = 0; i < signature.count; ++i) {
      if (handles_[i] != nullptr) describe(signature, i);
    }
  } catch (...) {
    release();
    throw;
  }
}

template <class T, int N>
ArgumentsOf<T, N>::~ArgumentsOf() {
  release();
}

template <class T, int N>
void ArgumentsOf<T, N>::release() {
  for (TensorHandle& handle : handles_) {
    if (handle != nullptr) functions().aoti_torch_delete_tensor_object(handle);
    handle = nullptr;
  }
}

template <class T, int N>
void ArgumentsOf<T, N>::describe(const Signature& signature, int i) {
  const auto fail = [&](const std::string& what) {
    throw std::runtime_error(std::string(signature.caller) + ": " +
                             std::string(signature.arguments[i].name) + " must " + what);
  };
  const Functions& f = functions();
  T& t = tensors_[i];
  int64_t ndim = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t device_type = 0, device_index = 0;
  if (f.aoti_torch_get_dim(handles_[i], &ndim) || f.aoti_torch_get_sizes(handles_[i], &sizes) ||
      f.aoti_torch_get_strides(handles_[i], &strides) ||
      f.aoti_torch_get_dtype(handles_[i], &torch_dtypes_[i]) ||
      f.aoti_torch_get_device_type(handles_[i], &device_type) ||
      f.aoti_torch_get_device_index(handles_[i], &device_index) ||
      f.aoti_torch_get_data_ptr(handles_[i], &t.data)) {
    fail("be a strided tensor");
  }
  if (ndim < 1 || ndim > kMostDims<T>) {
    fail(std::string("have one to ") + (kMostDims<T> == 3 ? "three" : "four") +
         " dimensions, got " + std::to_string(ndim));
  }
  t.ndim = static_cast<int32_t>(ndim);
  t.dtype = core_dtype(torch_dtypes_[i]);
  for (int64_t k = 0; k < ndim; ++k) {
    t.sizes[k] = sizes[k];
    t.strides[k] = strides[k];
  }
  if (device_type_ < 0) {
    device_type_ = device_type;
    device_index_ = device_index;
  } else if (device_type != device_type_ || device_index != device_index_) {
    fail("be on " + std::string(signature.arguments[0].name) + "'s device " +
         device_name(f, device_type_, device_index_) + ", got " +
         device_name(f, device_type, device_index));
  }
}

template <class T, int N>
OutputOf<T> ArgumentsOf<T, N>::empty_like(int i) const {
  T t = tensors_[i];
  like_strides(t.ndim, tensors_[i].sizes, tensors_[i].strides, t.strides);
  return OutputOf<T>(t, torch_dtypes_[i], device_type_, device_index_);
}

template <class T, int N>
OutputOf<T> ArgumentsOf<T, N>::empty(int i, int ndim, const int64_t* sizes, const int* order,
                                     bool as_sums) const {
  T t = {};
  t.ndim = ndim;
  t.dtype = tensors_[i].dtype;
  int32_t torch_dtype = torch_dtypes_[i];
  if (as_sums && t.dtype != CAUSAL_CONV1D_FLOAT64) {
    t.dtype = CAUSAL_CONV1D_FLOAT32;
    torch_dtype = functions().float32;
  }
  int64_t stride = 1;
  for (int k = ndim - 1; k >= 0; --k) {
    t.sizes[order[k]] = sizes[order[k]];
    t.strides[order[k]] = stride;
    stride *= sizes[order[k]] > 1 ? sizes[order[k]] : 1;
  }
  return OutputOf<T>(t, torch_dtype, device_type_, device_index_);
}

template <class T, int N>
void ArgumentsOf<T, N>::bump_version(int i) const {
  if (handles_[i] != nullptr) functions().bump_version(handles_[i]);
}

template class OutputOf<Tensor>;
template class ArgumentsOf<Tensor, 12>;
template class ArgumentsOf<Tensor, 20>;
template class OutputOf<Tensor4>;
template class ArgumentsOf<Tensor4, 24>;

Output empty_states(const Arguments& a) {
  const Tensor &x = a.tensor(0), &weight = a.tensor(1);
  if (x.ndim != 3 || weight.ndim != 2 || weight.sizes[1] < 1) return {};
  const int64_t sizes[3] = {x.sizes[0], x.sizes[1], weight.sizes[1] - 1};
  const int order[3] = {0, 1, 2};
  return a.empty(0, 3, sizes, order);
}

void throw_if_failed(const Status& status) {
  if (status.code != CAUSAL_CONV1D_OK) throw std::runtime_error(status.message);
}

// The library handles live as long as the process: torch drops the operators with their library.
void define_schemas(const char* name_space) {
  LibraryHandle library = nullptr;
  require(functions().aoti_torch_library_init_fragment(name_space, __FILE__, __LINE__, &library),
          std::string("open the namespace ") + name_space);
  for (const Signature* signature : kSignatures) {
    for (const char* overload : {"", kPlain}) {
      const std::string schema = schema_of(*signature, overload);
      require(functions().aoti_torch_library_def(library, schema.c_str()), "define " + schema);
    }
  }
}

void register_kernels(const char* name_space, const char* dispatch_key, const Kernel* kernels,
                      int count) {
  LibraryHandle library = nullptr;
  require(functions().aoti_torch_library_init_impl(name_space, dispatch_key, __FILE__, __LINE__,
                                                   &library),
          std::string("open the namespace ") + name_space + " for kernels");
  for (int i = 0; i < count; ++i) {
    for (const char* overload : {"", kPlain}) {
      const std::string name = name_of(*kernels[i].signature, overload);
      require(functions().aoti_torch_library_impl(library, name.c_str(), kernels[i].function),
              "add " + name);
    }
  }
}

const char* schemas() {
  static const std::string text = [] {
    std::string lines;
    for (const Signature* signature : kSignatures) lines += schema_of(*signature) + "\n";
    return lines;
  }();
  return text.c_str();
}

}  // namespace causal_conv1d::torch_abi
