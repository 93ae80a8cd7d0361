#include "outside.h"

#include <cstdlib>
#include <cstring>

#include "../element_size.h"

namespace causal_conv1d {

void copy_times(const Tensor& from, const Tensor& to, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t size = element_size(to.dtype);
  // Along what lies closer together.
  const bool along_time = std::abs(to.strides[2]) <= std::abs(to.strides[1]);
  const int inner = along_time ? 2 : 1, outer = along_time ? 1 : 2;
  const int64_t inner_count = along_time ? end - begin : to.sizes[1];
  const int64_t outer_count = along_time ? to.sizes[1] : end - begin;
  const auto at = [&](const Tensor& t, int64_t i, int64_t j) {
    const int64_t offset = begin * t.strides[2] + i * t.strides[outer] + j * t.strides[inner];
    return static_cast<char*>(t.data) + offset * size;
  };
  const bool whole = to.strides[inner] == 1 && (!given(from) || from.strides[inner] == 1);
  const int64_t count = whole ? 1 : inner_count;
  const size_t bytes = static_cast<size_t>((whole ? inner_count : 1) * size);
  for (int64_t i = 0; i < outer_count; ++i) {
    for (int64_t j = 0; j < count; ++j) {
      if (given(from)) {
        std::memcpy(at(to, i, j), at(from, i, j), bytes);
      } else {
        std::memset(at(to, i, j), 0, bytes);
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
