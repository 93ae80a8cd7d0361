// The one place where arguments are checked; both backends call it before they write anything.
#pragma once

#include "causal_conv1d.h"

namespace causal_conv1d {

using Tensor = causal_conv1d_tensor;
using Status = causal_conv1d_status;
using ForwardParams = causal_conv1d_forward_params;
using BackwardParams = causal_conv1d_backward_params;
using UpdateParams = causal_conv1d_update_params;
using VarlenStatesParams = causal_conv1d_varlen_states_params;
using Options = causal_conv1d_options;
using OptionGradients = causal_conv1d_option_gradients;

const char* dtype_name(int32_t dtype);

// T: causal_conv1d_tensor or causal_conv1d_tensor4.
template <class T>
bool given(const T& t) {
  return t.ndim != 0;
}

// Of a tensor of valid sizes.
template <class T>
bool has_elements(const T& t) {
  if (!given(t)) return false;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.sizes[i] == 0) return false;
  }
  return true;
}

// Whether a valid call writes anything. One that does not has to end at once, whatever its sizes.
inline bool has_work(const ForwardParams& p) {
  return has_elements(p.out) || has_elements(p.final_states_out);
}
inline bool has_work(const BackwardParams& p) {
  return has_elements(p.dx) || has_elements(p.dweight) || has_elements(p.dbias) ||
         has_elements(p.dinitial_states);
}
inline bool has_work(const UpdateParams& p) { return has_elements(p.x); }
inline bool has_work(const VarlenStatesParams& p) { return has_elements(p.states); }

Status ok();
Status error(causal_conv1d_code code, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

// What the C functions do first. params may be null, and hold anything.
Status check(const ForwardParams* params);
Status check(const BackwardParams* params);
Status check(const UpdateParams* params);
Status check(const VarlenStatesParams* params);
// The same with options, which may be null. *own is then what this library knows of them: zero
// where nothing is given, and with dilation >= 1.
Status check(const ForwardParams* params, const Options* options, Options* own);
Status check(const BackwardParams* params, const Options* options, const OptionGradients* gradients,
             Options* own, OptionGradients* own_gradients);
// The part of the last that tells whether states of state_len can be made.
Status check_varlen_sizes(const Tensor& x, const Tensor& cu_seqlens, int64_t state_len);

}  // namespace causal_conv1d
