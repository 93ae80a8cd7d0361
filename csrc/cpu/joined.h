// Sequences of a row without states as one sequence: see Joined in problem.h.
#pragma once

#include <vector>

#include "problem.h"
#include "tiling.h"

namespace causal_conv1d {

// Whether that is faster than one sequence after the other: where there are many steps to a vector.
bool should_join(const Sequences& sequences, const Tiling& tiling, bool has_states);

// Whether the ids of each row never fall and none is padding: then each id has one stretch of
// steps.
bool ids_ascend(const Tensor& seq_idx);

// Makes one sequence of all, or of each row of ids that ascend. Its bounds and steps are in the
// memory of this object.
class Joining {
 public:
  Joining(const Sequences& sequences, const Tensor& x);
  Joining(const Tensor& seq_idx, int64_t apart, const Tensor& x);
  Sequences sequences() const { return sequences_; }
  Joined joined() const { return joined_; }

 private:
  Joining(int64_t apart, int64_t batch, const Tensor& x);
  void add(int64_t b, int64_t begin, int64_t end);

  int64_t bounds_[2];
  Sequences sequences_;
  std::vector<char> memory_[2];
  Joined joined_;
};

}  // namespace causal_conv1d
