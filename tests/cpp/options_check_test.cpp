// What a program may get wrong in the options of a forward and a backward.
#include <check.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <functional>
#include <list>
#include <string>
#include <vector>

namespace test {
namespace {

using causal_conv1d::BackwardParams;
using causal_conv1d::check;
using causal_conv1d::ForwardParams;
using causal_conv1d::OptionGradients;
using causal_conv1d::Options;
using Tensor = causal_conv1d_tensor;

constexpr int64_t kDim = 6, kWidth = 4, kTotal = 11, kSequences = 3, kDilation = 2;

// The arguments of a forward and a backward of packed sequences, all given.
struct Calls {
  std::list<std::vector<double>> memory;
  ForwardParams forward{};
  BackwardParams backward{};
  Options options{};
  OptionGradients gradients{};

  Tensor tensor(const std::vector<int64_t>& sizes, int32_t dtype = CAUSAL_CONV1D_FLOAT32) {
    Tensor t{};
    t.ndim = static_cast<int32_t>(sizes.size());
    t.dtype = dtype;
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
      t.sizes[i] = sizes[static_cast<size_t>(i)];
      t.strides[i] = stride;
      stride *= t.sizes[i];
    }
    memory.emplace_back(static_cast<size_t>(stride));
    t.data = memory.back().data();
    return t;
  }
  Tensor row() { return tensor({1, kDim, kTotal}); }
  Tensor states() { return tensor({kSequences, kDim, (kWidth - 1) * kDilation}); }

  Calls() {
    forward = {row(), tensor({kDim, kWidth}), tensor({kDim}), {}, states(), row(), states(), 1};
    backward = {forward.x, forward.weight,         forward.bias,   row(),    {}, states(), states(),
                row(),     tensor({kDim, kWidth}), tensor({kDim}), states(), 1};
    options = {sizeof options, kDilation, tensor({kSequences + 1}, CAUSAL_CONV1D_INT64),
               row(),          row(),     row()};
    gradients = {sizeof gradients, row(), row(), 1};
  }

