// The selective scan's kernels for any CPU, a channel at a time.
#define CAUSAL_CONV1D_ISA baseline
#include "scan_kernels.inl"
