// The ids of a row's sequences (seq_idx).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../integers.h"
#include "tensor.h"
#include "tile.h"

namespace causal_conv1d {
namespace {

// Where ids differ within a block: ids[i] belongs to row i of x, and row i of z has the id
// ids[i + center]. Null ids: all the same.
struct Ids {
  const int32_t* ids;
  int64_t center;
};

// ids of times [t, t + n); those before the sequence are id(0), those behind it padding. Returns
// whether all are one id that is no padding, so that ids need not be looked at.
inline bool load_ids(const Tensor& seq_idx, int64_t b, int64_t t, int64_t n, int32_t* ids) {
  const int64_t seqlen = seq_idx.sizes[1];
  const int64_t begin = smaller(n, larger(0, -t));            // the first at or after time 0
  const int64_t end = larger(begin, smaller(n, seqlen - t));  // the first behind the sequence
  const int32_t first = seqlen > 0 ? read_int32(seq_idx, b) : -1;
  for (int64_t i = 0; i < begin; ++i) ids[i] = first;
  if (begin < end && seq_idx.strides[1] == 1) {
    const char* const src =
        static_cast<const char*>(seq_idx.data) + (b * seq_idx.strides[0] + t + begin) * 4;
    __builtin_memcpy(ids + begin, src, static_cast<size_t>(end - begin) * 4);
  } else {
    for (int64_t i = begin; i < end; ++i) ids[i] = read_int32(seq_idx, b, t + i);
  }
  for (int64_t i = end; i < n; ++i) ids[i] = -1;
  const int32_t id = ids[0];
  int32_t different = 0;
  for (int64_t i = 0; i < n; ++i) different |= ids[i] ^ id;
  return different == 0 && id >= 0;
}

// Of rows x~[first] to x~[first + n - 1] of the states that precede the time `end`, makes those
// zero that padding stands for: padding itself, and the initial state if padding is what follows
// it, unless there is nothing else.
template <class S>
void zero_padding(const Tile& tile, const Tensor& seq_idx, int64_t b, int64_t end, int64_t first,
                  int64_t n, S* x) {
  for (int64_t r = 0; r < n; ++r) {
    if (end == 0 || read_int32(seq_idx, b, larger(0, first + r)) >= 0) continue;
    __builtin_memset(x + r * tile.pitch, 0, static_cast<size_t>(tile.pitch) * sizeof(S));
  }
}

}  // namespace
}  // namespace causal_conv1d
