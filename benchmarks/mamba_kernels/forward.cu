// What selective_scan_fwd_cuda launches for more than 1024 steps.
#include <c10/cuda/CUDAException.h>

#include "trim.h"
// after trim.h, whose switches it takes
#include "selective_scan_fwd_kernel.cuh"

void fwd_bf16(SSMParamsBase& params, cudaStream_t stream) {
  selective_scan_fwd_launch<128, 16, at::BFloat16, float>(params, stream);
}

void fwd_fp32(SSMParamsBase& params, cudaStream_t stream) {
  selective_scan_fwd_launch<128, 16, float, float>(params, stream);
}
