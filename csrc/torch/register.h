// Called once by causal_conv1d/_library.py after it has loaded the library.
#pragma once

#include <exception>

#include "../causal_conv1d.h"

extern "C" {
CAUSAL_CONV1D_API causal_conv1d_status causal_conv1d_register_cpu(void);
CAUSAL_CONV1D_API causal_conv1d_status causal_conv1d_register_cuda(void);
}
