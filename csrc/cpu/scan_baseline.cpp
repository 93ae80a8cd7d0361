#define CAUSAL_CONV1D_ISA baseline
#include "scan_kernels.inl"
