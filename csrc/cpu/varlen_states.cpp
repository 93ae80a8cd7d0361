// The last inputs of packed sequences: values are only moved, so all CPUs have the same code.
#include <cstring>

#include "index_tensor.h"
#include "operations.h"
#include "parallel.h"

namespace causal_conv1d {
namespace {

// Element is an unsigned integer of the tensors' element size: values are only moved.
template <class Element>
void varlen_states_of(const VarlenStatesParams& p, int64_t sequence) {
  constexpr int64_t kSize = sizeof(Element);
  const int64_t begin = index_at(p.cu_seqlens, sequence);
  const int64_t end = index_at(p.cu_seqlens, sequence + 1);
  const Tensor& states = p.states;
  const int64_t length = states.sizes[2];
  for (int64_t j = 0; j < length; ++j) {
    const int64_t t = end - length + j;
    char* const row = static_cast<char*>(states.data) +
                      (sequence * states.strides[0] + j * states.strides[2]) * kSize;
    const char* const token = static_cast<const char*>(p.x.data) + t * p.x.strides[0] * kSize;
    for (int64_t d = 0; d < states.sizes[1]; ++d) {
      Element value = 0;
      if (t >= begin) std::memcpy(&value, token + d * p.x.strides[1] * kSize, sizeof(value));
      std::memcpy(row + d * states.strides[1] * kSize, &value, sizeof(value));
    }
  }
}

}  // namespace

void run_varlen_states(const VarlenStatesParams& p, int num_threads) {
  const int64_t batch = p.states.sizes[0];
  const int64_t elements = batch * p.states.sizes[1] * p.states.sizes[2];
  const auto function = p.x.dtype == CAUSAL_CONV1D_FLOAT64   ? varlen_states_of<uint64_t>
                        : p.x.dtype == CAUSAL_CONV1D_FLOAT32 ? varlen_states_of<uint32_t>
                                                             : varlen_states_of<uint16_t>;
  parallel_for(batch, num_threads, elements * 2, 0,
               [&](int64_t sequence, char*) { function(p, sequence); });
}

}  // namespace causal_conv1d
