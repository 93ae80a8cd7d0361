#include "strides.h"

#include <algorithm>
#include <utility>

namespace causal_conv1d::torch_abi {
namespace {

// Whether the elements fill their memory; dimensions of one element do not count.
bool is_dense(int ndim, const int64_t* sizes, const int64_t* strides) {
  int order[4] = {}, count = 0;  // from the smallest stride to the largest
  for (int i = 0; i < ndim; ++i) {
    if (sizes[i] == 0) return true;
    if (sizes[i] == 1) continue;
    int at = count++;
    for (; at > 0 && strides[order[at - 1]] > strides[i]; --at) order[at] = order[at - 1];
    order[at] = i;
  }
  int64_t expected = 1;
  for (int i = 0; i < count; ++i) {
    if (strides[order[i]] != expected) return false;
    expected *= sizes[order[i]];
  }
  return true;
}

// Whether dimension a lies outside of b: 1, inside: -1, or that neither is told: 0.
int compare(int a, int b, const int64_t* sizes, const int64_t* strides) {
  if (strides[a] == 0 || strides[b] == 0) return 0;
  if (strides[a] != strides[b]) return strides[a] < strides[b] ? -1 : 1;
  return sizes[a] > sizes[b] ? 1 : 0;
}

}  // namespace

void like_strides(int ndim, const int64_t* sizes, const int64_t* strides, int64_t* result) {
  if (is_dense(ndim, sizes, strides)) {
    std::copy(strides, strides + ndim, result);
    return;
  }
  int order[4];  // from the fastest to the slowest
  for (int i = 0; i < ndim; ++i) order[i] = ndim - 1 - i;
  // An insertion sort, as dimensions of stride 0 compare equal to all and so have no place of their
  // own: which one they get is for torch to say, and this is how it finds it.
  for (int i = 1; i < ndim; ++i) {
    int at = i;
    for (int j = i - 1; j >= 0; --j) {
      const int c = compare(order[j], order[at], sizes, strides);
      if (c > 0) {
        std::swap(order[j], order[at]);
        at = j;
      } else if (c < 0) {
        break;
      }
    }
  }
  int64_t stride = 1;
  for (int i = 0; i < ndim; ++i) {
    result[order[i]] = stride;
    stride *= std::max<int64_t>(sizes[order[i]], 1);
  }
}

}  // namespace causal_conv1d::torch_abi
