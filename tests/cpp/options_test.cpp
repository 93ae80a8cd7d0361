// The CPU's forward and backward with options: gates, residual, dilation and packed sequences, for
// every instruction set that this machine runs.
#include <gtest/gtest.h>

#include <utility>

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

// Several units of work, which cut sequences: as the reference has it, and the same bits from any
// number of threads.
TEST_P(WithOptions, LargeCasesMatchTheReference) {
  for (int32_t dtype : {CAUSAL_CONV1D_FLOAT32, CAUSAL_CONV1D_BFLOAT16}) {
    for (Layout layout : {Layout::kChannelFirst, Layout::kChannelLast}) {
      for (int64_t width : {4, 5}) {
        Chosen c;
        c.base.dtype = c.base.parameter_dtype = dtype;
        c.base.layout = layout;
        c.base.width = width;
        c.base.batch = 1;
        c.base.dim = layout == Layout::kChannelFirst ? 1 : 36;
        c.base.seqlen = layout == Layout::kChannelFirst ? 150001 : 5003;
        c.base.states = true;
        c.pre_gate = c.post_gate = c.residual_is_x = true;
        c.dilation = width == 5 ? 3 : 1;
        const int64_t n = c.base.seqlen;
        if (width == 4 || dtype == CAUSAL_CONV1D_FLOAT32) {
          c.bounds = {1, 1, n / 7, n / 7 + 3, n - 65, n - 64, n - 2};
        }
        OptionsProblem o(c);
        expect_matches(o, layout);
        if (HasFailure()) return;
        OptionsBackward one(o, layout), three(o, layout);
        ASSERT_OK(causal_conv1d_cpu_backward_with(&one.params, &one.options, &one.gradients, 1));
        ASSERT_OK(
            causal_conv1d_cpu_backward_with(&three.params, &three.options, &three.gradients, 3));
        EXPECT_EQ(one.dx.memory, three.dx.memory);
        EXPECT_EQ(one.dweight.memory, three.dweight.memory);
        EXPECT_EQ(one.dpre_gate.memory, three.dpre_gate.memory);
        EXPECT_EQ(one.dpost_gate.memory, three.dpost_gate.memory);
        EXPECT_EQ(one.dinitial_states.memory, three.dinitial_states.memory);
      }
    }
  }
}

// What a sequence of several is, as a tensor of its own.
causal_conv1d_tensor part_of(causal_conv1d_tensor t, int64_t start, int64_t length) {
  if (t.ndim == 0) return t;
  t.data = static_cast<char*>(t.data) + start * t.strides[2] * element_size(t.dtype);
  t.sizes[2] = length;
  return t;
}
causal_conv1d_tensor row_of(causal_conv1d_tensor t, int64_t row) {
  if (t.ndim == 0) return t;
  t.data = static_cast<char*>(t.data) + row * t.strides[0] * element_size(t.dtype);
  t.sizes[0] = 1;
  return t;
}

// Packed sequences have the bits that each has alone: outputs, states, and gradients of inputs.
TEST_P(WithOptions, PackedSequencesHaveTheBitsOfEachAlone) {
  std::mt19937 random(test_seed());
  for (int i = test_cases(150); i > 0 && !HasFailure(); --i) {
    Chosen c = random_choice(random);
    c.base.batch = 1;
    c.base.seq_idx = false;
    if (c.bounds.empty()) c.bounds = random_bounds(random, c.base.seqlen, 70);
    SCOPED_TRACE(describe(c));
    OptionsProblem o(c);
    OptionsForward packed(o, c.base.layout), alone(o, c.base.layout);
    OptionsBackward packed_b(o, c.base.layout), alone_b(o, c.base.layout);
    ASSERT_OK(causal_conv1d_cpu_forward_with(&packed.params, &packed.options, 2));
    ASSERT_OK(causal_conv1d_cpu_backward_with(&packed_b.params, &packed_b.options,
                                              &packed_b.gradients, 2));
    for (int64_t row = 0; row < o.rows(); ++row) {
      const int64_t start = o.start(row), length = o.length(row);
      causal_conv1d_forward_params f = alone.params;
      causal_conv1d_options options = alone.options;
      options.cu_seqlens = {};
      for (auto* t : {&f.x, &f.out, &options.pre_gate, &options.post_gate, &options.residual}) {
        *t = part_of(*t, start, length);
      }
      f.initial_states = row_of(f.initial_states, row);
      f.final_states_out = row_of(f.final_states_out, row);
      ASSERT_OK(causal_conv1d_cpu_forward_with(&f, &options, 1));
      causal_conv1d_backward_params b = alone_b.params;
      causal_conv1d_option_gradients gradients = alone_b.gradients;
      for (auto* t : {&b.x, &b.dout, &b.dx, &gradients.dpre_gate, &gradients.dpost_gate}) {
        *t = part_of(*t, start, length);
      }
      for (auto* t : {&b.initial_states, &b.dfinal_states, &b.dinitial_states}) {
        *t = row_of(*t, row);
      }
      ASSERT_OK(causal_conv1d_cpu_backward_with(&b, &options, &gradients, 1));
    }
    const auto expect_same_steps = [&](const Array& one, const Array& other) {
      if (!one.given()) return;
      for (int64_t t = c.bounds.front(); t < c.bounds.back(); ++t) {
        for (int64_t d = 0; d < c.base.dim; ++d) {
          ASSERT_EQ(one.get(0, d, t), other.get(0, d, t)) << "channel " << d << ", step " << t;
        }
      }
    };
    expect_same_steps(packed.out, alone.out);
    expect_same_steps(packed_b.dx, alone_b.dx);
    expect_same_steps(packed_b.dpre_gate, alone_b.dpre_gate);
    expect_same_steps(packed_b.dpost_gate, alone_b.dpost_gate);
    EXPECT_EQ(packed.final_states.values(), alone.final_states.values());
    if (c.base.states) {
      EXPECT_EQ(packed_b.dinitial_states.values(), alone_b.dinitial_states.values());
    }
  }
}

