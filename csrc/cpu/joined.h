// Packed sequences without states as one sequence: see Joined in problem.h.
#pragma once

#include <vector>

#include "problem.h"
#include "tiling.h"

namespace causal_conv1d {

// Whether that is faster than one sequence after the other: where there are many steps to a vector.
bool should_join(const Sequences& sequences, const Tiling& tiling, bool has_states);

// Makes one sequence of all, whose bounds and steps are in the memory of this object.
class Joining {
 public:
  Joining(const Sequences& sequences, const Tensor& x);
  Sequences sequences() const { return {1, bounds_, 1, nullptr}; }
  Joined joined() const { return joined_; }

 private:
  int64_t bounds_[2];
  std::vector<char> memory_[2];
  Joined joined_;
};

}  // namespace causal_conv1d
