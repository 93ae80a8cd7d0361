// What csrc/self_test.h compares, with the CPU's kernels in the place of those under test.
#include "self_test.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "causal_conv1d.h"
#include "layout.h"

namespace causal_conv1d {
namespace {

constexpr const char* kOperators[] = {"forward", "backward", "update", "varlen_states"};

struct Cpu {
  Status operator()(const ForwardParams& p) const { return causal_conv1d_cpu_forward(&p, 1); }
  Status operator()(const BackwardParams& p) const { return causal_conv1d_cpu_backward(&p, 1); }
  Status operator()(const UpdateParams& p) const { return causal_conv1d_cpu_update(&p, 1); }
  Status operator()(const VarlenStatesParams& p) const {
    return causal_conv1d_cpu_varlen_states(&p, 1);
  }
};

// f(a test and its memory after a right call, of all operators, dtypes and layouts).
template <typename F>
void for_each_test(F&& f) {
  for (int kernel = 0; kernel < 32; ++kernel) {
    const bool channel_last = kernel / 4 % 2 != 0;
    if (channel_last && kernel / 8 > SelfTest::kBackward) continue;
    SCOPED_TRACE(std::string(kOperators[kernel / 8]) + ", " + dtype_name(kernel % 4) +
                 (channel_last ? ", channel-last" : ""));
    const SelfTest test(static_cast<SelfTest::Operator>(kernel / 8), kernel % 4, channel_last);
    std::vector<char> memory = test.inputs();
    const Status status = test.call(memory.data(), Cpu{});
    ASSERT_EQ(status.code, CAUSAL_CONV1D_OK) << status.message;
    f(test, memory, kernel % 4);
  }
}

TEST(SelfTest, FindsNothingWrongWithARightKernel) {
  int tests = 0;
  for_each_test([&](const SelfTest& test, const std::vector<char>& right, int) {
    EXPECT_EQ(test.problem(right.data(), right.data()), "");
    ++tests;
  });
  EXPECT_EQ(tests, 24);
}

TEST(SelfTest, FindsAKernelThatDoesNothing) {
  for_each_test([](const SelfTest& test, const std::vector<char>& right, int) {
    EXPECT_NE(test.problem(test.inputs().data(), right.data()), "");
  });
}

// Each element in turn with the first bit of its exponent changed.
TEST(SelfTest, FindsOneWrongElementAndNamesItsTensor) {
  for_each_test([](const SelfTest& test, const std::vector<char>& right, int dtype) {
    const int64_t size = dtype == CAUSAL_CONV1D_FLOAT64   ? 8
                         : dtype == CAUSAL_CONV1D_FLOAT32 ? 4
                                                          : 2;
    for (const SelfTest::Output& output : test.outputs()) {
      int64_t found = 0;
      for (int64_t at = output.begin; at < output.end; at += size) {
        std::vector<char> wrong = right;
        char& top = wrong[static_cast<size_t>(at + size - 1)];
        top = static_cast<char>(top ^ 0x40);
        const std::string problem = test.problem(wrong.data(), right.data());
        found += problem.rfind(std::string(output.name) + " in " + dtype_name(dtype), 0) == 0;
      }
      EXPECT_EQ(found, (output.end - output.begin) / size) << output.name;
    }
  });
}

TEST(SelfTest, CallsTheKernelsOfItsLayout) {
  for (const auto which : {SelfTest::kForward, SelfTest::kBackward}) {
    for (const bool last : {false, true}) {
      const SelfTest test(which, CAUSAL_CONV1D_FLOAT32, last);
      std::vector<char> memory = test.inputs();
      test.call(memory.data(), [&](const auto& params) {
        EXPECT_EQ(is_channel_last(params.x), last);
        return Status{};
      });
    }
  }
}

TEST(SelfTest, AllowsRoundingAndNoMore) {
  const SelfTest test(SelfTest::kForward, CAUSAL_CONV1D_FLOAT32, false);
  std::vector<char> right = test.inputs();
  ASSERT_EQ(test.call(right.data(), Cpu{}).code, CAUSAL_CONV1D_OK);
  std::vector<char> wrong = right;
  const SelfTest::Output out = test.outputs()[0];
  auto* values = reinterpret_cast<float*>(&wrong[static_cast<size_t>(out.begin)]);
  const int64_t n = (out.end - out.begin) / 4;
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(values[i]));
  values[n - 1] += largest * 5e-5f;
  EXPECT_EQ(test.problem(wrong.data(), right.data()), "");
  values[n - 1] += largest * 15e-5f;
  EXPECT_NE(test.problem(wrong.data(), right.data()), "");
}

TEST(SelfTest, TakesHalfPrecisionAsItIs) {
  const float expected[] = {-1, -0.875f, 0, 0.125f, 1};
  for (int dtype : {CAUSAL_CONV1D_FLOAT16, CAUSAL_CONV1D_BFLOAT16}) {
    const SelfTest test(SelfTest::kForward, dtype, false);
    const std::vector<char> inputs = test.inputs();
    const uint16_t codes[2][5] = {{0xbc00, 0xbb00, 0, 0x3000, 0x3c00},
                                  {0xbf80, 0xbf60, 0, 0x3e00, 0x3f80}};
    for (int64_t i = 0; i < 17; ++i) {
      const float value = static_cast<float>(i * 37 % 17 - 8) / 8;
      for (int k = 0; k < 5; ++k) {
        if (value != expected[k]) continue;
        uint16_t code;
        std::memcpy(&code, &inputs[static_cast<size_t>(2 * i)], 2);
        EXPECT_EQ(code, codes[dtype - CAUSAL_CONV1D_FLOAT16][k]) << value;
      }
    }
  }
}

}  // namespace
}  // namespace causal_conv1d
