// The CPU's forward and backward with options: gates, residual, dilation and packed sequences, for
// every instruction set that this machine runs.
#include <gtest/gtest.h>

#include "../../csrc/cpu/dispatch.h"
#include "options_reference.h"

namespace test {
namespace {

using causal_conv1d::active_kernels;
using causal_conv1d::KernelTable;

std::vector<const KernelTable*> runnable() {
  std::vector<const KernelTable*> all;
  for (auto k = causal_conv1d::runnable_kernels(); *k != nullptr; ++k) all.push_back(*k);
  return all;
}

class WithOptions : public testing::TestWithParam<const KernelTable*> {
 protected:
  void SetUp() override { active_kernels = GetParam(); }
  void TearDown() override { active_kernels = best_; }

 private:
  const KernelTable* const best_ = active_kernels;
};

// Of cases() those of few elements, and sums that cancel, a relative error says little.
double allowed(int32_t dtype, size_t elements) {
  return (elements < 64 ? 3 : 1.5) * tolerance(dtype, elements);
}

void expect_close(const char* name, const Array& got, const Values& want) {
  if (!got.given()) return;
  EXPECT_LE(relative_error(got.values(), want.data), allowed(got.view.dtype, want.data.size()))
      << name;
}

void expect_matches(OptionsProblem& o, Layout layout) {
  SCOPED_TRACE(describe(o.chosen));
  OptionsForward f(o, layout);
  OptionsBackward b(o, layout);
  ASSERT_OK(causal_conv1d_cpu_forward_with(&f.params, &f.options, 2));
  ASSERT_OK(causal_conv1d_cpu_backward_with(&b.params, &b.options, &b.gradients, 2));
  const ForwardValues want = reference_forward(o);
  const OptionsBackwardValues gradients = reference_backward(o);
  const int32_t dtype = o.p.x.view.dtype;
  expect_close("out", f.out, want.out);
  EXPECT_EQ(f.final_states.values(), want.final_states.data);
  expect_close("dx", b.dx, gradients.dx);
  const double few = gradients.dweight.data.size() < 256 ? 4 : 1;
  EXPECT_LE(relative_error(b.dweight.values(), gradients.dweight.data),
            few * parameter_tolerance(dtype));
  if (b.dbias.given()) {
    EXPECT_LE(relative_error(b.dbias.values(), gradients.dbias.data),
              few * parameter_tolerance(dtype));
  }
  expect_close("dinitial_states", b.dinitial_states, gradients.dinitial_states);
  expect_close("dpre_gate", b.dpre_gate, gradients.dpre_gate);
  expect_close("dpost_gate", b.dpost_gate, gradients.dpost_gate);
  for (Array* a : {&f.out, &f.final_states, &b.dx, &b.dpre_gate, &b.dpost_gate}) {
    if (a->given()) expect_untouched_around(*a);
  }
}

TEST_P(WithOptions, RandomCasesMatchTheReference) {
  std::mt19937 random(test_seed());
  for (int i = test_cases(300); i > 0; --i) {
    OptionsProblem o(random_choice(random));
    expect_matches(o, o.chosen.base.layout);
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(, WithOptions, testing::ValuesIn(runnable()),
                         [](const auto& isa) { return std::string(isa.param->name); });

}  // namespace
}  // namespace test
