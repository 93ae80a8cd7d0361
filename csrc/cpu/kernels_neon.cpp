// The CPU kernels for NEON.
#define CAUSAL_CONV1D_ISA neon
#define CAUSAL_CONV1D_ISA_NEON
#include "kernels/table.h"
