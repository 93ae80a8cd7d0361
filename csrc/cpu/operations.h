// The operations of the C API on arguments that are checked, have work, and fit the kernels in use.
#pragma once

#include "../check.h"
#include "../pool_check.h"
#include "problem.h"

namespace causal_conv1d {

// num_threads <= 0: one per core. A problem is changed.
void run_forward(ForwardProblem& p, int num_threads);
void run_backward(BackwardProblem& p, int num_threads);
void run_update(UpdateParams p, int num_threads);
// Also says what is wrong with the values of index tensors, other than query_start_loc.
Status run_pool(const PoolParams& p, int num_threads);
void run_varlen_states(const VarlenStatesParams& p, int num_threads);

}  // namespace causal_conv1d
