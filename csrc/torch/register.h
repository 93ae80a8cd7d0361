// Called by causal_conv1d/_library.py after it has loaded the library.
#pragma once

#include <exception>

#include "../selective_scan.h"

extern "C" {
// Register the operators as torch.ops.<name_space>, of which each copy of the Python package has
// one.
CAUSAL_CONV1D_API causal_conv1d_status causal_conv1d_register_cpu(const char* name_space);
CAUSAL_CONV1D_API causal_conv1d_status causal_conv1d_register_cuda(const char* name_space);

// The operators' schemas, one per line; Python asks for them, so that they stand in ops.h alone.
CAUSAL_CONV1D_API const char* causal_conv1d_schemas(void);

// The argument checks that open every operation, for causal_conv1d/_plain.py.
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_check_forward(const causal_conv1d_forward_params* params);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_check_backward(const causal_conv1d_backward_params* params);
CAUSAL_CONV1D_API causal_conv1d_status causal_conv1d_check_conv_forward(
    const causal_conv1d_forward_params* params, const causal_conv1d_options* options);
CAUSAL_CONV1D_API causal_conv1d_status causal_conv1d_check_conv_backward(
    const causal_conv1d_backward_params* params, const causal_conv1d_options* options,
    const causal_conv1d_option_gradients* gradients);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_check_update(const causal_conv1d_update_params* params);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_check_pool(const causal_conv1d_pool_params* params);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_check_varlen_states(const causal_conv1d_varlen_states_params* params);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_check_scan_forward(const causal_conv1d_scan_forward_params* params);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_check_scan_backward(const causal_conv1d_scan_backward_params* params);
CAUSAL_CONV1D_API causal_conv1d_status
causal_conv1d_check_state_update(const causal_conv1d_state_update_params* params);
// Whether states of state_len can be made for x and cu_seqlens, the given ones of params.
CAUSAL_CONV1D_API causal_conv1d_status causal_conv1d_check_varlen_sizes(
    const causal_conv1d_varlen_states_params* params, int64_t state_len);

// The self-test of csrc/cuda/self_test.cu. A kernel is 8 * operator + 4 * is_channel_last + dtype,
// for an operator in the order of the schemas and a causal_conv1d_dtype of floats; update and
// varlen_states never count as channel-last, nor do those of the scan.
typedef enum causal_conv1d_verdict {
  CAUSAL_CONV1D_UNTESTED = 0,
  CAUSAL_CONV1D_RIGHT = 1,
  CAUSAL_CONV1D_WRONG = 2
} causal_conv1d_verdict;
// Whether the forward and the backward take an x of these sizes and strides for channel-last.
CAUSAL_CONV1D_API int causal_conv1d_is_channel_last(int64_t dim, int64_t seqlen, int64_t dim_stride,
                                                    int64_t time_stride);
// The functions causal_conv1d_cpu_<operator>, to compare with. Without them nothing is tested, and
// every kernel counts as right.
CAUSAL_CONV1D_API void causal_conv1d_cuda_set_expected(void* const functions[7]);
CAUSAL_CONV1D_API int causal_conv1d_cuda_verdict(int kernel, int device);
// Tests an untested kernel, synchronises with the stream, and remembers and returns the verdict. It
// stays untested while the stream is captured, or without memory.
CAUSAL_CONV1D_API int causal_conv1d_cuda_self_test(int kernel, int device, void* stream,
                                                   void* memory);
// Bytes of memory, on the device and aligned to 16 bytes, that the test needs.
CAUSAL_CONV1D_API int64_t causal_conv1d_cuda_self_test_size(void);
// What is wrong with the first kernel that was found wrong on a device; "" if none was.
CAUSAL_CONV1D_API const char* causal_conv1d_cuda_problem(int device);
// Sets verdicts, each kernel a bit, and the problem: for tests.
CAUSAL_CONV1D_API void causal_conv1d_cuda_set_verdicts(int device, uint64_t right, uint64_t wrong,
                                                       const char* problem);

// Operators that are wrong on a device pass the call on to <name_space>::python_<operator>, of the
// namespace that was registered first. What that fails with is told here; the C ABI's dispatcher
// would lose the text.
CAUSAL_CONV1D_API void causal_conv1d_cuda_set_error(const char* message);
}
