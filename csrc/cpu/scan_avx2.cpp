// The selective scan's kernels for AVX2.
#define CAUSAL_CONV1D_ISA avx2
#define CAUSAL_CONV1D_ISA_AVX2
#include "scan_kernels.inl"
