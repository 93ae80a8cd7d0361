// What the CPU and the CUDA registration share: the operators' schemas, a boxed call's stack turned
// into the core's parameter structs, and the tensors that functional operators return.
#pragma once

#include <string>

#include "../check.h"
#include "stable_abi.h"

namespace causal_conv1d::torch_abi {

// An operator. kinds: T is Tensor, O is Tensor?, W and P are the same written, B is bool, I is int.
struct Signature {
  const char* name;
  const char* caller;  // how errors call it
  const char* kinds;
  const char* arguments[12];
  const char* returns;
};

namespace schema {

inline constexpr Signature kForward = {"forward",
                                       "causal_conv1d_fn",
                                       "TTOOOB",
                                       {"x", "weight", "bias", "seq_idx", "initial_states", "silu"},
                                       "Tensor"};
inline constexpr Signature kForwardStates = {
    "forward_states",
    "causal_conv1d_fn",
    "TTOOOB",
    {"x", "weight", "bias", "seq_idx", "initial_states", "silu"},
    "(Tensor out, Tensor final_states)"};
inline constexpr Signature kForwardOut = {
    "forward_out",
    "causal_conv1d_fn",
    "TTOOOWPB",
    {"x", "weight", "bias", "seq_idx", "initial_states", "out", "final_states_out", "silu"},
    "()"};
// A gradient that is not needed is returned as a tensor of size 0.
inline constexpr Signature kBackward = {
    "backward",
    "causal_conv1d_bwd",
    "TTOTOOOBBBB",
    {"x", "weight", "bias", "dout", "seq_idx", "initial_states", "dfinal_states", "need_dweight",
     "need_dbias", "need_dinitial_states", "silu"},
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_states)"};
inline constexpr Signature kBackwardOut = {
    "backward_out",
    "causal_conv1d_bwd",
    "TTOTOOOWPPPB",
    {"x", "weight", "bias", "dout", "seq_idx", "initial_states", "dfinal_states", "dx", "dweight",
     "dbias", "dinitial_states", "silu"},
    "()"};
inline constexpr Signature kUpdate = {
    "update",
    "causal_conv1d_update",
    "TWTOBOO",
    {"x", "conv_state", "weight", "bias", "silu", "cache_seqlens", "conv_state_indices"},
    "Tensor"};
inline constexpr Signature kUpdateOut = {
    "update_out",
    "causal_conv1d_update",
    "TWTOWBOO",
    {"x", "conv_state", "weight", "bias", "out", "silu", "cache_seqlens", "conv_state_indices"},
    "()"};
inline constexpr Signature kVarlenStates = {"varlen_states",
                                            "causal_conv1d_varlen_states",
                                            "TTI",
                                            {"x", "cu_seqlens", "state_len"},
                                            "Tensor"};

}  // namespace schema

// The causal_conv1d_dtype of one of torch's codes.
int32_t core_dtype(int32_t torch_dtype);

// A new tensor, which a functional operator returns.
class Output {
 public:
  Output() = default;
  Output(const Tensor& like, int32_t torch_dtype, int32_t device_type, int32_t device_index);
  ~Output();
  Output(Output&& other) noexcept : tensor_(other.tensor_), handle_(other.handle_) {
    other.handle_ = nullptr;
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;

  // Not given, if none was made.
  const Tensor& tensor() const { return tensor_; }
  // Hands the tensor to torch.
  StableIValue release();

 private:
  Tensor tensor_ = {};
  TensorHandle handle_ = nullptr;
};

// The arguments of one call. Owns the handles and cells that torch put on the stack.
class Arguments {
 public:
  // Throws std::runtime_error for a tensor of more than three dimensions or on another device
  // than the first one.
  Arguments(const Signature& signature, StableIValue* stack);
  ~Arguments();
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

  int32_t device_index() const { return device_index_; }
  const Tensor& tensor(int i) const { return tensors_[i]; }
  int64_t value(int i) const { return values_[i]; }

  // What torch.empty_like gives for argument i.
  Output empty_like(int i) const;
  // A tensor of argument i's dtype; order lists its dimensions from the slowest to the fastest.
  Output empty(int i, int ndim, const int64_t* sizes, const int* order) const;
  // (batch, dim, width - 1) in x's dtype, or none if x or weight have other dimensions.
  Output empty_states() const;

  // Tells torch that argument i is written, so that autograd notices. Throws for an inference
  // tensor outside of inference mode.
  void bump_version(int i) const;

 private:
  void release();
  void describe(const char* caller, const char* name, int i);

  TensorHandle handles_[12] = {};
  Tensor tensors_[12] = {};
  int32_t torch_dtypes_[12] = {};
  int64_t values_[12] = {};
  int32_t device_type_ = -1, device_index_ = -1;
};

// A status of the core as an exception, which torch hands to Python as a RuntimeError.
void throw_if_failed(const Status& status);

struct Kernel {
  const Signature* signature;
  BoxedFunction function;
};

// All operators' schemas, one a line, without the overloads named plain.
const char* schemas();
// In torch.ops.<name_space>.
void define_schemas(const char* name_space);
void register_kernels(const char* name_space, const char* dispatch_key, const Kernel* kernels,
                      int count);

}  // namespace causal_conv1d::torch_abi