  std::string forward_message() const {
    Options own;
    return message(check(&forward, &options, &own));
  }
  std::string backward_message() const {
    Options own;
    OptionGradients own_gradients;
    return message(check(&backward, &options, &gradients, &own, &own_gradients));
  }
  static std::string message(const causal_conv1d_status& status) {
    EXPECT_EQ(status.code,
              status.message[0] == '\0' ? CAUSAL_CONV1D_OK : CAUSAL_CONV1D_INVALID_ARGUMENT);
    return status.message;
  }
};

using Spoil = std::function<void(Calls&)>;

TEST(OptionsCheck, TheArgumentsUsedHereAreValid) {
  Calls calls;
  EXPECT_EQ(calls.forward_message(), "");
  EXPECT_EQ(calls.backward_message(), "");
  calls.options.residual = calls.forward.x;
  EXPECT_EQ(calls.forward_message(), "");
  calls.forward.final_states_out = calls.forward.initial_states;
  EXPECT_EQ(calls.forward_message(), "");
}

TEST(OptionsCheck, OfForwardAndBackward) {
  const std::vector<std::pair<std::string, Spoil>> wrong{
      {"options.size must be the size of the parameter struct, got 0",
       [](Calls& c) { c.options.size = 0; }},
      {"options.size must be the size of the parameter struct, got 7",
       [](Calls& c) { c.options.size = 7; }},
      {"dilation must be 1..65536, got -1", [](Calls& c) { c.options.dilation = -1; }},
      {"dilation must be 1..65536, got 65537", [](Calls& c) { c.options.dilation = 65537; }},
      {"cu_seqlens must be int32 or int64, got float32",
       [](Calls& c) { c.options.cu_seqlens.dtype = CAUSAL_CONV1D_FLOAT32; }},
      {"cu_seqlens must be (sequences + 1,), got (1, 6, 11)",
       [](Calls& c) { c.options.cu_seqlens = c.row(); }},
      {"cu_seqlens must have at least one element",
       [](Calls& c) { c.options.cu_seqlens.sizes[0] = 0; }},
      {"cu_seqlens must not be given with seq_idx",
       [](Calls& c) {
         c.forward.seq_idx = c.backward.seq_idx = c.tensor({1, kTotal}, CAUSAL_CONV1D_INT32);
       }},
      {"x must be (1, dim, total) with cu_seqlens, got (2, 6, 11)",
       [](Calls& c) {
         c.forward.x = c.backward.x = c.tensor({2, kDim, kTotal});
         c.backward.dout = c.backward.x;
       }},
      {"pre_gate must be x's shape = (1, 6, 11), got (1, 6, 10)",
       [](Calls& c) { c.options.pre_gate.sizes[2] = 10; }},
      {"post_gate must have x's dtype float32, got float16",
       [](Calls& c) { c.options.post_gate.dtype = CAUSAL_CONV1D_FLOAT16; }},
      {"initial_states must be (sequences, dim, (width - 1) * dilation) = (3, 6, 6), got (3, 6, 3)",
       [](Calls& c) {
         c.forward.initial_states.sizes[2] = c.backward.initial_states.sizes[2] = 3;
       }},
      {"initial_states must be (sequences, dim, width - 1) = (3, 6, 3), got (3, 6, 6)",
       [](Calls& c) { c.options.dilation = 0; }},
      {"initial_states must be (batch, dim, (width - 1) * dilation) = (1, 6, 6), got (3, 6, 6)",
       [](Calls& c) { c.options.cu_seqlens = {}; }},
      {"pre_gate has no data", [](Calls& c) { c.options.pre_gate.data = nullptr; }},
  };
  for (const auto& [message, spoil] : wrong) {
    Calls calls;
    spoil(calls);
    EXPECT_EQ(calls.forward_message(), "causal_conv1d_fn: " + message);
    EXPECT_EQ(calls.backward_message(), "causal_conv1d_bwd: " + message);
  }
}

TEST(OptionsCheck, OfOneOfThem) {
  const std::vector<std::pair<std::string, Spoil>> wrong_forward{
      {"residual must be x's shape = (1, 6, 11), got (1, 6, 10)",
       [](Calls& c) { c.options.residual.sizes[2] = 10; }},
      {"out must not overlap pre_gate in memory",
       [](Calls& c) { c.forward.out = c.options.pre_gate; }},
      {"out must not overlap residual in memory",
       [](Calls& c) { c.forward.out = c.options.residual; }},
      {"final_states_out must not overlap cu_seqlens in memory",
       [](Calls& c) { c.options.cu_seqlens.data = c.forward.final_states_out.data; }},
  };
  for (const auto& [message, spoil] : wrong_forward) {
    Calls calls;
    spoil(calls);
    EXPECT_EQ(calls.forward_message(), "causal_conv1d_fn: " + message);
  }
  const std::vector<std::pair<std::string, Spoil>> wrong_backward{
      {"gradients.size must be the size of the parameter struct, got 0",
       [](Calls& c) { c.gradients.size = 0; }},
      {"dpre_gate must not be given without pre_gate", [](Calls& c) { c.options.pre_gate = {}; }},
      {"dpost_gate must not be given without post_gate",
       [](Calls& c) { c.options.post_gate = {}; }},
      {"dpost_gate must be x's shape = (1, 6, 11), got (1, 6, 10)",
       [](Calls& c) { c.gradients.dpost_gate.sizes[2] = 10; }},
      {"dx must not overlap post_gate in memory",
       [](Calls& c) { c.backward.dx = c.options.post_gate; }},
      {"dpost_gate must not overlap dpre_gate in memory",
       [](Calls& c) { c.gradients.dpost_gate = c.gradients.dpre_gate; }},
      {"dpre_gate is written and must not be an expanded tensor (stride 0)",
       [](Calls& c) { c.gradients.dpre_gate.strides[2] = 0; }},
  };
  for (const auto& [message, spoil] : wrong_backward) {
    Calls calls;
    spoil(calls);
    EXPECT_EQ(calls.backward_message(), "causal_conv1d_bwd: " + message);
  }
}

TEST(OptionsCheck, NullIsNoOption) {
  Calls calls;
  calls.forward.initial_states = calls.forward.final_states_out = {};
  Options own;
  std::memset(&own, 0x5A, sizeof own);
  EXPECT_EQ(check(&calls.forward, nullptr, &own).code, CAUSAL_CONV1D_OK);
  EXPECT_EQ(own.dilation, 1);
  EXPECT_EQ(own.pre_gate.ndim + own.cu_seqlens.ndim + own.residual.ndim, 0);
  EXPECT_EQ(check(static_cast<const ForwardParams*>(nullptr), &calls.options, &own).code,
            CAUSAL_CONV1D_INVALID_ARGUMENT);
}

// Of an older and of a newer caller.
TEST(OptionsCheck, OtherSizes) {
  Calls calls;
  calls.options.size = offsetof(Options, pre_gate);
  Options own;
  EXPECT_EQ(check(&calls.forward, &calls.options, &own).code, CAUSAL_CONV1D_OK);
  EXPECT_EQ(own.cu_seqlens.ndim, 1);
  EXPECT_EQ(own.pre_gate.ndim, 0);
  struct {
    Options options;
    int64_t more;
  } newer{calls.options, 0};
  newer.options.size = sizeof newer;
  EXPECT_EQ(check(&calls.forward, &newer.options, &own).code, CAUSAL_CONV1D_OK);
  EXPECT_EQ(own.pre_gate.ndim, 3);
  newer.more = 1;
  EXPECT_EQ(check(&calls.forward, &newer.options, &own).code, CAUSAL_CONV1D_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace test
