// A sequence token by token, with a state that takes each in; bitwise what it gives as a whole.
#include <causal_conv1d.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace {

constexpr int64_t kDim = 2, kWidth = 4, kSeqlen = 5;

// Of one sequence, with the channels adjacent: (1, kDim, length).
causal_conv1d_tensor sequence(float* data, int64_t length) {
  return {data, {1, kDim, length}, {kDim * length, 1, kDim}, 3, CAUSAL_CONV1D_FLOAT32};
}

void require(const causal_conv1d_status& status) {
  if (status.code != CAUSAL_CONV1D_OK) throw std::runtime_error(status.message);
}

}  // namespace

int main() {
  std::vector<float> x, whole(kSeqlen * kDim), steps(kSeqlen * kDim), state(kDim * kWidth);
  for (int i = 0; i < kSeqlen * kDim; ++i) x.push_back(static_cast<float>(i % 3) - 1);
  std::vector<float> weight{1, 2, 3, 4, 4, 3, 2, 1}, bias{0.5f, -0.5f};
  const causal_conv1d_tensor weight_tensor{
      weight.data(), {kDim, kWidth}, {kWidth, 1}, 2, CAUSAL_CONV1D_FLOAT32};
  const causal_conv1d_tensor bias_tensor{bias.data(), {kDim}, {1}, 1, CAUSAL_CONV1D_FLOAT32};

  causal_conv1d_forward_params forward{};
  forward.x = sequence(x.data(), kSeqlen);
  forward.weight = weight_tensor;
  forward.bias = bias_tensor;
  forward.out = sequence(whole.data(), kSeqlen);
  forward.silu = 1;
  require(causal_conv1d_cpu_forward(&forward, 0));

  causal_conv1d_update_params update{};
  update.conv_state = sequence(state.data(), kWidth);
  update.weight = weight_tensor;
  update.bias = bias_tensor;
  update.silu = 1;
  for (int64_t t = 0; t < kSeqlen; ++t) {
    update.x = sequence(x.data() + t * kDim, 1);
    update.out = sequence(steps.data() + t * kDim, 1);
    require(causal_conv1d_cpu_update(&update, 0));
  }
  const bool same = std::memcmp(whole.data(), steps.data(), whole.size() * sizeof(float)) == 0;
  std::printf("%s\n", same ? "the same bits" : "different bits");
  return same ? 0 : 1;
}
