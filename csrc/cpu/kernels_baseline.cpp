// The CPU kernels for any CPU, one element at a time.
#define CAUSAL_CONV1D_ISA baseline
#include "kernels/table.h"
