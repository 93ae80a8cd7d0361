// The ids of a row's sequences (seq_idx).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../integers.h"
#include "pieces.h"
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

// The ids of one sequence's steps, if there are any: `first` is that of time 0.
struct IdRow {
  const char* data;  // null: none
  int64_t stride, length;
  int32_t first;
};

// Of a piece, of a row of ids in p.seq_idx.
inline IdRow id_row_of(const Tensor& seq_idx, const Piece& piece, int64_t dilation) {
  if (!is_given(seq_idx)) return {nullptr, 0, 0, 0};
  const int64_t stride = seq_idx.strides[1];
  const char* const data = static_cast<const char*>(seq_idx.data) +
                           (piece.b * seq_idx.strides[0] + piece.start * stride) * 4;
  const int32_t first = seq_idx.sizes[1] > 0 ? read_int32(seq_idx, piece.b) : -1;
  return {data, stride * dilation, piece.length, first};
}

CAUSAL_CONV1D_INLINE int32_t id_at(const IdRow& row, int64_t t) {
  int32_t id;
  __builtin_memcpy(&id, row.data + t * row.stride * 4, sizeof(id));
  return id;
}

// ids of steps [t, t + n); those before the sequence are first, those behind it padding. Returns
// whether all are one id that is no padding, so that ids need not be looked at.
inline bool load_ids(const IdRow& row, int64_t t, int64_t n, int32_t* ids) {
  const int64_t begin = smaller(n, larger(0, -t));                // the first at or after step 0
  const int64_t end = larger(begin, smaller(n, row.length - t));  // the first behind the sequence
  for (int64_t i = 0; i < begin; ++i) ids[i] = row.first;
  if (begin < end && row.stride == 1) {
    __builtin_memcpy(ids + begin, row.data + (t + begin) * 4, static_cast<size_t>(end - begin) * 4);
  } else {
    for (int64_t i = begin; i < end; ++i) ids[i] = id_at(row, t + i);
  }
  for (int64_t i = end; i < n; ++i) ids[i] = -1;
  const int32_t id = ids[0];
  int32_t different = 0;
  for (int64_t i = 0; i < n; ++i) different |= ids[i] ^ id;
  return different == 0 && id >= 0;
}

// Of rows x~[first] to x~[first + n - 1] of the states, makes those zero that padding stands for:
// padding itself, and the initial state if padding is what follows it, unless there is nothing
// else: has_end tells whether there is.
template <class S>
void zero_padding(const Tile& tile, const IdRow& row, bool has_end, int64_t first, int64_t n,
                  S* x) {
  if (!has_end || row.data == nullptr) return;
  for (int64_t r = 0; r < n; ++r) {
    const int32_t id = first + r < 0 ? row.first : id_at(row, first + r);
    if (id >= 0) continue;
    __builtin_memset(x + r * tile.pitch, 0, static_cast<size_t>(tile.pitch) * sizeof(S));
  }
}

}  // namespace
}  // namespace causal_conv1d
