// Stand-in for c10/cuda/CUDAException.h: the same checks, without libc10_cuda.
#pragma once
#include <c10/util/Exception.h>
#include <cuda_runtime.h>
extern cudaError_t mamba_error;  // the last call's first error
inline void mamba_note(cudaError_t e) {
  if (e != cudaSuccess && mamba_error == cudaSuccess) mamba_error = e;
}
#define C10_CUDA_CHECK(EXPR)    \
  do {                          \
    cudaError_t e_ = (EXPR);    \
    if (e_ != cudaSuccess) {    \
      (void)cudaGetLastError(); \
      mamba_note(e_);           \
    }                           \
  } while (0)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() C10_CUDA_CHECK(cudaGetLastError())
