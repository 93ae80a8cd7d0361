// What becomes of the steps before the first and after the last packed sequence.
#pragma once

#include "problem.h"

namespace causal_conv1d {

// Steps begin to end - 1 of `to`, (1, dim, total), become those of `from`, or 0 if that is not
// given.
void copy_times(const Tensor& from, const Tensor& to, int64_t begin, int64_t end);

// There `to` is `from`, or 0 if that is not given; it may not be given itself.
void copy_outside(const Sequences& sequences, const Tensor& from, const Tensor& to);

}  // namespace causal_conv1d
