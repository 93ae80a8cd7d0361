// Called once by causal_conv1d/_library.py after it has loaded the library.
#pragma once

#include <exception>

#include "../causal_conv1d.h"

extern "C" {
CAUSAL_CONV1D_API causal_conv1d_status causal_conv1d_register_cpu(void);
CAUSAL_CONV1D_API causal_conv1d_status causal_conv1d_register_cuda(void);

// The operators' schemas, one a line, for causal_conv1d/_ctypes_ops.py.
CAUSAL_CONV1D_API const char* causal_conv1d_schemas(void);

// The argument checks that open every operation, for causal_conv1d/_torch_ops.py.
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_check_forward(const causal_conv1d_forward_params* params);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_check_backward(const causal_conv1d_backward_params* params);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_check_update(const causal_conv1d_update_params* params);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_check_varlen_states(const causal_conv1d_varlen_states_params* params);

// Operators that are not trusted on a CUDA device for x's dtype and layout pass the call on to
// causal_conv1d::python_<operator>, where causal_conv1d/_self_test.py tests the kernels at their
// first use. At the start none is trusted. Bit 8 * operator + 4 * is_channel_last + dtype is for an
// operator in the order of the schemas and a causal_conv1d_dtype; forward and backward alone are
// told to be channel-last, where x steps further in time than over channels. device < 0 stands for
// all.
CAUSAL_CONV1D_API void causal_conv1d_cuda_trust(int device, uint32_t bits);
// What such a call in Python failed with; the C ABI's dispatcher would lose the text.
CAUSAL_CONV1D_API void causal_conv1d_cuda_set_error(const char* message);
}
