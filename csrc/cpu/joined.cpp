#include "joined.h"

#include <algorithm>
#include <cstring>

#include "../element_size.h"

namespace causal_conv1d {
namespace {

// Kernels may look that many steps past either end.
constexpr int64_t kSlack = 64;

// The numbers 0 to 3 in a type, in its lowest bytes.
uint32_t bits_of(int32_t dtype, int64_t number) {
  constexpr uint32_t kFloats[] = {0, 0x3f800000, 0x40000000, 0x40400000};
  constexpr uint32_t kHalves[] = {0, 0x3c00, 0x4000, 0x4200};
  if (dtype == CAUSAL_CONV1D_FLOAT16) return kHalves[number];
  return dtype == CAUSAL_CONV1D_BFLOAT16 ? kFloats[number] >> 16 : kFloats[number];
}

}  // namespace

bool should_join(const Sequences& s, const Tiling& tiling, bool has_states) {
  return tiling.direct && tiling.channel_first && s.bounds != nullptr && s.count > 1 &&
         s.dilation == 1 && !has_states;
}

Joining::Joining(const Sequences& s, const Tensor& x, int64_t width)
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
      const uint32_t before = bits_of(x.dtype, std::min(width - 1, t - begin));
      const uint32_t behind = bits_of(x.dtype, std::min(width - 1, end - 1 - t));
      std::memcpy(memory_[0].data() + (kSlack + t) * size, &before, static_cast<size_t>(size));
      std::memcpy(memory_[1].data() + (kSlack + t) * size, &behind, static_cast<size_t>(size));
    }
  }
}

}  // namespace causal_conv1d
