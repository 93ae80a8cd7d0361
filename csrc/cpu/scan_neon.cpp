// The selective scan's kernels for NEON.
#define CAUSAL_CONV1D_ISA neon
#define CAUSAL_CONV1D_ISA_NEON
#include "scan_kernels.inl"
