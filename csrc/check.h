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

const char* dtype_name(int32_t dtype);

inline bool given(const Tensor& t) { return t.ndim != 0; }

Status ok();
Status error(causal_conv1d_code code, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

Status check(const ForwardParams& p);
Status check(const BackwardParams& p);
Status check(const UpdateParams& p);
Status check(const VarlenStatesParams& p);
// The part of it that tells whether states can be made.
Status check_varlen_sizes(const Tensor& x, const Tensor& cu_seqlens, int64_t state_len);

}  // namespace causal_conv1d