// With gates and phases too, the layout does not change a bit.
TEST_P(WithOptions, EveryLayoutGivesTheSameBits) {
  std::mt19937 random(test_seed());
  for (int i = test_cases(100); i > 0 && !HasFailure(); --i) {
    Chosen c = random_choice(random);
    SCOPED_TRACE(describe(c));
    std::vector<std::vector<double>> outs, dxs;
    for (Layout layout : {Layout::kChannelFirst, Layout::kChannelLast, Layout::kStrided}) {
      c.base.layout = layout;
      OptionsProblem o(c);
      OptionsForward f(o, layout);
      OptionsBackward b(o, layout);
      ASSERT_OK(causal_conv1d_cpu_forward_with(&f.params, &f.options, 2));
      ASSERT_OK(causal_conv1d_cpu_backward_with(&b.params, &b.options, &b.gradients, 2));
      outs.push_back(f.out.values());
      dxs.push_back(b.dx.values());
    }
    EXPECT_EQ(outs[1], outs[0]);
    EXPECT_EQ(outs[2], outs[0]);
    EXPECT_EQ(dxs[1], dxs[0]);
    EXPECT_EQ(dxs[2], dxs[0]);
  }
}

// final_states_out may be initial_states, also where phases exchange columns.
TEST_P(WithOptions, FinalStatesOutMayBeTheInitialStates) {
  std::mt19937 random(test_seed());
  for (int i = test_cases(100); i > 0 && !HasFailure(); --i) {
    Chosen c = random_choice(random);
    c.base.states = true;
    SCOPED_TRACE(describe(c));
    OptionsProblem o(c);
    OptionsForward apart(o, c.base.layout), in_place(o, c.base.layout);
    in_place.params.final_states_out = in_place.params.initial_states;
    ASSERT_OK(causal_conv1d_cpu_forward_with(&apart.params, &apart.options, 2));
    ASSERT_OK(causal_conv1d_cpu_forward_with(&in_place.params, &in_place.options, 2));
    EXPECT_EQ(in_place.out.memory, apart.out.memory);
    EXPECT_EQ(o.p.initial_states.values(), apart.final_states.values());
  }
}

INSTANTIATE_TEST_SUITE_P(, WithOptions, testing::ValuesIn(runnable()),
                         [](const auto& isa) { return std::string(isa.param->name); });

TEST(Options, BoundsAreChecked) {
  Chosen c;
  c.base.batch = 1;
  c.bounds = {0, 20, 10, 53};
  for (int32_t index_dtype : {CAUSAL_CONV1D_INT32, CAUSAL_CONV1D_INT64}) {
    c.base.index_dtype = index_dtype;
    for (const auto& [value, message] :
         {std::pair{20.0, "got 10 at 2"}, {-1.0, "got -1 at 1"}, {54.0, "got 54 at 1"}}) {
      OptionsProblem o(c);
      o.cu_seqlens.set(value, 1);
      OptionsForward f(o);
      OptionsBackward b(o);
      const std::vector<char> out = f.out.memory, dx = b.dx.memory;
      const std::string rest =
          std::string(": cu_seqlens must not decrease and lie within 0..53 (total_tokens), ") +
          message;
      EXPECT_EQ(causal_conv1d_cpu_forward_with(&f.params, &f.options, 0).message,
                "causal_conv1d_fn" + rest);
      EXPECT_EQ(causal_conv1d_cpu_backward_with(&b.params, &b.options, &b.gradients, 0).message,
                "causal_conv1d_bwd" + rest);
      EXPECT_EQ(f.out.memory, out);
      EXPECT_EQ(b.dx.memory, dx);
    }
  }
}

}  // namespace
}  // namespace test
