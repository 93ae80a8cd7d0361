// What becomes of the steps before the first and after the last packed sequence.
#pragma once

#include "problem.h"

namespace causal_conv1d {

// There `to`, (1, dim, total), is `from`, or 0 if that is not given; it may not be given itself.
void copy_outside(const Sequences& sequences, const Tensor& from, const Tensor& to);

}  // namespace causal_conv1d
