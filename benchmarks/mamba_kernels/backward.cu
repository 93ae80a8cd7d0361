// What selective_scan_bwd_cuda launches for more than 1024 steps.
#include <c10/cuda/CUDAException.h>

#include "trim.h"
// after trim.h, whose switches it takes
#include "selective_scan_bwd_kernel.cuh"

void bwd_bf16(SSMParamsBwd& params, cudaStream_t stream) {
  selective_scan_bwd_launch<128, 16, at::BFloat16, float>(params, stream);
}

void bwd_fp32(SSMParamsBwd& params, cudaStream_t stream) {
  selective_scan_bwd_launch<128, 16, float, float>(params, stream);
}
