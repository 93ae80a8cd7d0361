#include "index_tensor.h"

#include <algorithm>
#include <cstring>

namespace causal_conv1d {

int64_t index_at(const Tensor& t, int64_t i, int64_t j) {
  const int64_t offset = i * t.strides[0] + (t.ndim > 1 ? j * t.strides[1] : 0);
  const char* const data = static_cast<const char*>(t.data);
  if (t.dtype == CAUSAL_CONV1D_INT64) {
    int64_t value;
    std::memcpy(&value, data + offset * 8, sizeof(value));
    return value;
  }
  int32_t value;
  std::memcpy(&value, data + offset * 4, sizeof(value));
  return value;
}

bool flag_at(const Tensor& t, int64_t i) {
  if (t.dtype == CAUSAL_CONV1D_INT32 || t.dtype == CAUSAL_CONV1D_INT64) return index_at(t, i) != 0;
  return static_cast<const unsigned char*>(t.data)[i * t.strides[0]] != 0;
}

Tensor with_int32_ids(Tensor seq_idx, std::vector<int32_t>* memory) {
  if (!given(seq_idx) || seq_idx.dtype != CAUSAL_CONV1D_INT64) return seq_idx;
  const int64_t batch = seq_idx.sizes[0], seqlen = seq_idx.sizes[1];
  memory->reserve(static_cast<size_t>(batch * seqlen));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < seqlen; ++t) {
      memory->push_back(static_cast<int32_t>(index_at(seq_idx, b, t)));
    }
  }
  seq_idx.data = memory->data();
  seq_idx.dtype = CAUSAL_CONV1D_INT32;
  seq_idx.strides[0] = seqlen;
  seq_idx.strides[1] = 1;
  return seq_idx;
}

int64_t end_of_row(const Tensor& seq_idx, int64_t b) {
  int64_t end = seq_idx.sizes[1];
  while (end > 0 && index_at(seq_idx, b, end - 1) < 0) --end;
  return end;
}

bool has_padding(const Tensor& seq_idx, int64_t b, int64_t first) {
  for (int64_t t = std::max<int64_t>(0, first); t < seq_idx.sizes[1]; ++t) {
    if (index_at(seq_idx, b, t) < 0) return true;
  }
  return false;
}

}  // namespace causal_conv1d
