// Which instruction set's kernels are used: the best that this CPU runs, or the one that the
// environment variable CAUSAL_CONV1D_CPU_ISA names.
#pragma once

#include "kernel_table.h"

namespace causal_conv1d {

// The kernels that this CPU runs, best first, behind the last a null.
const KernelTable* const* runnable_kernels();

// Those of that name, or the best if it is empty; null if this CPU runs none of that name.
const KernelTable* choose_kernels(const char* name);

// The kernels in use. Chosen when the library is loaded; null if there are none by that name. A
// test may set others.
extern const KernelTable* active_kernels;

// What each function of the C API returns if there are none.
Status no_kernels(const char* function);

}  // namespace causal_conv1d
