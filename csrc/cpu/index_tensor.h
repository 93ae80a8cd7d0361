// What the values of index tensors say: ids of sequences (seq_idx), and others.
#pragma once

#include <stdint.h>

#include <vector>

#include "../check.h"

namespace causal_conv1d {

// Of an int32 or int64 tensor.
int64_t index_at(const Tensor& t, int64_t i, int64_t j = 0);

// Of a bool, uint8, int32 or int64 tensor of one dimension.
bool flag_at(const Tensor& t, int64_t i);

// ids of 64 bits, all of which fit 32, as a copy in `memory`: kernels read ids once a channel, for
// which the copy is made once.
Tensor with_int32_ids(Tensor seq_idx, std::vector<int32_t>* memory);

// The time that the final states of a batch entry precede: just behind the last position that is no
// padding.
int64_t end_of_row(const Tensor& seq_idx, int64_t b);

// Whether there is padding at or after the time `first`.
bool has_padding(const Tensor& seq_idx, int64_t b, int64_t first);

}  // namespace causal_conv1d
