// What the CPU and the CUDA registration share: the operators' schemas, a boxed call's stack turned
// into the core's parameter structs, and the tensors that functional operators return.
#pragma once

#include <string>
#include <string_view>

#include "../check.h"
#include "../scan_check.h"
#include "stable_abi.h"

namespace causal_conv1d::torch_abi {

// An operator: its schema as torch reads it, and how errors call it. An argument is a Tensor, with
// ? one that may be None and with (a!) one that is written, or a bool or an int.
struct Signature {
  struct Argument {
    std::string_view type, name;
  };

  std::string_view schema, name;
  const char* caller;
  Argument arguments[24] = {};
  int count = 0;

  constexpr Signature(const char* error_name, std::string_view text)
      : schema(text), name(text.substr(0, text.find('('))), caller(error_name) {
    std::string_view rest = text.substr(name.size());
    do {
      rest.remove_prefix(rest[0] == '(' ? 1 : 2);  // after "(" or ", "
      const size_t space = rest.find(' '), end = rest.find_first_of(",)", space);
      arguments[count++] = {rest.substr(0, space), rest.substr(space + 1, end - space - 1)};
      rest.remove_prefix(end);
    } while (rest[0] == ',');
  }
};

namespace schema {

inline constexpr Signature kForward(
    "causal_conv1d_fn",
    "forward(Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? seq_idx, Tensor? initial_states, bool silu) -> Tensor");
inline constexpr Signature kForwardStates(
    "causal_conv1d_fn",
    "forward_states(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, "
    "Tensor? initial_states, bool silu) -> (Tensor out, Tensor final_states)");
inline constexpr Signature kForwardOut(
    "causal_conv1d_fn",
    "forward_out(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, "
    "Tensor(a!) out, Tensor(b!)? final_states_out, bool silu) -> ()");
// A gradient that is not needed is returned as a tensor of size 0.
inline constexpr Signature kBackward(
    "causal_conv1d_bwd",
    "backward(Tensor x, Tensor weight, Tensor? bias, Tensor dout, Tensor? seq_idx, "
    "Tensor? initial_states, Tensor? dfinal_states, bool need_dweight, bool need_dbias, "
    "bool need_dinitial_states, bool silu) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_states)");
inline constexpr Signature kBackwardOut(
    "causal_conv1d_bwd",
    "backward_out(Tensor x, Tensor weight, Tensor? bias, Tensor dout, Tensor? seq_idx, "
    "Tensor? initial_states, Tensor? dfinal_states, Tensor(a!) dx, Tensor(b!)? dweight, "
    "Tensor(c!)? dbias, Tensor(d!)? dinitial_states, bool silu) -> ()");
inline constexpr Signature kUpdate("causal_conv1d_update",
                                   "update(Tensor x, Tensor(a!) conv_state, Tensor weight, "
                                   "Tensor? bias, bool silu, Tensor? cache_seqlens, "
                                   "Tensor? conv_state_indices) -> Tensor");
inline constexpr Signature kUpdateOut(
    "causal_conv1d_update",
    "update_out(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor(b!) out, "
    "bool silu, Tensor? cache_seqlens, Tensor? conv_state_indices) -> ()");
inline constexpr Signature kVarlenStates(
    "causal_conv1d_varlen_states",
    "varlen_states(Tensor x, Tensor cu_seqlens, int state_len) -> Tensor");

// forward and backward with all options of ../causal_conv1d.h. What is not needed is returned as a
// tensor of size 0; of the gradients, bit i of needed is for the i-th result, and dx always comes.
inline constexpr Signature kConvForward(
    "causal_conv1d_fn",
    "conv_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? cu_seqlens, "
    "Tensor? initial_states, Tensor? pre_gate, Tensor? post_gate, Tensor? residual, int dilation, "
    "bool return_final_states, bool silu) -> (Tensor out, Tensor final_states)");
inline constexpr Signature kConvForwardOut(
    "causal_conv1d_fn",
    "conv_forward_out(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, "
    "Tensor? cu_seqlens, Tensor? initial_states, Tensor? pre_gate, Tensor? post_gate, "
    "Tensor? residual, Tensor(a!) out, Tensor(b!)? final_states_out, int dilation, bool silu) -> "
    "()");
inline constexpr Signature kConvBackward(
    "causal_conv1d_bwd",
    "conv_backward(Tensor x, Tensor weight, Tensor? bias, Tensor dout, Tensor? seq_idx, "
    "Tensor? cu_seqlens, Tensor? initial_states, Tensor? dfinal_states, Tensor? pre_gate, "
    "Tensor? post_gate, int dilation, bool residual_is_x, int needed, bool silu) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_states, Tensor dpre_gate, "
    "Tensor dpost_gate)");
inline constexpr Signature kConvBackwardOut(
    "causal_conv1d_bwd",
    "conv_backward_out(Tensor x, Tensor weight, Tensor? bias, Tensor dout, Tensor? seq_idx, "
    "Tensor? cu_seqlens, Tensor? initial_states, Tensor? dfinal_states, Tensor? pre_gate, "
    "Tensor? post_gate, Tensor(a!) dx, Tensor(b!)? dweight, Tensor(c!)? dbias, "
    "Tensor(d!)? dinitial_states, Tensor(e!)? dpre_gate, Tensor(f!)? dpost_gate, int dilation, "
    "bool residual_is_x, bool silu) -> ()");

// Its arguments are those of causal_conv1d_pool_params, in that order.
inline constexpr Signature kPool(
    "causal_conv1d_pool",
    "pool(Tensor x, Tensor(a!) conv_states, Tensor weight, Tensor? bias, Tensor(b!) out, "
    "Tensor? query_start_loc, Tensor? cache_indices, Tensor? has_initial_state, "
    "Tensor? num_accepted_tokens, Tensor(c!)? windows_out, Tensor? window_indices, int pad_slot, "
    "int max_seqlen, bool silu) -> ()");

// The selective scan: its arguments are those of ../selective_scan.h, in that order. A result that
// is not needed is returned as a tensor of size 0; of the gradients, bit i of needed is for the
// i-th result.
#define CAUSAL_CONV1D_SCAN_INPUTS                                                \
  "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, " \
  "Tensor? delta_bias, Tensor? initial_states, Tensor? cu_seqlens, bool delta_softplus, "
inline constexpr Signature kScanForward(
    "selective_scan_fwd", "scan_forward(" CAUSAL_CONV1D_SCAN_INPUTS
                          "bool need_last_states) -> (Tensor out, Tensor last_states)");
inline constexpr Signature kScanForwardOut(
    "selective_scan_fwd", "scan_forward_out(" CAUSAL_CONV1D_SCAN_INPUTS
                          "Tensor(a!) out, Tensor(b!)? ungated, Tensor(c!)? last_states) -> ()");
inline constexpr Signature kScanBackward(
    "selective_scan_bwd",
    "scan_backward(" CAUSAL_CONV1D_SCAN_INPUTS
    "Tensor dout, Tensor? dlast_states, int needed) -> "
    "(Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, "
    "Tensor ddelta_bias, Tensor dinitial_states)");
inline constexpr Signature kScanBackwardOut(
    "selective_scan_bwd",
    "scan_backward_out(" CAUSAL_CONV1D_SCAN_INPUTS
    "Tensor dout, Tensor? dlast_states, Tensor(a!)? du, Tensor(b!)? ddelta, Tensor(c!)? dA, "
    "Tensor(d!)? dB, Tensor(e!)? dC, Tensor(f!)? dD, Tensor(g!)? dz, Tensor(h!)? ddelta_bias, "
    "Tensor(i!)? dinitial_states, Tensor(j!)? out) -> ()");
#undef CAUSAL_CONV1D_SCAN_INPUTS
// Without heads each tensor may lack that dimension.
inline constexpr Signature kStateUpdate(
    "selective_state_update",
    "state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? dt_bias, Tensor? state_indices, bool dt_softplus) -> Tensor");
inline constexpr Signature kStateUpdateOut(
    "selective_state_update",
    "state_update_out(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? state_indices, Tensor(b!) out, "
    "bool dt_softplus) -> ()");

}  // namespace schema

// The causal_conv1d_dtype of one of torch's codes.
int32_t core_dtype(int32_t torch_dtype);

// A new tensor, which a functional operator returns. T: Tensor or Tensor4.
template <class T>
class OutputOf {
 public:
  OutputOf() = default;
  OutputOf(const T& like, int32_t torch_dtype, int32_t device_type, int32_t device_index);
  ~OutputOf();
  OutputOf(OutputOf&& other) noexcept : tensor_(other.tensor_), handle_(other.handle_) {
    other.handle_ = nullptr;
  }
  OutputOf(const OutputOf&) = delete;
  OutputOf& operator=(const OutputOf&) = delete;

