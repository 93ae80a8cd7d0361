// The CPU kernels of every instruction set that this machine runs, by the C API: what the header
// promises of all, and that an order of units that no test can force through the C API is harmless.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "reference.h"

namespace test {
namespace {

using causal_conv1d::active_kernels;
using causal_conv1d::choose_kernels;
using causal_conv1d::KernelTable;

std::vector<const KernelTable*> runnable() {
  std::vector<const KernelTable*> all;
  for (auto k = causal_conv1d::runnable_kernels(); *k != nullptr; ++k) all.push_back(*k);
  return all;
}

class Isa : public testing::TestWithParam<const KernelTable*> {
 protected:
  void SetUp() override { active_kernels = GetParam(); }
  void TearDown() override { active_kernels = best_; }

 private:
  const KernelTable* const best_ = active_kernels;
};

TEST_P(Isa, ForwardAndBackwardMatchTheReference) {
  for (const Options& o : cases()) {
    SCOPED_TRACE(describe(o));
    Problem p = make_problem(o);
    Forward f(p, o.layout);
    Backward b(p, o.layout);
    ASSERT_OK(causal_conv1d_cpu_forward(&f.params, 2));
    ASSERT_OK(causal_conv1d_cpu_backward(&b.params, 2));
    const ForwardValues want = reference_forward(p);
    const BackwardValues gradients = reference_backward(p);
    EXPECT_CLOSE(f.out, want.out, o.dtype);
    EXPECT_EQ(f.final_states.values(), want.final_states.data);
    EXPECT_CLOSE(b.dx, gradients.dx, o.dtype);
    EXPECT_SUMS_CLOSE(b.dweight, gradients.dweight, o.dtype);
    if (o.states) {
      EXPECT_CLOSE(b.dinitial_states, gradients.dinitial_states, o.dtype);
    }
  }
}

// A value and its distance from the end of exp's range decide; the position in a row does not.
const std::vector<double>& ends() {
  static const std::vector<double> values{
      -60,  -87.25,    -87.5,    -88, -88.5, -88.625, -88.75, -89, -104, -110, -200, -1000,
      -6e4, -INFINITY, INFINITY, NAN, 60,    87.5,    88.75,  89,  1000, 6e4,  0.5};
  return values;
}

void expect_at_the_end(double got, double z, double want, bool is_16_bit) {
  if (std::isnan(want)) {
    EXPECT_TRUE(std::isnan(got)) << got << " at " << z;
  } else if (std::isinf(want)) {
    EXPECT_EQ(got, want) << "at " << z;
  } else if (z <= -110) {
    EXPECT_EQ(got, 0) << "at " << z;
  } else if (z < 0) {  // fp32: 1e-37 to -88.5. After that and for 16 bits: the value or 0.
    const double allowed =
        is_16_bit || z < -88.5 ? std::fabs(want) + 6e-8 * (is_16_bit ? 1 : 0) : 1e-37;
    EXPECT_LE(std::fabs(got - want), allowed + 2e-6 * std::fabs(want)) << "at " << z;
  } else {
    EXPECT_NEAR(got, want, std::fabs(want) * (is_16_bit ? 8e-3 : 1e-6)) << "at " << z;
  }
}

double derivative(double z) {
  const double s = 1 / (1 + std::exp(-z));
  return s * (1 + z * (1 - s));
}

// Weights whose sum is 1 and x constant in time: z is x after width - 1 steps. Width 4 is that of
// the kernels for short widths.
TEST_P(Isa, SiluAtTheEnds) {
  const int64_t count = static_cast<int64_t>(ends().size());
  for (int32_t dtype : {CAUSAL_CONV1D_FLOAT32, CAUSAL_CONV1D_FLOAT16, CAUSAL_CONV1D_BFLOAT16}) {
    for (int64_t width : {1, 4, 6}) {
      for (Layout layout : {Layout::kChannelFirst, Layout::kChannelLast, Layout::kStrided}) {
        SCOPED_TRACE(testing::Message() << dtype << ' ' << width << static_cast<int>(layout));
        Options o;
        o.dtype = dtype;
        o.width = width;
        o.layout = layout;
        o.batch = 1;
        o.dim = 4 * count;
        o.seqlen = 75;
        o.bias = false;
        Problem p = make_problem(o);
        p.x.for_each([&](int64_t b, int64_t d, int64_t t) { p.x.set(ends()[d % count], b, d, t); });
        p.dout.for_each([&](int64_t b, int64_t d, int64_t t) { p.dout.set(1, b, d, t); });
        // For width 4: 1/2, 1/4, 1/8, 1/8. Others: 1, 0, ...
        p.weight.for_each([&](int64_t d, int64_t k, int64_t) {
          const double halves = std::ldexp(1.0, k == 3 ? -3 : -1 - static_cast<int>(k));
          p.weight.set(width == 4 ? halves : k == 0, d, k);
        });
        Forward f(p, layout);
        Backward b(p, layout);
        ASSERT_OK(causal_conv1d_cpu_forward(&f.params, 2));
        ASSERT_OK(causal_conv1d_cpu_backward(&b.params, 2));
        for (int64_t d = 0; d < o.dim; ++d) {
          const double z = p.x.get(0, d, 0);
          // 0 times infinity is NaN among the other taps.
          if (width == 6 && !std::isfinite(z)) continue;
          for (int64_t t = width; t + width < o.seqlen; ++t) {
            const double silu = z / (1 + std::exp(-z));
            expect_at_the_end(f.out.get(0, d, t), z, silu, is_16_bit(dtype));
            expect_at_the_end(b.dx.get(0, d, t), z, derivative(z), is_16_bit(dtype));
          }
        }
      }
    }
  }
}

// Outputs of 16 MB and more are stored past the caches, by whole lines; their rows begin anywhere.
// All at once they have the same bits as in two calls, of less than that.
TEST_P(Isa, LargeOutputsHaveTheBitsOfSmallOnes) {
  for (int32_t dtype : {CAUSAL_CONV1D_FLOAT32, CAUSAL_CONV1D_FLOAT16, CAUSAL_CONV1D_BFLOAT16}) {
    const int64_t size = element_size(dtype), seqlen = 1025, half = (9 << 20) / size / seqlen;
    std::vector<uint16_t> x(static_cast<size_t>(2 * half * seqlen * size / 2));
    std::mt19937 random(1);
    for (uint16_t& word : x) word = static_cast<uint16_t>(0x3c00 | (random() & 0x83ff));  // 1 to 2
    const std::vector<uint16_t> weight(static_cast<size_t>(2 * half * 4 * size / 2), 0x3e3e);
    std::vector<uint16_t> whole(x.size()), parts(x.size());
    const auto forward = [&](std::vector<uint16_t>* out, int64_t first, int64_t dim) {
      const auto tensor = [&](const std::vector<uint16_t>& values, Sizes sizes) {
        Array shape(dtype, sizes);
        shape.view.data = const_cast<uint16_t*>(values.data()) + first * sizes.back() * size / 2;
        return shape.view;
      };
      causal_conv1d_forward_params p = {};
      p.x = tensor(x, {1, dim, seqlen});
      p.out = tensor(*out, {1, dim, seqlen});
      p.weight = tensor(weight, {dim, 4});
      ASSERT_OK(causal_conv1d_cpu_forward(&p, 1));
    };
    forward(&whole, 0, 2 * half);
    forward(&parts, 0, half);
    forward(&parts, half, half);
    EXPECT_TRUE(whole == parts) << "dtype " << dtype;
  }
}

INSTANTIATE_TEST_SUITE_P(, Isa, testing::ValuesIn(runnable()),
                         [](const auto& isa) { return std::string(isa.param->name); });

// Without an activation nothing but fused multiply-adds in one order is left.
TEST(AllIsas, GiveTheSameBits) {
  const KernelTable* const best = active_kernels;
  for (const Options& options : cases()) {
    if (options.silu) continue;
    SCOPED_TRACE(describe(options));
    Problem p = make_problem(options);
    std::vector<char> out, final_states;
    for (const KernelTable* kernels : runnable()) {
      active_kernels = kernels;
      Forward f(p, options.layout);
      ASSERT_OK(causal_conv1d_cpu_forward(&f.params, 2));
      if (out.empty()) {
        out = f.out.memory;
        final_states = f.final_states.memory;
      }
      EXPECT_EQ(f.out.memory, out) << kernels->name;
      EXPECT_EQ(f.final_states.memory, final_states) << kernels->name;
    }
    active_kernels = best;
  }
}

TEST(Choice, IsTheBestOrTheOneOfThatName) {
  EXPECT_EQ(choose_kernels(""), runnable().front());
  for (const KernelTable* kernels : runnable()) EXPECT_EQ(choose_kernels(kernels->name), kernels);
  for (const char* name : {"sse2", "AVX2", "avx", "none", " "}) {
    EXPECT_EQ(choose_kernels(name), nullptr) << name;
  }
#if defined(__x86_64__)
  EXPECT_EQ(choose_kernels("neon"), nullptr);
#endif
}

// A name that this CPU does not know: an error before anything is written.
TEST(Choice, OfNoneIsAnErrorOfEachOperation) {
  const KernelTable* const best = active_kernels;
  Problem p = make_problem(Options());
  Forward f(p);
  Backward b(p, Layout::kChannelFirst);
  const std::vector<char> before = f.out.memory;
  active_kernels = nullptr;
  const causal_conv1d_status forward = causal_conv1d_cpu_forward(&f.params, 1);
  const causal_conv1d_status backward = causal_conv1d_cpu_backward(&b.params, 1);
  const std::string isa = causal_conv1d_cpu_isa();
  active_kernels = best;
  EXPECT_EQ(isa, "none");
  EXPECT_EQ(forward.code, CAUSAL_CONV1D_RUNTIME_ERROR);
  EXPECT_EQ(backward.code, CAUSAL_CONV1D_RUNTIME_ERROR);
  EXPECT_EQ(std::string(forward.message).rfind("causal_conv1d_fwd: CAUSAL_CONV1D_CPU_ISA must", 0),
            0u)
      << forward.message;
  EXPECT_EQ(f.out.memory, before);
}

// final_states_out is initial_states, and the last chunk of a row is done before the first begins.
const KernelTable* real_kernels = nullptr;
std::atomic<int> units_done{0}, done_before_the_first{0};

void first_unit_last(const causal_conv1d::ForwardProblem& p, const causal_conv1d::Tiling& tiling,
                     int64_t unit, char* scratch) {
  if (unit == 0) {
    for (int i = 0; i < 2000 && units_done < tiling.chunks - 1; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    done_before_the_first = units_done.load();
  }
  real_kernels->forward(p, tiling, unit, scratch);
  ++units_done;
}

TEST(Forward, TheLastChunkMayBeDoneFirst) {
  for (bool seq_idx : {false, true}) {
    Options o;
    o.batch = o.dim = 1;
    o.seqlen = 66000;
    o.width = 36;  // so that the work is worth two threads
    o.states = true;
    o.seq_idx = seq_idx;
    Problem p = make_problem(o);
    ForwardValues want = reference_forward(p);
    Forward f(p);
    f.params.final_states_out = f.params.initial_states;
    real_kernels = active_kernels;
    KernelTable late = *real_kernels;
    late.forward = first_unit_last;
    units_done = 0;
    active_kernels = &late;
    const causal_conv1d_status status = causal_conv1d_cpu_forward(&f.params, 2);
    active_kernels = real_kernels;
    ASSERT_OK(status);
    EXPECT_EQ(done_before_the_first, 1);
    EXPECT_EQ(units_done, 2);
    EXPECT_CLOSE(f.out, want.out, o.dtype);
    EXPECT_CLOSE(p.initial_states, want.final_states, o.dtype);
    for (int64_t t = 0; t < 35; ++t) EXPECT_NEAR(f.out.get(0, 0, t), want.out(0, 0, t), 1e-4) << t;
  }
}

}  // namespace
}  // namespace test
