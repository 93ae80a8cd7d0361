#include "joined.h"

#include <algorithm>
#include <cstring>

#include "../element_size.h"
#include "index_tensor.h"

namespace causal_conv1d {
namespace {

// Kernels may look that many steps past either end.
constexpr int64_t kSlack = 64;

// A number from 0 to Joined::kMost, which each type holds exactly, in a type's lowest bytes.
uint32_t bits_of(int32_t dtype, int64_t number) {
  const float value = static_cast<float>(number);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (dtype == CAUSAL_CONV1D_BFLOAT16) return bits >> 16;
  if (dtype != CAUSAL_CONV1D_FLOAT16) return bits;
  return number == 0 ? 0 : (bits - (112u << 23)) >> 13;  // the exponents' biases differ by 112
}

}  // namespace

bool should_join(const Sequences& s, const Tiling& tiling, bool has_states) {
  return tiling.direct && tiling.channel_first && s.bounds != nullptr && s.count > 1 &&
         s.dilation == 1 && !has_states;
}

bool ids_ascend(const Tensor& seq_idx) {
  for (int64_t b = 0; b < seq_idx.sizes[0]; ++b) {
    int64_t last = 0;
    for (int64_t t = 0; t < seq_idx.sizes[1]; ++t) {
      const int64_t id = index_at(seq_idx, b, t);
      if (id < last) return false;
      last = id;
    }
  }
  return true;
}

Joining::Joining(int64_t apart, int64_t batch, const Tensor& x)
    : bounds_{}, sequences_{1, nullptr, 0, nullptr, apart}, joined_{} {
  const int64_t size = element_size(x.dtype), total = x.sizes[2];
  Tensor* const tensors[] = {&joined_.before, &joined_.behind};
  for (int i = 0; i < 2; ++i) {
    memory_[i].resize(static_cast<size_t>((batch * total + 2 * kSlack) * size));
    char* const data = memory_[i].data() + kSlack * size;
    *tensors[i] = {data, {batch, 1, total}, {total, 0, 1}, 3, x.dtype};
  }
}

Joining::Joining(const Sequences& s, const Tensor& x) : Joining(s.apart, 1, x) {
  bounds_[0] = s.bounds[0];
  bounds_[1] = s.bounds[s.count];
  sequences_.bounds = bounds_;
  sequences_.count = 1;
  for (int64_t n = 0; n < s.count; ++n) add(0, s.bounds[n], s.bounds[n + 1]);
}

Joining::Joining(const Tensor& seq_idx, int64_t apart, const Tensor& x)
    : Joining(apart, x.sizes[0], x) {
  for (int64_t b = 0; b < x.sizes[0]; ++b) {
    for (int64_t begin = 0, end; begin < x.sizes[2]; begin = end) {
      const int64_t id = index_at(seq_idx, b, begin);
      for (end = begin + 1; end < x.sizes[2] && index_at(seq_idx, b, end) == id;) ++end;
      add(b, begin, end);
    }
  }
}

// One sequence of row b.
void Joining::add(int64_t b, int64_t begin, int64_t end) {
  const Tensor& tensor = joined_.before;
  const int64_t size = element_size(tensor.dtype), row = kSlack + b * tensor.strides[0];
  const int64_t apart = sequences_.apart;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t counts[] = {(t - begin) / apart, (end - 1 - t) / apart};
    for (int i = 0; i < 2; ++i) {
      const uint32_t bits = bits_of(tensor.dtype, std::min(Joined::kMost, counts[i]));
      std::memcpy(memory_[i].data() + (row + t) * size, &bits, static_cast<size_t>(size));
    }
  }
}

}  // namespace causal_conv1d
