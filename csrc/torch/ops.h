// What the CPU and the CUDA registration share: schemas, and a boxed call's stack turned into the
// core's parameter structs.
#pragma once

#include "../check.h"
#include "stable_abi.h"

namespace causal_conv1d::torch_abi {

// Name and arguments of an operator as its schema has them. kinds: T is Tensor, O is Tensor?, B
// bool.
struct Signature {
  const char* caller;  // how errors call it
  const char* kinds;
  const char* names[12];
};

inline constexpr Signature kForward = {
    "causal_conv1d_fn",
    "TTOOOTOB",
    {"x", "weight", "bias", "seq_idx", "initial_states", "out", "final_states_out", "silu"}};
inline constexpr Signature kBackward = {
    "causal_conv1d_bwd",
    "TTOTOOOTOOOB",
    {"x", "weight", "bias", "dout", "seq_idx", "initial_states", "dfinal_states", "dx", "dweight",
     "dbias", "dinitial_states", "silu"}};
inline constexpr Signature kUpdate = {
    "causal_conv1d_update",
    "TTTOTBOO",
    {"x", "conv_state", "weight", "bias", "out", "silu", "cache_seqlens", "conv_state_indices"}};
inline constexpr Signature kVarlenStates = {
    "causal_conv1d_varlen_states", "TTT", {"x", "cu_seqlens", "states"}};

// The causal_conv1d_dtype of one of torch's codes.
int32_t core_dtype(int32_t torch_dtype);

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

  ForwardParams forward_params() const;
  BackwardParams backward_params() const;
  UpdateParams update_params() const;
  VarlenStatesParams varlen_states_params() const;

 private:
  void release();
  void describe(const char* caller, const char* name, int i);

  TensorHandle handles_[12] = {};
  Tensor tensors_[12];
  bool silu_ = false;
  int32_t device_type_ = -1, device_index_ = -1;
};

// A status of the core as an exception, which torch hands to Python as a RuntimeError.
void throw_if_failed(const Status& status);

struct Kernels {
  BoxedFunction forward, backward, update, varlen_states;
};

const char* schemas();
void define_schemas();
void register_kernels(const char* dispatch_key, const Kernels& kernels);

}  // namespace causal_conv1d::torch_abi
