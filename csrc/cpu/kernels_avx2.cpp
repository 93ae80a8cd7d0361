// The CPU kernels for AVX2.
#define CAUSAL_CONV1D_ISA avx2
#define CAUSAL_CONV1D_ISA_AVX2
#include "kernels/table.h"
