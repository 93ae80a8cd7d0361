// The CPU half of the C API against reference.h.
#include <gtest/gtest.h>

#include <functional>
#include <new>
#include <string>

#include "reference.h"

static bool out_of_memory = false;

// Takes the place of the standard library's, for the library that is tested too.
void* operator new[](size_t size, const std::nothrow_t&) noexcept {
  return out_of_memory ? nullptr : ::operator new[](size);
}

namespace test {
namespace {

TEST(Forward, MatchesReference) {
  for (const Options& o : cases()) {
    SCOPED_TRACE(describe(o));
    Problem p = make_problem(o);
    Forward f(p, o.layout);
    ASSERT_OK(causal_conv1d_cpu_forward(&f.params, 2));
    const ForwardValues want = reference_forward(p);
    EXPECT_CLOSE(f.out, want.out, o.dtype);
    EXPECT_EQ(f.final_states.values(), want.final_states.data);
    expect_untouched_around(f.out);
    expect_untouched_around(f.final_states);
  }
}

TEST(Backward, MatchesReference) {
  for (const Options& o : cases()) {
    SCOPED_TRACE(describe(o));
    Problem p = make_problem(o);
    Backward b(p, o.layout);
    ASSERT_OK(causal_conv1d_cpu_backward(&b.params, 2));
    const BackwardValues want = reference_backward(p);
    EXPECT_CLOSE(b.dx, want.dx, o.dtype);
    EXPECT_SUMS_CLOSE(b.dweight, want.dweight, o.dtype);
    if (o.bias) {
      EXPECT_SUMS_CLOSE(b.dbias, want.dbias, o.dtype);
    }
    if (o.states) {
      EXPECT_CLOSE(b.dinitial_states, want.dinitial_states, o.dtype);
    }
    expect_untouched_around(b.dx);
  }
}

TEST(Backward, OutputsButDxMayBeLeftOut) {
  Options o;
  o.states = true;
  Problem p = make_problem(o);
  Backward whole(p), alone(p);
  alone.params.dweight = alone.params.dbias = alone.params.dinitial_states = {};
  ASSERT_OK(causal_conv1d_cpu_backward(&whole.params, 0));
  ASSERT_OK(causal_conv1d_cpu_backward(&alone.params, 0));
  EXPECT_EQ(alone.dx.memory, whole.dx.memory);
}

TEST(Threads, DoNotChangeABit) {
  for (Layout layout : {Layout::kChannelFirst, Layout::kChannelLast}) {
    Options o;
    o.layout = layout;
    o.batch = 3;
    o.dim = 150;
    o.seqlen = 1501;
    o.states = true;
    Problem p = make_problem(o);
    Forward f1(p, layout);
    Backward b1(p, layout);
    ASSERT_OK(causal_conv1d_cpu_forward(&f1.params, 1));
    ASSERT_OK(causal_conv1d_cpu_backward(&b1.params, 1));
    for (int threads : {0, 2, 3, 8, -1}) {
      SCOPED_TRACE(threads);
      Forward f(p, layout);
      Backward b(p, layout);
      ASSERT_OK(causal_conv1d_cpu_forward(&f.params, threads));
      ASSERT_OK(causal_conv1d_cpu_backward(&b.params, threads));
      EXPECT_EQ(f.out.memory, f1.out.memory);
      EXPECT_EQ(b.dx.memory, b1.dx.memory);
      EXPECT_EQ(b.dweight.memory, b1.dweight.memory);
      EXPECT_EQ(b.dbias.memory, b1.dbias.memory);
      EXPECT_EQ(b.dinitial_states.memory, b1.dinitial_states.memory);
    }
  }
}

TEST(Forward, EveryLayoutGivesTheSameBits) {
  for (int32_t dtype : {CAUSAL_CONV1D_FLOAT32, CAUSAL_CONV1D_FLOAT16, CAUSAL_CONV1D_BFLOAT16}) {
    Options o;
    o.dtype = dtype;
    o.states = true;
    std::vector<std::vector<double>> outs;
    for (Layout layout : {Layout::kChannelFirst, Layout::kChannelLast, Layout::kStrided}) {
      o.layout = layout;  // values are drawn in the order of the indices, so they are the same
      Problem p = make_problem(o);
      Forward f(p, layout);
      ASSERT_OK(causal_conv1d_cpu_forward(&f.params, 2));
      outs.push_back(f.out.values());
    }
    EXPECT_EQ(outs[1], outs[0]);
    EXPECT_EQ(outs[2], outs[0]);
  }
}

TEST(Forward, FinalStatesOutMayBeTheInitialStates) {
  for (Layout layout : {Layout::kChannelFirst, Layout::kChannelLast, Layout::kStrided}) {
    for (int64_t seqlen : {0, 1, 2, 53, 70000}) {
      for (bool seq_idx : {false, true}) {
        SCOPED_TRACE(testing::Message() << static_cast<int>(layout) << ' ' << seqlen << seq_idx);
        Options o;
        o.layout = layout;
        o.dim = seqlen > 1000 ? 3 : 19;
        o.seqlen = seqlen;
        o.states = true;
        o.seq_idx = seq_idx;
        Problem p = make_problem(o);
        Forward apart(p, layout), in_place(p, layout);
        in_place.params.final_states_out = in_place.params.initial_states;
        ASSERT_OK(causal_conv1d_cpu_forward(&apart.params, 2));
        ASSERT_OK(causal_conv1d_cpu_forward(&in_place.params, 2));
        EXPECT_EQ(in_place.out.memory, apart.out.memory);
        EXPECT_EQ(p.initial_states.values(), apart.final_states.values());
      }
    }
  }
}

TEST(SeqIdx, MayBeInt64) {
  for (Layout layout : {Layout::kChannelFirst, Layout::kChannelLast}) {
    for (int64_t width : {4, 7}) {
      Options o;
      o.layout = layout;
      o.width = width;
      o.states = o.seq_idx = true;
      Problem narrow = make_problem(o);
      o.index_dtype = CAUSAL_CONV1D_INT64;
      Problem wide = make_problem(o);
      Forward f(narrow, layout), g(wide, layout);
      Backward b(narrow, layout), c(wide, layout);
      ASSERT_OK(causal_conv1d_cpu_forward(&f.params, 2));
      ASSERT_OK(causal_conv1d_cpu_forward(&g.params, 2));
      ASSERT_OK(causal_conv1d_cpu_backward(&b.params, 2));
      ASSERT_OK(causal_conv1d_cpu_backward(&c.params, 2));
      EXPECT_EQ(f.out.memory, g.out.memory);
      EXPECT_EQ(f.final_states.memory, g.final_states.memory);
      EXPECT_EQ(b.dx.memory, c.dx.memory);
      EXPECT_EQ(b.dinitial_states.memory, c.dinitial_states.memory);
    }
  }
}

TEST(SeqIdx, OfInt64MustFitInt32) {
  Options o;
  o.seq_idx = true;
  o.index_dtype = CAUSAL_CONV1D_INT64;
  Problem p = make_problem(o);
  p.seq_idx.set(2147483648.0, 1, 7);
  Forward f(p);
  Backward b(p);
  const causal_conv1d_status forward = causal_conv1d_cpu_forward(&f.params, 0);
  const causal_conv1d_status backward = causal_conv1d_cpu_backward(&b.params, 0);
  EXPECT_STREQ(forward.message,
               "causal_conv1d_fn: seq_idx must fit int32, got 2147483648 at (1, 7)");
  EXPECT_STREQ(backward.message,
               "causal_conv1d_bwd: seq_idx must fit int32, got 2147483648 at (1, 7)");
}

TEST(Forward, ExpandedInputs) {  // strides of 0
  Options o;
  Problem p = make_problem(o);
  Problem expanded = make_problem(o);
  expanded.x.view.strides[0] = expanded.x.view.strides[1] = 0;
  p.x.for_each([&](int64_t b, int64_t d, int64_t t) { p.x.set(expanded.x.get(0, 0, t), b, d, t); });
  Forward f(p), g(expanded);
  ASSERT_OK(causal_conv1d_cpu_forward(&f.params, 0));
  ASSERT_OK(causal_conv1d_cpu_forward(&g.params, 0));
  EXPECT_EQ(f.out.memory, g.out.memory);
}

TEST(ZeroSizes, AreNoErrors) {
  for (int i = 0; i < 3; ++i) {
    for (bool extras : {false, true}) {
      SCOPED_TRACE(i);
      Options o;
      o.states = o.seq_idx = extras;
      (i == 0 ? o.batch : i == 1 ? o.dim : o.seqlen) = 0;
      Problem p = make_problem(o);
      Forward f(p);
      Backward b(p);
      f.params.x.data = f.params.out.data = b.params.x.data = nullptr;
      ASSERT_OK(causal_conv1d_cpu_forward(&f.params, 0));
      ASSERT_OK(causal_conv1d_cpu_backward(&b.params, 0));
      EXPECT_EQ(f.final_states.values(), reference_forward(p).final_states.data);
      EXPECT_EQ(b.dweight.values(), reference_backward(p).dweight.data);
      EXPECT_EQ(b.dbias.values(), reference_backward(p).dbias.data);
    }
  }
}

// ------------------------------------------------------------------------------------------ update

// The state as the forward's initial_states, then one to nine tokens a call: out and the states
// equal those of the whole sequence, bit by bit.
TEST(Update, ContinuesTheSequence) {
  for (int32_t dtype : {CAUSAL_CONV1D_FLOAT32, CAUSAL_CONV1D_BFLOAT16}) {
    for (bool ring : {false, true}) {
      for (bool indexed : {false, true}) {
        for (int64_t state_len : {3, 4, 7}) {
          for (int64_t tokens : {1, 2, 9}) {
            SCOPED_TRACE(testing::Message() << dtype << ring << indexed << state_len << tokens);
            Options o;
            o.dtype = dtype;
            o.seqlen = 18;
            o.states = true;
            Problem p = make_problem(o);
            Update u(p, tokens, indexed ? 5 : o.batch, state_len, ring, indexed);
            for (int64_t b = 0; b < o.batch; ++b) {
              for (int64_t d = 0; d < o.dim; ++d) {
                for (int64_t j = 0; j < o.width - 1; ++j) {
                  const int64_t at = u.start(b) + state_len - (o.width - 1) + j;
                  u.state.set(p.initial_states.get(b, d, j), u.row(b), d, at % state_len);
                }
              }
            }
            const std::vector<char> unused(u.state.memory);
            Forward f(p);
            ASSERT_OK(causal_conv1d_cpu_forward(&f.params, 0));
            for (int64_t t = 0; t < o.seqlen; t += tokens) {
              u.x.for_each(
                  [&](int64_t b, int64_t d, int64_t i) { u.x.set(p.x.get(b, d, t + i), b, d, i); });
              ASSERT_OK(causal_conv1d_cpu_update(&u.params, 0));
              u.out.for_each([&](int64_t b, int64_t d, int64_t i) {
                ASSERT_EQ(u.out.get(b, d, i), f.out.get(b, d, t + i)) << b << ' ' << d << ' ' << t;
              });
              for (int64_t b = 0; ring && b < o.batch; ++b) {
                u.cache_seqlens.set(u.cache_seqlens.get(b) + static_cast<double>(tokens), b);
              }
            }
            for (int64_t b = 0; b < o.batch; ++b) {
              for (int64_t d = 0; d < o.dim; ++d) {
                for (int64_t j = 0; j < state_len; ++j) {
                  EXPECT_EQ(u.state.get(u.row(b), d, (u.start(b) + j) % state_len),
                            p.x.get(b, d, o.seqlen - state_len + j));
                }
              }
            }
            if (indexed) {  // rows 0 to 2 are nobody's
              const size_t bytes = static_cast<size_t>(u.state.position(3, 0, 0));
              EXPECT_EQ(std::memcmp(u.state.memory.data(), unused.data(), bytes), 0);
            }
          }
        }
      }
    }
  }
}

TEST(Update, EntriesOfOneRowReadItAsItWas) {
  for (bool ring : {false, true}) {
    for (int64_t tokens : {1, 9}) {
      SCOPED_TRACE(testing::Message() << ring << tokens);
      Options o;
      o.batch = 4;
      Problem p = make_problem(o);
      Update shared(p, tokens, 5, 4, ring, true), copied(p, tokens, 4, 4, ring, false);
      std::mt19937 random(3);
      shared.x.fill_normal(random);
      std::memcpy(copied.x.memory.data(), shared.x.memory.data(), copied.x.memory.size());
      const std::vector<int64_t> rows{2, 1, 2, 2};
      for (int64_t b = 0; b < o.batch; ++b) {
        shared.indices.set(static_cast<double>(rows[b]), b);
        for (int64_t d = 0; d < o.dim; ++d) {
          for (int64_t j = 0; j < 4; ++j)
            copied.state.set(shared.state.get(rows[b], d, j), b, d, j);
        }
      }
      ASSERT_OK(causal_conv1d_cpu_update(&shared.params, 2));
      ASSERT_OK(causal_conv1d_cpu_update(&copied.params, 2));
      EXPECT_EQ(shared.out.memory, copied.out.memory);
      for (int64_t d = 0; d < o.dim; ++d) {
        for (int64_t j = 0; j < 4; ++j) {
          EXPECT_EQ(shared.state.get(2, d, j), copied.state.get(3, d, j));
          EXPECT_EQ(shared.state.get(1, d, j), copied.state.get(1, d, j));
        }
      }
    }
  }
}

TEST(Update, NegativeIndexIsPadding) {
  Options o;
  Problem p = make_problem(o);
  Update u(p, 1, 5, 4, false, true);
  std::mt19937 random(3);
  u.x.fill_normal(random);
  u.indices.set(-1, 0);
  u.indices.set(-7, 1);
  const std::vector<char> before(u.state.memory);
  ASSERT_OK(causal_conv1d_cpu_update(&u.params, 0));
  EXPECT_EQ(u.state.memory, before);
  EXPECT_EQ(u.out.values(), std::vector<double>(u.out.values().size(), 0.0));
}

TEST(Update, TwoDimensionalX) {
  Options o;
  Problem p = make_problem(o);
  Update u(p, 1, o.batch, 4, false, false), v(p, 1, o.batch, 4, false, false);
  std::mt19937 random(3);
  u.x.fill_normal(random);
  std::memcpy(v.x.memory.data(), u.x.memory.data(), u.x.memory.size());
  v.params.x.ndim = v.params.out.ndim = 2;
  ASSERT_OK(causal_conv1d_cpu_update(&u.params, 0));
  ASSERT_OK(causal_conv1d_cpu_update(&v.params, 0));
  EXPECT_EQ(v.out.memory, u.out.memory);
  EXPECT_EQ(v.state.memory, u.state.memory);
}

// ----------------------------------------------------------------------------------- varlen_states

TEST(VarlenStates, MatchesDefinition) {
  const std::vector<int64_t> bounds{0, 3, 3, 10, 11};
  for (int32_t dtype : {CAUSAL_CONV1D_FLOAT32, CAUSAL_CONV1D_FLOAT16, CAUSAL_CONV1D_FLOAT64}) {
    for (int32_t index : {CAUSAL_CONV1D_INT32, CAUSAL_CONV1D_INT64}) {
      for (int64_t state_len : {0, 1, 4}) {
        std::mt19937 random(5);
        Array x(dtype, {11, 9}), cu_seqlens(index, {5});
        Array states(dtype, {4, 9, state_len}, Layout::kStrided);
        x.fill_normal(random);
        for (int64_t i = 0; i < 5; ++i) cu_seqlens.set(static_cast<double>(bounds[i]), i);
        causal_conv1d_varlen_states_params params{};
        params.x = x.tensor();
        params.cu_seqlens = cu_seqlens.tensor();
        params.states = states.tensor();
        ASSERT_OK(causal_conv1d_cpu_varlen_states(&params, 0));
        states.for_each([&](int64_t i, int64_t d, int64_t j) {
          const int64_t t = bounds[i + 1] - state_len + j;
          EXPECT_EQ(states.get(i, d, j), t < bounds[i] ? 0 : x.get(t, d));
        });
        expect_untouched_around(states);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------ errors

// Refused with a message that begins with the operation and its argument, and nothing written.
void expect_refused(const causal_conv1d_status& status, const std::string& start,
                    std::initializer_list<const Array*> outputs) {
  EXPECT_EQ(status.code, CAUSAL_CONV1D_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(status.message).rfind(start + " ", 0), 0U)
      << "'" << status.message << "' does not begin with '" << start << "'";
  for (const Array* a : outputs) {
    EXPECT_EQ(std::count(a->memory.begin(), a->memory.end(), 0x7f),
              static_cast<std::ptrdiff_t>(a->memory.size()))
        << "an output was written";
  }
}

TEST(Errors, ForwardNamesItsArgument) {
  using Params = causal_conv1d_forward_params;
  const std::vector<std::pair<const char*, std::function<void(Params&)>>> wrong{
      {"x", [](Params& p) { p.x.ndim = 0; }},
      {"x", [](Params& p) { p.x.ndim = 2; }},
      {"x", [](Params& p) { p.x.dtype = CAUSAL_CONV1D_INT32; }},
      {"x", [](Params& p) { p.x.dtype = CAUSAL_CONV1D_UNSUPPORTED_DTYPE; }},
      {"x", [](Params& p) { p.x.data = nullptr; }},
      {"x", [](Params& p) { p.x.sizes[0] = -1; }},
      {"weight", [](Params& p) { p.weight.ndim = 0; }},
      {"weight", [](Params& p) { p.weight.sizes[0] += 1; }},
      {"weight", [](Params& p) { p.weight.sizes[1] = 0; }},
      {"weight", [](Params& p) { p.weight.dtype = CAUSAL_CONV1D_FLOAT64; }},
      {"bias", [](Params& p) { p.bias.ndim = 2; }},
      {"bias", [](Params& p) { p.bias.sizes[0] -= 1; }},
      {"seq_idx", [](Params& p) { p.seq_idx.dtype = CAUSAL_CONV1D_INT16; }},
      {"seq_idx", [](Params& p) { p.seq_idx.sizes[1] -= 1; }},
      {"initial_states", [](Params& p) { p.initial_states.sizes[2] = 4; }},
      {"initial_states", [](Params& p) { p.initial_states.dtype = CAUSAL_CONV1D_INT32; }},
      {"out", [](Params& p) { p.out.ndim = 0; }},
      {"out", [](Params& p) { p.out.sizes[2] -= 1; }},
      {"out", [](Params& p) { p.out.dtype = CAUSAL_CONV1D_BFLOAT16; }},
      {"out", [](Params& p) { p.out.strides[1] = 0; }},
      {"out", [](Params& p) { p.out.data = p.x.data; }},
      {"final_states_out", [](Params& p) { p.final_states_out.sizes[1] += 1; }},
  };
  for (const auto& [name, spoil] : wrong) {
    Options o;
    o.states = o.seq_idx = true;
    Problem p = make_problem(o);
    Forward f(p);
    spoil(f.params);
    expect_refused(causal_conv1d_cpu_forward(&f.params, 0),
                   std::string("causal_conv1d_fn: ") + name, {&f.out, &f.final_states});
  }
}

TEST(Errors, BackwardNamesItsArgument) {
  using Params = causal_conv1d_backward_params;
  const std::vector<std::pair<const char*, std::function<void(Params&)>>> wrong{
      {"x", [](Params& p) { p.x.ndim = 0; }},
      {"weight", [](Params& p) { p.weight.sizes[0] += 1; }},
      {"bias", [](Params& p) { p.bias.dtype = CAUSAL_CONV1D_INT32; }},
      {"dout", [](Params& p) { p.dout.ndim = 0; }},
      {"dout", [](Params& p) { p.dout.sizes[2] += 1; }},
      {"dout", [](Params& p) { p.dout.dtype = CAUSAL_CONV1D_FLOAT16; }},
      {"seq_idx", [](Params& p) { p.seq_idx.sizes[0] += 1; }},
      {"initial_states", [](Params& p) { p.initial_states.ndim = 2; }},
      {"dfinal_states", [](Params& p) { p.dfinal_states.sizes[2] += 1; }},
      {"dx", [](Params& p) { p.dx.ndim = 0; }},
      {"dx", [](Params& p) { p.dx.strides[0] = 0; }},
      {"dx", [](Params& p) { p.dx.data = p.dout.data; }},
      {"dweight", [](Params& p) { p.dweight.sizes[1] += 1; }},
      {"dweight", [](Params& p) { p.dweight.dtype = CAUSAL_CONV1D_INT32; }},
      {"dbias", [](Params& p) { p.dbias.sizes[0] += 1; }},
      {"dinitial_states", [](Params& p) { p.dinitial_states.sizes[0] += 1; }},
  };
  for (const auto& [name, spoil] : wrong) {
    Options o;
    o.states = o.seq_idx = true;
    Problem p = make_problem(o);
    Backward b(p);
    spoil(b.params);
    expect_refused(causal_conv1d_cpu_backward(&b.params, 0),
                   std::string("causal_conv1d_bwd: ") + name,
                   {&b.dx, &b.dweight, &b.dbias, &b.dinitial_states});
  }
}

// With ndim == 0 nothing else of a tensor counts: the callers' structs need not be cleared.
TEST(Errors, WhatIsNotGivenIsNotLookedAt) {
  Options o;
  o.bias = false;
  Problem p = make_problem(o);
  Forward f(p);
  Backward b(p);
  auto leave_out = [&](causal_conv1d_tensor& t) {
    t = p.x.tensor();
    for (int64_t& stride : t.strides) stride = 0;
    t.dtype = CAUSAL_CONV1D_UNSUPPORTED_DTYPE;
    t.ndim = 0;
  };
  for (auto* t :
       {&f.params.bias, &f.params.seq_idx, &f.params.initial_states, &f.params.final_states_out,
        &b.params.bias, &b.params.seq_idx, &b.params.initial_states, &b.params.dfinal_states,
        &b.params.dweight, &b.params.dbias, &b.params.dinitial_states}) {
    leave_out(*t);
  }
  ASSERT_OK(causal_conv1d_cpu_forward(&f.params, 1));
  ASSERT_OK(causal_conv1d_cpu_backward(&b.params, 1));
  EXPECT_CLOSE(f.out, reference_forward(p).out, o.dtype);
  EXPECT_CLOSE(b.dx, reference_backward(p).dx, o.dtype);
}

TEST(Errors, UpdateNamesItsArgument) {
  using Params = causal_conv1d_update_params;
  static const int32_t past_the_end[2] = {0, 5};
  const std::vector<std::pair<const char*, std::function<void(Params&)>>> wrong{
      {"x", [](Params& p) { p.x.ndim = 1; }},
      {"conv_state", [](Params& p) { p.conv_state.ndim = 0; }},
      {"conv_state", [](Params& p) { p.conv_state.sizes[1] += 1; }},
      {"conv_state", [](Params& p) { p.conv_state.sizes[2] = 2; }},
      {"conv_state",
       [](Params& p) {
         p.conv_state_indices = {};
         p.conv_state.sizes[0] = 1;
       }},
      {"conv_state", [](Params& p) { p.conv_state_indices = {}; }},
      {"weight", [](Params& p) { p.weight.ndim = 1; }},
      {"bias", [](Params& p) { p.bias.sizes[0] += 1; }},
      {"out", [](Params& p) { p.out.sizes[0] += 1; }},
      {"out", [](Params& p) { p.out.data = p.conv_state.data; }},
      {"conv_state", [](Params& p) { p.conv_state_indices = {}; }},  // 5 rows, a batch of 2
      {"cache_seqlens", [](Params& p) { p.cache_seqlens.dtype = CAUSAL_CONV1D_FLOAT32; }},
      {"cache_seqlens", [](Params& p) { p.cache_seqlens.sizes[0] += 1; }},
      {"conv_state_indices", [](Params& p) { p.conv_state_indices.ndim = 2; }},
      {"conv_state_indices",
       [](Params& p) { p.conv_state_indices.data = const_cast<int32_t*>(past_the_end); }},
  };
  for (const auto& [name, spoil] : wrong) {
    Problem p = make_problem({});
    Update u(p, 1, 5, 4, true, true);
    const std::vector<char> before(u.state.memory);
    spoil(u.params);
    expect_refused(causal_conv1d_cpu_update(&u.params, 0),
                   std::string("causal_conv1d_update: ") + name, {&u.out});
    EXPECT_EQ(u.state.memory, before);
  }
}

TEST(Errors, VarlenStatesNamesItsArgument) {
  using Params = causal_conv1d_varlen_states_params;
  static const int32_t descending[3] = {0, 5, 4}, too_far[3] = {0, 5, 12};
  const std::vector<std::pair<const char*, std::function<void(Params&)>>> wrong{
      {"x", [](Params& p) { p.x.ndim = 1; }},
      {"cu_seqlens", [](Params& p) { p.cu_seqlens.sizes[0] = 0; }},
      {"cu_seqlens", [](Params& p) { p.cu_seqlens.dtype = CAUSAL_CONV1D_FLOAT32; }},
      {"cu_seqlens", [](Params& p) { p.cu_seqlens.data = const_cast<int32_t*>(descending); }},
      {"cu_seqlens", [](Params& p) { p.cu_seqlens.data = const_cast<int32_t*>(too_far); }},
      {"states", [](Params& p) { p.states.sizes[0] += 1; }},
      {"states", [](Params& p) { p.states.dtype = CAUSAL_CONV1D_FLOAT16; }},
  };
  for (const auto& [name, spoil] : wrong) {
    Array x(CAUSAL_CONV1D_FLOAT32, {11, 9}), cu_seqlens(CAUSAL_CONV1D_INT32, {3});
    Array states(CAUSAL_CONV1D_FLOAT32, {2, 9, 4});
    cu_seqlens.set(0, 0);
    cu_seqlens.set(4, 1);
    cu_seqlens.set(11, 2);
    Params params{x.tensor(), cu_seqlens.tensor(), states.tensor()};
    spoil(params);
    expect_refused(causal_conv1d_cpu_varlen_states(&params, 0),
                   std::string("causal_conv1d_varlen_states: ") + name, {&states});
  }
}

TEST(Threads, TellThatThereIsNoMemory) {
  Options o;
  o.width = 40000;  // more scratch memory than there is on the stack
  for (int threads : {1, 2}) {
    Problem p = make_problem(o);
    Forward f(p);
    out_of_memory = true;
    const causal_conv1d_status status = causal_conv1d_cpu_forward(&f.params, threads);
    out_of_memory = false;
    EXPECT_EQ(status.code, CAUSAL_CONV1D_RUNTIME_ERROR);
    EXPECT_STREQ(status.message, "causal_conv1d_fwd: out of memory");
  }
}

TEST(Cpu, NamesItsInstructionSet) {
  const std::string isa = causal_conv1d_cpu_isa();
  EXPECT_TRUE(isa == "avx512" || isa == "avx2" || isa == "neon" || isa == "baseline") << isa;
}

}  // namespace
}  // namespace test