  // Not given, if none was made.
  const T& tensor() const { return tensor_; }
  // Hands the tensor to torch.
  StableIValue release();

 private:
  T tensor_ = {};
  TensorHandle handle_ = nullptr;
};

// The arguments of one call, of at most N. Owns the handles and cells that torch put on the stack.
template <class T, int N>
class ArgumentsOf {
 public:
  // Throws std::runtime_error for a tensor of more dimensions than T's or on another device than
  // the first one.
  ArgumentsOf(const Signature& signature, StableIValue* stack);
  ~ArgumentsOf();
  ArgumentsOf(const ArgumentsOf&) = delete;
  ArgumentsOf& operator=(const ArgumentsOf&) = delete;

  int32_t device_index() const { return device_index_; }
  const T& tensor(int i) const { return tensors_[i]; }
  int64_t value(int i) const { return values_[i]; }

  // What torch.empty_like gives for argument i.
  OutputOf<T> empty_like(int i) const;
  // A tensor of argument i's dtype, in float32 with as_sums unless it is float64; order lists its
  // dimensions from the slowest to the fastest.
  OutputOf<T> empty(int i, int ndim, const int64_t* sizes, const int* order,
                    bool as_sums = false) const;

  // Tells torch that argument i is written, so that autograd notices. Throws for an inference
  // tensor outside of inference mode.
  void bump_version(int i) const;

 private:
  void release();
  void describe(const Signature& signature, int i);

  TensorHandle handles_[N] = {};
  T tensors_[N] = {};
  int32_t torch_dtypes_[N] = {};
  int64_t values_[N] = {};
  int32_t device_type_ = -1, device_index_ = -1;
};

using Output = OutputOf<Tensor>;
using Arguments = ArgumentsOf<Tensor, 12>;
using ManyArguments = ArgumentsOf<Tensor, 20>;
using Output4 = OutputOf<Tensor4>;
using Arguments4 = ArgumentsOf<Tensor4, 24>;

// Of causal_conv1d_fn: (batch, dim, width - 1) in x's dtype, or none if x or weight have other
// dimensions.
Output empty_states(const Arguments& a);

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
