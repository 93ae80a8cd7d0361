// What a program may get wrong, through the C interface; and the search for shared memory against a
// comparison of all addresses.
#include <gtest/gtest.h>
#include <overlap.h>
#include <torch/register.h>

#include <functional>
#include <limits>
#include <set>
#include <string>

#include "reference.h"

namespace test {
namespace {

using causal_conv1d::Overlap;
using Tensor = causal_conv1d_tensor;
using ForwardParams = causal_conv1d_forward_params;
using BackwardParams = causal_conv1d_backward_params;
using UpdateParams = causal_conv1d_update_params;
using VarlenStatesParams = causal_conv1d_varlen_states_params;

constexpr int64_t kHuge = int64_t{1} << 62;
constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();

// The arguments of one call of each operator, all given, with memory of their own.
struct Calls {
  Problem problem = make_problem(options());
  Forward forward{problem};
  Backward backward{problem};
  Update update{problem, 2, 5, 7, true, true};
  Array tokens{CAUSAL_CONV1D_FLOAT32, {11, 9}}, cu_seqlens{CAUSAL_CONV1D_INT32, {3}};
  Array states{CAUSAL_CONV1D_FLOAT32, {2, 9, 4}};
  VarlenStatesParams varlen_states{tokens.tensor(), cu_seqlens.tensor(), states.tensor()};

