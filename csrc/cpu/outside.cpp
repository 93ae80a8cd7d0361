#include "outside.h"

#include <cstring>

#include "../element_size.h"

namespace causal_conv1d {

void copy_times(const Tensor& from, const Tensor& to, int64_t begin, int64_t end) {
  const int64_t size = element_size(to.dtype);
  const auto at = [&](const Tensor& t, int64_t d, int64_t time) {
    return static_cast<char*>(t.data) + (d * t.strides[1] + time * t.strides[2]) * size;
  };
  for (int64_t time = begin; time < end; ++time) {
    for (int64_t d = 0; d < to.sizes[1]; ++d) {
      if (given(from)) {
        std::memcpy(at(to, d, time), at(from, d, time), static_cast<size_t>(size));
      } else {
        std::memset(at(to, d, time), 0, static_cast<size_t>(size));
      }
    }
  }
}

void copy_outside(const Sequences& sequences, const Tensor& from, const Tensor& to) {
  if (!has_elements(to)) return;
  copy_times(from, to, 0, sequences.bounds[0]);
  copy_times(from, to, sequences.bounds[sequences.count], to.sizes[2]);
}

}  // namespace causal_conv1d
