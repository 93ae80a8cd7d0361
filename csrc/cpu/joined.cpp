#include "joined.h"

#include <algorithm>
#include <cstring>

#include "../element_size.h"

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

Joining::Joining(const Sequences& s, const Tensor& x)
    : bounds_{s.bounds[0], s.bounds[s.count]}, joined_{} {
  const int64_t size = element_size(x.dtype), total = x.sizes[2];
  Tensor* const tensors[] = {&joined_.before, &joined_.behind};
  for (int i = 0; i < 2; ++i) {
    memory_[i].resize(static_cast<size_t>((total + 2 * kSlack) * size));
    *tensors[i] = {memory_[i].data() + kSlack * size, {1, 1, total}, {0, 0, 1}, 3, x.dtype};
  }
  for (int64_t n = 0; n < s.count; ++n) {
    const int64_t begin = s.bounds[n], end = s.bounds[n + 1];
    for (int64_t t = begin; t < end; ++t) {
      const uint32_t before = bits_of(x.dtype, std::min(Joined::kMost, t - begin));
      const uint32_t behind = bits_of(x.dtype, std::min(Joined::kMost, end - 1 - t));
      std::memcpy(memory_[0].data() + (kSlack + t) * size, &before, static_cast<size_t>(size));
      std::memcpy(memory_[1].data() + (kSlack + t) * size, &behind, static_cast<size_t>(size));
    }
  }
}

}  // namespace causal_conv1d