  static Options options() {
    Options o;
    o.states = o.seq_idx = true;
    return o;
  }
  Calls() {
    const std::vector<double> bounds{0, 4, 11};
    for (int64_t i = 0; i < 3; ++i) cu_seqlens.set(bounds[static_cast<size_t>(i)], i);
  }
};

struct Operator {
  const char* name;
  // By the order of the members of its struct.
  std::vector<const char*> arguments;
  std::function<Tensor*(Calls&)> first;
  std::function<causal_conv1d_status(const Calls&)> call, check;
};

const std::vector<Operator>& operators() {
  static const std::vector<Operator> all{
      {"causal_conv1d_fn",
       {"x", "weight", "bias", "seq_idx", "initial_states", "out", "final_states_out"},
       [](Calls& c) { return &c.forward.params.x; },
       [](const Calls& c) { return causal_conv1d_cpu_forward(&c.forward.params, 1); },
       [](const Calls& c) { return causal_conv1d_check_forward(&c.forward.params); }},
      {"causal_conv1d_bwd",
       {"x", "weight", "bias", "dout", "seq_idx", "initial_states", "dfinal_states", "dx",
        "dweight", "dbias", "dinitial_states"},
       [](Calls& c) { return &c.backward.params.x; },
       [](const Calls& c) { return causal_conv1d_cpu_backward(&c.backward.params, 1); },
       [](const Calls& c) { return causal_conv1d_check_backward(&c.backward.params); }},
      {"causal_conv1d_update",
       {"x", "conv_state", "weight", "bias", "out", "cache_seqlens", "conv_state_indices"},
       [](Calls& c) { return &c.update.params.x; },
       [](const Calls& c) { return causal_conv1d_cpu_update(&c.update.params, 1); },
       [](const Calls& c) { return causal_conv1d_check_update(&c.update.params); }},
      {"causal_conv1d_varlen_states",
       {"x", "cu_seqlens", "states"},
       [](Calls& c) { return &c.varlen_states.x; },
       [](const Calls& c) { return causal_conv1d_cpu_varlen_states(&c.varlen_states, 1); },
       [](const Calls& c) { return causal_conv1d_check_varlen_states(&c.varlen_states); }},
  };
  return all;
}

// The message begins with the operator and one argument, and has the other words.
void expect_refused(const causal_conv1d_status& status, const std::string& start,
                    const std::string& words = "") {
  const std::string message = status.message;
  EXPECT_EQ(status.code, CAUSAL_CONV1D_INVALID_ARGUMENT) << start << ' ' << words;
  EXPECT_EQ(message.rfind(start + ' ', 0), 0U) << message << "\ndoes not begin with " << start;
  EXPECT_NE(message.find(words), std::string::npos) << message << "\nis without " << words;
}

TEST(Check, TheArgumentsUsedHereAreValid) {
  for (const Operator& o : operators()) {
    Calls calls;
    ASSERT_OK(o.check(calls));
    ASSERT_OK(o.call(calls));
  }
}

TEST(Check, NullIsRefused) {
  const std::string params = ": params";
  expect_refused(causal_conv1d_cpu_forward(nullptr, 0), "causal_conv1d_fn" + params);
  expect_refused(causal_conv1d_cpu_backward(nullptr, 0), "causal_conv1d_bwd" + params);
  expect_refused(causal_conv1d_cpu_update(nullptr, 0), "causal_conv1d_update" + params);
  expect_refused(causal_conv1d_cpu_varlen_states(nullptr, 0),
                 "causal_conv1d_varlen_states" + params);
  expect_refused(causal_conv1d_check_forward(nullptr), "causal_conv1d_fn" + params);
  expect_refused(causal_conv1d_check_backward(nullptr), "causal_conv1d_bwd" + params);
  expect_refused(causal_conv1d_check_update(nullptr), "causal_conv1d_update" + params);
  expect_refused(causal_conv1d_check_varlen_states(nullptr),
                 "causal_conv1d_varlen_states" + params);
}

// Each argument of each operator, spoilt in every way that is wrong whatever it is.
TEST(Check, AnyArgumentMayBeSpoilt) {
  const std::vector<std::pair<const char*, std::function<void(Tensor&)>>> ways{
      {"ndim", [](Tensor& t) { t.ndim = 4; }},
      {"ndim", [](Tensor& t) { t.ndim = 1000000; }},
      {"ndim", [](Tensor& t) { t.ndim = -1; }},
      {"dtype", [](Tensor& t) { t.dtype = -1; }},
      {"dtype", [](Tensor& t) { t.dtype = CAUSAL_CONV1D_UNSUPPORTED_DTYPE; }},
      {"dtype", [](Tensor& t) { t.dtype = CAUSAL_CONV1D_FLOAT8_E4M3FN; }},
      {"dtype", [](Tensor& t) { t.dtype = std::numeric_limits<int32_t>::max(); }},
      {"no data", [](Tensor& t) { t.data = nullptr; }},
      {"aligned", [](Tensor& t) { t.data = static_cast<char*>(t.data) + 1; }},
      {"aligned", [](Tensor& t) { t.data = static_cast<char*>(t.data) + 2; }},
      {"sizes >= 0", [](Tensor& t) { t.sizes[t.ndim - 1] = -1; }},
      {"within memory", [](Tensor& t) { t.strides[0] = kHuge; }},
      {"within memory", [](Tensor& t) { t.strides[0] = kLeast; }},
      {"within memory", [](Tensor& t) { t.strides[t.ndim - 1] = -kHuge; }},
      {"within memory", [](Tensor& t) { t.strides[0] = int64_t{1} << 58; }},
      {"within memory", [](Tensor& t) { t.data = reinterpret_cast<void*>(~uintptr_t{7}); }},
  };
  for (const Operator& o : operators()) {
    for (size_t i = 0; i < o.arguments.size(); ++i) {
      for (const auto& [what, spoil] : ways) {
        Calls calls;
        spoil(o.first(calls)[i]);
        const std::string start = std::string(o.name) + ": " + o.arguments[i];
        SCOPED_TRACE(start + ", " + what);
        for (const causal_conv1d_status& status : {o.call(calls), o.check(calls)}) {
          // Another argument is named where this one says what the others have to be.
          EXPECT_EQ(status.code, CAUSAL_CONV1D_INVALID_ARGUMENT);
          const std::string message = status.message;
          EXPECT_EQ(message.rfind(std::string(o.name) + ": ", 0), 0U) << message;
          EXPECT_NE(message.find(o.arguments[i]), std::string::npos) << message;
        }
      }
    }
  }
}

TEST(Check, SizesThatOverflow) {
  const std::vector<std::pair<std::string, std::function<void(ForwardParams&)>>> wrong{
      {"weight must have width <= 65536, got (19, 4611686018427387904)",
       [](ForwardParams& p) {
         p.weight.sizes[1] = kHuge;
         p.weight.strides[1] = 0;
       }},
      {"x must have at most 2^52 elements, got (4611686018427387904, 19, 1)",
       [](ForwardParams& p) {
         p = {p.x, p.weight, {}, {}, {}, p.out, {}, 0};
         for (Tensor* t : {&p.x, &p.out}) {
           t->sizes[0] = kHuge;
           t->sizes[2] = 1;
           t->strides[0] = 0;
         }
       }},
      {"x must have at most 2^58 elements times width, got (2, 19, 17592186044416) with width "
       "16384",
       [](ForwardParams& p) {
         p = {p.x, p.weight, {}, {}, {}, p.out, {}, 0};
         p.x.sizes[2] = p.out.sizes[2] = int64_t{1} << 44;
         p.x.strides[2] = p.weight.strides[1] = 0;
         p.weight.sizes[1] = 1 << 14;
         p.out.strides[0] = 19 * (p.out.strides[1] = p.out.sizes[2]);
         p.out.data = static_cast<char*>(p.out.data) + (1 << 20);
         p.weight.data = p.x.data;
       }},
  };
  for (const auto& [message, spoil] : wrong) {
    Calls calls;
    spoil(calls.forward.params);
    const causal_conv1d_status status = causal_conv1d_cpu_forward(&calls.forward.params, 1);
    EXPECT_EQ(status.code, CAUSAL_CONV1D_INVALID_ARGUMENT);
    EXPECT_EQ(std::string(status.message), "causal_conv1d_fn: " + message);
  }
  Calls calls;
  calls.backward.params.weight.sizes[1] = kHuge / 2;
  calls.backward.params.weight.strides[1] = 0;
  expect_refused(causal_conv1d_cpu_backward(&calls.backward.params, 1), "causal_conv1d_bwd: weight",
                 "width");
  calls.varlen_states.states.sizes[2] = kHuge;
  expect_refused(causal_conv1d_cpu_varlen_states(&calls.varlen_states, 1),
                 "causal_conv1d_varlen_states: states", "2^52 elements");
}

TEST(Check, TypesAreNamed) {
  const std::vector<std::pair<int32_t, const char*>> names{
      {CAUSAL_CONV1D_INT32, "int32"},
      {CAUSAL_CONV1D_UNSUPPORTED_DTYPE, "an unsupported dtype"},
      {CAUSAL_CONV1D_BOOL, "bool"},
      {CAUSAL_CONV1D_INT16, "int16"},
      {CAUSAL_CONV1D_COMPLEX64, "complex64"},
      {CAUSAL_CONV1D_FLOAT8_E4M3FN, "float8_e4m3fn"},
      {CAUSAL_CONV1D_FLOAT8_E8M0FNU, "float8_e8m0fnu"},
      {CAUSAL_CONV1D_FLOAT8_E8M0FNU + 1, "an unsupported dtype"}};
  for (const auto& [dtype, name] : names) {
    Calls calls;
    calls.forward.params.x.dtype = dtype;
    EXPECT_EQ(std::string(causal_conv1d_check_forward(&calls.forward.params).message),
              "causal_conv1d_fn: x must be float32, float16 or bfloat16 (or float64 with x), got " +
                  std::string(name));
  }
}

TEST(Check, IndicesMayBeInt64) {
  for (const char* name : {"seq_idx", "cache_seqlens", "conv_state_indices"}) {
    for (const auto& [dtype, good] :
         {std::pair{CAUSAL_CONV1D_INT32, true}, std::pair{CAUSAL_CONV1D_INT64, true},
          std::pair{CAUSAL_CONV1D_INT16, false}, std::pair{CAUSAL_CONV1D_FLOAT32, false}}) {
      SCOPED_TRACE(name);
      Calls calls;
      Array index(dtype, {2, 53});
      Tensor t = index.tensor();
      const bool forward = name == std::string("seq_idx");
      t.ndim = forward ? 2 : 1;
      (forward                                ? calls.forward.params.seq_idx
       : name == std::string("cache_seqlens") ? calls.update.params.cache_seqlens
                                              : calls.update.params.conv_state_indices) = t;
      const causal_conv1d_status status = forward
                                              ? causal_conv1d_check_forward(&calls.forward.params)
                                              : causal_conv1d_check_update(&calls.update.params);
      EXPECT_EQ(status.code, good ? CAUSAL_CONV1D_OK : CAUSAL_CONV1D_INVALID_ARGUMENT);
      if (!good) {
        EXPECT_NE(std::string(status.message).find("must be int32 or int64, got "),
                  std::string::npos);
      }
    }
  }
}

TEST(Check, RowsOfTheState) {
  Calls calls;
  calls.update.params.conv_state_indices = {};
  EXPECT_STREQ(causal_conv1d_check_update(&calls.update.params).message,
               "causal_conv1d_update: conv_state must have batch = 2 rows unless "
               "conv_state_indices is given, got (5, 19, 7)");
}

// ---------------------------------------------------------------------------------- no elements

TEST(NoElements, EndAtOnce) {
  float value = 0;
  // No memory at all, or one element for all that is read; every size that may be is huge.
  const auto tensor = [&](Sizes sizes) {
    Tensor t{};
    t.data = &value;
    t.ndim = static_cast<int32_t>(sizes.size());
    t.dtype = CAUSAL_CONV1D_FLOAT32;
    std::copy(sizes.begin(), sizes.end(), t.sizes);
    return t;
  };
  for (const Sizes& sizes : {Sizes{kHuge, 1, 0}, Sizes{kHuge, 0, kHuge}, Sizes{0, 1, kHuge},
                             Sizes{INT64_MAX, 0, INT64_MAX}, Sizes{0, 1, INT64_MAX}}) {
    const Tensor x = tensor(sizes), weight = tensor({sizes[1], 4});
    ForwardParams f{};
    f.x = f.out = x;
    f.weight = weight;
    ASSERT_OK(causal_conv1d_cpu_forward(&f, 0));

    float sums[5] = {1, 1, 1, 1, 1};
    BackwardParams b{};
    b.x = b.dout = b.dx = x;
    b.weight = b.dweight = weight;
    b.dbias = tensor({sizes[1]});
    b.dweight.data = sums;
    b.dweight.strides[1] = 1;
    b.dbias.data = sums + 4;
    ASSERT_OK(causal_conv1d_cpu_backward(&b, 0));
    for (float sum : sums) EXPECT_EQ(sum, sizes[1] == 0 ? 1 : 0);

    UpdateParams u{};
    u.x = u.out = x;
    u.weight = weight;
    u.conv_state = tensor({sizes[0], sizes[1], 3});
    u.conv_state_indices = {};
    if (!(sizes[0] == kHuge && sizes[1] == 1)) ASSERT_OK(causal_conv1d_cpu_update(&u, 0));

    VarlenStatesParams v{};
    v.x = tensor({kHuge, 0});
    v.states = tensor({(int64_t{1} << 52) - 1, 0, kHuge});
    v.cu_seqlens = tensor({int64_t{1} << 52});
    v.cu_seqlens.dtype = CAUSAL_CONV1D_INT32;
    ASSERT_OK(causal_conv1d_cpu_varlen_states(&v, 0));
  }
}

TEST(NoElements, StatesAreWritten) {
  Options o;
  o.seqlen = 0;
  o.states = true;
  for (bool seq_idx : {false, true}) {
    o.seq_idx = seq_idx;
    Problem p = make_problem(o);
    Forward f(p);
    Backward b(p);
    ASSERT_OK(causal_conv1d_cpu_forward(&f.params, 0));
    ASSERT_OK(causal_conv1d_cpu_backward(&b.params, 0));
    EXPECT_EQ(f.final_states.values(), p.initial_states.values());
    EXPECT_EQ(b.dinitial_states.values(), p.dfinal_states.values());
    EXPECT_EQ(b.dweight.values(), std::vector<double>(b.dweight.values().size(), 0.0));
    EXPECT_EQ(b.dbias.values(), std::vector<double>(b.dbias.values().size(), 0.0));
  }
}

// -------------------------------------------------------------------------------------- overlap

// Whatever is written, moved onto each other argument by some elements.
TEST(Overlapping, OutputsAreRefused) {
  const auto written = [](const std::string& name) {
    return name[0] == 'd' ? name != "dout" && name != "dfinal_states"
                          : name == "out" || name == "final_states_out" || name == "states" ||
                                name == "conv_state";
  };
  for (const Operator& o : operators()) {
    for (size_t i = 0; i < o.arguments.size(); ++i) {
      if (!written(o.arguments[i])) continue;
      for (size_t j = 0; j < o.arguments.size(); ++j) {
        if (i == j) continue;
        for (int offset : {0, 4}) {
          Calls calls;
          Tensor* tensors = o.first(calls);
          tensors[i].data = static_cast<char*>(tensors[j].data) + offset;
          const bool in_place = offset == 0 && o.arguments[i] == std::string("final_states_out") &&
                                o.arguments[j] == std::string("initial_states");
          const causal_conv1d_status status = o.check(calls);
          const std::string message = status.message;
          SCOPED_TRACE(std::string(o.arguments[i]) + " on " + o.arguments[j] + ": " + message);
          EXPECT_EQ(status.code, in_place ? CAUSAL_CONV1D_OK : CAUSAL_CONV1D_INVALID_ARGUMENT);
          if (in_place) continue;
          EXPECT_NE(message.find(" must not overlap "), std::string::npos);
          EXPECT_NE(message.find(o.arguments[i]), std::string::npos);
          EXPECT_EQ(message.rfind(std::string(o.name) + ": ", 0), 0U);
        }
      }
    }
  }
}

TEST(Overlapping, StatesInPlaceHaveToBeTheSame) {
  Calls calls;
  ForwardParams& p = calls.forward.params;
  p.final_states_out = p.initial_states;
  ASSERT_OK(causal_conv1d_check_forward(&p));
  std::swap(p.final_states_out.strides[0], p.final_states_out.strides[1]);
  expect_refused(causal_conv1d_check_forward(&p), "causal_conv1d_fn: final_states_out");
  p.final_states_out = p.initial_states;
  p.final_states_out.dtype = CAUSAL_CONV1D_FLOAT16;
  expect_refused(causal_conv1d_check_forward(&p), "causal_conv1d_fn: final_states_out",
                 "must not overlap initial_states in memory");
}

TEST(Overlapping, InputsMayShareMemory) {
  Calls calls;
  BackwardParams& p = calls.backward.params;
  p.dout = p.x;
  p.dfinal_states = p.initial_states;
  p.bias.data = p.weight.data;
  ASSERT_OK(causal_conv1d_check_backward(&p));
}

TEST(Overlapping, WithinItself) {
  Calls calls;
  ForwardParams& p = calls.forward.params;
  p.out.strides[1] -= 1;
  expect_refused(causal_conv1d_check_forward(&p), "causal_conv1d_fn: out", "overlap itself");
  p.out.strides[1] = 0;
  expect_refused(causal_conv1d_check_forward(&p), "causal_conv1d_fn: out", "stride 0");
  // Not one in the other, but distinct: multiples of 2 and of 53 * 2 + 1, up to 52 and 18.
  std::vector<float> memory(1 << 16);
  p.out.data = memory.data();
  p.out.strides[0] = 1;
  p.out.strides[2] = 2;
  p.out.strides[1] = 107;
  ASSERT_OK(causal_conv1d_check_forward(&p));
}

TEST(Overlapping, SlicesOfOneBufferThatShareNothing) {
  constexpr int64_t B = 3, D = 5, L = 8;
  std::vector<float> buffer(4 * B * D * L), weight(D * 4);
  const auto view = [&](int64_t from, int64_t s0, int64_t s1, int64_t s2) {
    return Tensor{buffer.data() + from, {B, D, L}, {s0, s1, s2}, 3, CAUSAL_CONV1D_FLOAT32};
  };
  const std::vector<std::pair<Tensor, Tensor>> pairs{
      {view(0, 2 * D * L, L, 1), view(D * L, 2 * D * L, L, 1)},      // buf[:, :D], buf[:, D:]
      {view(0, 2 * D * L, 1, 2 * D), view(D, 2 * D * L, 1, 2 * D)},  // of a channel-last one
      {view(0, 2 * D * L, 2 * L, 2), view(1, 2 * D * L, 2 * L, 2)},  // even and odd steps
      {view(0, 2 * D * L, 2 * L, 1), view(L, 2 * D * L, 2 * L, 1)},  // halves of rows
      {view(0, 2 * D * L, 2 * L, 2), view(2 * L - 1, 2 * D * L, 2 * L, -2)},  // one reversed
  };
  for (const auto& [x, out] : pairs) {
    ForwardParams p{};
    p.x = x;
    p.weight = Tensor{weight.data(), {D, 4}, {4, 1}, 2, CAUSAL_CONV1D_FLOAT32};
    p.out = out;
    ASSERT_OK(causal_conv1d_cpu_forward(&p, 1));
    p.out.data = static_cast<float*>(p.out.data) + 1;
    expect_refused(causal_conv1d_check_forward(&p), "causal_conv1d_fn: out",
                   "must not overlap x in memory");
  }
}

// Strides of no order, as no program has them.
TEST(Overlapping, WhatIsNotDecidedInTimeIsRefused) {
  std::mt19937_64 random(2);
  const auto any = [&] {
    Tensor t{reinterpret_cast<void*>(uintptr_t{1} << 45), {}, {}, 3, CAUSAL_CONV1D_FLOAT32};
    for (int k = 0; k < 3; ++k) {
      t.sizes[k] = 1000;
      t.strides[k] = 3 * static_cast<int64_t>(1 + random() % (1 << 26));
    }
    return t;
  };
  int undecided = 0;
  for (int i = 0; i < 100; ++i) {
    ForwardParams p{};
    std::vector<float> weight(4000);
    p.x = any();
    p.out = any();
    p.weight = Tensor{weight.data(), {1000, 4}, {4, 1}, 2, CAUSAL_CONV1D_FLOAT32};
    p.out.data = static_cast<float*>(p.out.data) + 3 * (random() % (1 << 26));
    const std::string message = causal_conv1d_check_forward(&p).message;
    undecided += message.find("takes too long") != std::string::npos;
    p.x.data = static_cast<float*>(p.x.data) + 1;  // no multiple of 3 apart: told at once
    EXPECT_EQ(causal_conv1d::find_overlap(p.x, p.out), Overlap::kNone);
  }
  EXPECT_GT(undecided, 0);
}

std::vector<uintptr_t> addresses(const Tensor& t) {
  std::vector<uintptr_t> all{reinterpret_cast<uintptr_t>(t.data)};
  for (int i = 0; i < t.ndim; ++i) {
    std::vector<uintptr_t> more;
    for (uintptr_t at : all) {
      for (int64_t k = 0; k < t.sizes[i]; ++k) {
        more.push_back(at + static_cast<uintptr_t>(k * t.strides[i] * element_size(t.dtype)));
      }
    }
    all = more;
  }
  return all;
}

TEST(Overlapping, AgreesWithAllAddresses) {
  std::mt19937 random(1);
  const auto any = [&](int64_t from, int64_t to) {
    return from + static_cast<int64_t>(random() % static_cast<uint32_t>(to - from + 1));
  };
  const int32_t dtypes[] = {CAUSAL_CONV1D_FLOAT32, CAUSAL_CONV1D_FLOAT16, CAUSAL_CONV1D_BFLOAT16,
                            CAUSAL_CONV1D_FLOAT64, CAUSAL_CONV1D_INT32,   CAUSAL_CONV1D_INT64};
  int found[2] = {0, 0}, within[2] = {0, 0};
  for (int i = 0; i < 40000; ++i) {
    Tensor t[2]{};
    const int64_t widest = i % 2 == 0 ? 4 : 40;
    for (Tensor& u : t) {
      u.dtype = dtypes[any(0, 5)];
      u.ndim = static_cast<int32_t>(any(1, 3));
      for (int k = 0; k < u.ndim; ++k) {
        u.sizes[k] = any(1, 4);
        u.strides[k] = any(-widest, widest);
        if (u.sizes[k] == 1 && any(0, 1) == 1) u.strides[k] = kLeast;  // of no meaning
      }
      u.data =
          reinterpret_cast<void*>(100000 + any(-2 * widest, 2 * widest) * element_size(u.dtype));
    }
    const std::vector<uintptr_t> a = addresses(t[0]), b = addresses(t[1]);
    bool shared = false;
    for (uintptr_t p : a) {
      for (uintptr_t q : b) {
        shared = shared || (p < q + static_cast<uintptr_t>(element_size(t[1].dtype)) &&
                            q < p + static_cast<uintptr_t>(element_size(t[0].dtype)));
      }
    }
    const bool repeated = std::set<uintptr_t>(a.begin(), a.end()).size() != a.size();
    ++found[shared];
    ++within[repeated];
    ASSERT_EQ(causal_conv1d::find_overlap(t[0], t[1]), shared ? Overlap::kFound : Overlap::kNone);
    ASSERT_EQ(causal_conv1d::find_overlap_within(t[0]),
              repeated ? Overlap::kFound : Overlap::kNone);
  }
  EXPECT_GT(std::min({found[0], found[1], within[0], within[1]}), 4000);
}

}  // namespace
}  // namespace test
