// What csrc/scan_self_test.h compares, with the CPU's kernels in the place of those under test.
#include "scan_self_test.h"

#include <gtest/gtest.h>

#include <utility>

#include "element_size.h"
#include "selective_scan.h"

namespace causal_conv1d {
namespace {

struct Cpu {
  Status operator()(const ScanForwardParams& p) const {
    return causal_conv1d_cpu_scan_forward(&p, 1);
  }
  Status operator()(const ScanBackwardParams& p) const {
    return causal_conv1d_cpu_scan_backward(&p, 1);
  }
  Status operator()(const StateUpdateParams& p) const {
    return causal_conv1d_cpu_state_update(&p, 1);
  }
};

// f(a test and its memory after a right call, of all operations and dtypes).
template <typename F>
void for_each_test(F&& f) {
  for (int which = ScanSelfTest::kForward; which <= ScanSelfTest::kStateUpdate; ++which) {
    for (int dtype = CAUSAL_CONV1D_FLOAT32; dtype <= CAUSAL_CONV1D_FLOAT64; ++dtype) {
      SCOPED_TRACE(std::to_string(which) + ", " + dtype_name(dtype));
      const ScanSelfTest test(static_cast<ScanSelfTest::Operator>(which), dtype);
      std::vector<char> memory = test.inputs();
      const Status status = test.call(memory.data(), Cpu{});
      ASSERT_EQ(status.code, CAUSAL_CONV1D_OK) << status.message;
      f(test, memory, dtype);
    }
  }
}

TEST(ScanSelfTest, FindsNothingWrongWithARightKernel) {
  int tests = 0;
  for_each_test([&](const ScanSelfTest& test, const std::vector<char>& right, int) {
    EXPECT_EQ(test.problem(right.data(), right.data()), "");
    ++tests;
  });
  EXPECT_EQ(tests, 12);
}

TEST(ScanSelfTest, FindsAKernelThatDoesNothing) {
  for_each_test([](const ScanSelfTest& test, const std::vector<char>& right, int) {
    EXPECT_NE(test.problem(test.inputs().data(), right.data()), "");
  });
}

// Every 13th element in turn made huge, or no number.
TEST(ScanSelfTest, FindsOneWrongElementAndNamesItsTensor) {
  for_each_test([](const ScanSelfTest& test, const std::vector<char>& right, int dtype) {
    const int64_t size = element_size(dtype);
    for (const ScanSelfTest::Output& output : test.outputs()) {
      std::vector<char> wrong = right;
      for (int64_t at = output.begin; at < output.end; at += 13 * size) {
        char& top = wrong[static_cast<size_t>(at + size - 1)];
        const char before = std::exchange(top, 0x7f);
        const std::string problem = test.problem(wrong.data(), right.data());
        EXPECT_EQ(problem.rfind(std::string(output.name) + " in " + dtype_name(dtype), 0), 0u)
            << problem;
        top = before;
      }
    }
  });
}

}  // namespace
}  // namespace causal_conv1d
