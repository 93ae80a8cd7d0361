// The selective scan's kernels for AVX-512.
#define CAUSAL_CONV1D_ISA avx512
#define CAUSAL_CONV1D_ISA_AVX512
#include "scan_kernels.inl"
