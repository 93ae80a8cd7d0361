// The argument checks of the selective scan, which both backends make before they write anything.
#pragma once

#include "check.h"
#include "selective_scan.h"

namespace causal_conv1d {

using Tensor4 = causal_conv1d_tensor4;
using ScanInputs = causal_conv1d_scan_inputs;
using ScanForwardParams = causal_conv1d_scan_forward_params;
using ScanBackwardParams = causal_conv1d_scan_backward_params;
using StateUpdateParams = causal_conv1d_state_update_params;

constexpr int64_t kMostStates = 256;  // dstate

// What the C functions do first. params may be null, and hold anything but values of index tensors
// that are wrong: those only the device can read.
Status check(const ScanForwardParams* params);
Status check(const ScanBackwardParams* params);
Status check(const StateUpdateParams* params);

// Whether a valid call writes anything. One that does not has to end at once, whatever its sizes.
bool has_work(const ScanForwardParams& p);
bool has_work(const ScanBackwardParams& p);
inline bool has_work(const StateUpdateParams& p) { return has_elements(p.x); }

// Of valid inputs. Groups: those of B and C, 1 if both are constant in time. Sequences: those of
// cu_seqlens, else the batch.
inline bool is_constant(const Tensor4& B_or_C) { return B_or_C.ndim == 2; }
inline int64_t groups_of(const ScanInputs& in) {
  return !is_constant(in.B) ? in.B.sizes[1] : !is_constant(in.C) ? in.C.sizes[1] : 1;
}
inline int64_t sequences_of(const ScanInputs& in) {
  return given(in.cu_seqlens) ? in.cu_seqlens.sizes[0] - 1 : in.u.sizes[0];
}

}  // namespace causal_conv1d
