// What a program may get wrong in calls of the selective scan.
#include <gtest/gtest.h>
#include <scan_check.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <list>
#include <string>
#include <vector>

namespace test {
namespace {

using causal_conv1d::check;
using causal_conv1d::has_work;
using causal_conv1d::ScanBackwardParams;
using causal_conv1d::ScanForwardParams;
using causal_conv1d::StateUpdateParams;
using Tensor = causal_conv1d_tensor4;
using Sizes = std::vector<int64_t>;

constexpr int64_t kHuge = int64_t{1} << 62;
constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();
constexpr int64_t kBatch = 2, kDim = 6, kLength = 7, kStates = 5, kGroups = 3, kHeads = 3;

// The arguments of one call of each operator, all given, with memory of their own.
struct Calls {
  std::list<std::vector<double>> memory;
  ScanForwardParams forward{};
  ScanBackwardParams backward{};
  StateUpdateParams update{};

  Tensor tensor(const Sizes& sizes, int32_t dtype = CAUSAL_CONV1D_FLOAT32) {
    Tensor t{};
    t.ndim = static_cast<int32_t>(sizes.size());
    t.dtype = dtype;
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
      t.sizes[i] = sizes[static_cast<size_t>(i)];
      t.strides[i] = stride;
      stride *= t.sizes[i];
    }
    memory.emplace_back(static_cast<size_t>(stride) + 8);
    t.data = memory.back().data();
    return t;
  }

  explicit Calls(int64_t batch = kBatch) {
    const Sizes row{batch, kDim, kLength}, projection{batch, kGroups, kStates, kLength};
    const Sizes states{batch, kDim, kStates}, token{batch, kHeads, kDim};
    causal_conv1d_scan_inputs& in = forward.inputs;
    for (Tensor* t : {&in.u, &in.delta, &in.z}) *t = tensor(row);
    for (Tensor* t : {&in.D, &in.delta_bias}) *t = tensor({kDim});
    in.A = tensor({kDim, kStates});
    in.B = tensor(projection);
    in.C = tensor(projection);
    in.initial_states = tensor(states);
    forward.out = tensor(row);
    forward.ungated = tensor(row);
    forward.last_states = tensor(states);

    ScanBackwardParams& b = backward;
    b.inputs = in;
    for (Tensor* t : {&b.dout, &b.du, &b.ddelta, &b.dz, &b.out}) *t = tensor(row);
    for (Tensor* t : {&b.dD, &b.ddelta_bias}) *t = tensor({kDim});
    b.dA = tensor({kDim, kStates});
    b.dB = tensor(projection);
    b.dC = tensor(projection);
    b.dlast_states = tensor(states);
    b.dinitial_states = tensor(states);

    StateUpdateParams& u = update;
    u.state = tensor({4, kHeads, kDim, kStates});
    for (Tensor* t : {&u.x, &u.dt, &u.z, &u.out}) *t = tensor(token);
    u.A = tensor({kHeads, kDim, kStates});
    u.B = tensor({batch, kHeads, kStates});
    u.C = tensor({batch, kHeads, kStates});
    u.D = tensor({kHeads, kDim});
    u.dt_bias = tensor({kHeads, kDim});
    u.state_indices = tensor({batch}, CAUSAL_CONV1D_INT32);
  }
};

struct Argument {
  std::string name;
  std::function<Tensor&(Calls&)> tensor;
  bool written, optional;
};

struct Operator {
  std::string name;
  std::vector<Argument> arguments;
  std::function<causal_conv1d_status(const Calls&)> check;
};

#define ARGUMENT(params, name, written, optional) \
  {#name, [](Calls& c) -> Tensor& { return c.params.name; }, written, optional}

std::vector<Argument> with_inputs(bool backward, std::vector<Argument> others) {
#define INPUT(name, optional)                                                        \
  others.push_back({#name,                                                           \
                    [backward](Calls& c) -> Tensor& {                                \
                      return (backward ? c.backward.inputs : c.forward.inputs).name; \
                    },                                                               \
                    false, optional})
  INPUT(u, false);
  INPUT(delta, false);
  INPUT(A, false);
  INPUT(B, false);
  INPUT(C, false);
  INPUT(D, true);
  INPUT(z, true);
  INPUT(delta_bias, true);
  INPUT(initial_states, true);
  return others;
}

const std::vector<Operator>& operators() {
  static const std::vector<Operator> all{
      {"selective_scan_fwd",
       with_inputs(false,
                   {ARGUMENT(forward, out, true, false), ARGUMENT(forward, ungated, true, true),
                    ARGUMENT(forward, last_states, true, true)}),
       [](const Calls& c) { return check(&c.forward); }},
      {"selective_scan_bwd",
       with_inputs(
           true,
           {ARGUMENT(backward, dout, false, false), ARGUMENT(backward, dlast_states, false, true),
            ARGUMENT(backward, du, true, true), ARGUMENT(backward, ddelta, true, true),
            ARGUMENT(backward, dA, true, true), ARGUMENT(backward, dB, true, true),
            ARGUMENT(backward, dC, true, true), ARGUMENT(backward, dD, true, true),
            ARGUMENT(backward, dz, true, true), ARGUMENT(backward, ddelta_bias, true, true),
            ARGUMENT(backward, dinitial_states, true, true), ARGUMENT(backward, out, true, true)}),
       [](const Calls& c) { return check(&c.backward); }},
      {"selective_state_update",
       {ARGUMENT(update, state, true, false), ARGUMENT(update, x, false, false),
        ARGUMENT(update, dt, false, false), ARGUMENT(update, A, false, false),
        ARGUMENT(update, B, false, false), ARGUMENT(update, C, false, false),
        ARGUMENT(update, D, false, true), ARGUMENT(update, z, false, true),
        ARGUMENT(update, dt_bias, false, true), ARGUMENT(update, state_indices, false, true),
        ARGUMENT(update, out, true, false)},
       [](const Calls& c) { return check(&c.update); }},
  };
  return all;
}

#define EXPECT_VALID(status)                                      \
  do {                                                            \
    const causal_conv1d_status status_ = (status);                \
    EXPECT_EQ(status_.code, CAUSAL_CONV1D_OK) << status_.message; \
    EXPECT_STREQ(status_.message, "");                            \
  } while (0)

// The message begins with the operator and one argument, and has the other words.
void expect_refused(const causal_conv1d_status& status, const std::string& start,
                    const std::string& words = "") {
  const std::string message = status.message;
  EXPECT_EQ(status.code, CAUSAL_CONV1D_INVALID_ARGUMENT) << start << ' ' << words;
  EXPECT_EQ(message.rfind(start + ' ', 0), 0U) << message << "\ndoes not begin with " << start;
  EXPECT_NE(message.find(words), std::string::npos) << message << "\nis without " << words;
}

TEST(ScanCheck, TheArgumentsUsedHereAreValid) {
  Calls calls;
  for (const Operator& o : operators()) EXPECT_VALID(o.check(calls));
}

TEST(ScanCheck, NullIsRefused) {
  expect_refused(check(static_cast<ScanForwardParams*>(nullptr)), "selective_scan_fwd: params");
  expect_refused(check(static_cast<ScanBackwardParams*>(nullptr)), "selective_scan_bwd: params");
  expect_refused(check(static_cast<StateUpdateParams*>(nullptr)), "selective_state_update: params");
}

// Each argument of each operator, spoilt in every way that is wrong whatever it is.
TEST(ScanCheck, AnyArgumentMayBeSpoilt) {
  const std::vector<std::pair<const char*, std::function<void(Tensor&)>>> ways{
      {"ndim", [](Tensor& t) { t.ndim = t.ndim == 4 ? 3 : 4; }},
      {"ndim", [](Tensor& t) { t.ndim = 5; }},
      {"ndim", [](Tensor& t) { t.ndim = 1000000; }},
      {"ndim", [](Tensor& t) { t.ndim = -1; }},
      {"dtype", [](Tensor& t) { t.dtype = -1; }},
      {"dtype", [](Tensor& t) { t.dtype = CAUSAL_CONV1D_UNSUPPORTED_DTYPE; }},
      {"dtype", [](Tensor& t) { t.dtype = CAUSAL_CONV1D_FLOAT64; }},
      {"dtype", [](Tensor& t) { t.dtype = std::numeric_limits<int32_t>::max(); }},
      {"no data", [](Tensor& t) { t.data = nullptr; }},
      {"aligned", [](Tensor& t) { t.data = static_cast<char*>(t.data) + 1; }},
      {"size", [](Tensor& t) { t.sizes[t.ndim - 1] = -1; }},
      {"size", [](Tensor& t) { t.sizes[0] = kLeast; }},
      {"size", [](Tensor& t) { t.sizes[t.ndim - 1] += 1; }},
      {"within memory", [](Tensor& t) { t.strides[0] = kHuge; }},
      {"within memory", [](Tensor& t) { t.strides[0] = kLeast; }},
      {"within memory", [](Tensor& t) { t.strides[t.ndim - 1] = -kHuge; }},
      {"within memory", [](Tensor& t) { t.data = reinterpret_cast<void*>(~uintptr_t{7}); }},
  };
  for (const Operator& o : operators()) {
    for (const Argument& a : o.arguments) {
      for (const auto& [what, spoil] : ways) {
        Calls calls;
        spoil(a.tensor(calls));
        const causal_conv1d_status status = o.check(calls);
        const std::string message = status.message;
        SCOPED_TRACE(o.name + ": " + a.name + ", " + what + ": " + message);
        // Another argument is named where this one says what the others have to be.
        EXPECT_EQ(status.code, CAUSAL_CONV1D_INVALID_ARGUMENT);
        EXPECT_EQ(message.rfind(o.name + ": ", 0), 0U);
        if (what != std::string("size") && !(what == std::string("dtype") && a.name == "u")) {
          const std::string own = o.name + ": " + a.name + " ";
          EXPECT_TRUE(message.rfind(own, 0) == 0 || message.find(a.name) != std::string::npos);
        }
      }
      Calls calls;
      a.tensor(calls) = {};
      const causal_conv1d_status status = o.check(calls);
      if (a.name == "z" && o.name == "selective_scan_bwd") {
        expect_refused(status, o.name + ": dz", "without z");
      } else if (a.name == "state_indices") {
        expect_refused(status, o.name + ": state", "batch = 2 rows");
      } else if (a.optional) {
        EXPECT_VALID(status);
      } else {
        expect_refused(status, o.name + ": " + a.name, "must be given");
      }
    }
  }
}

TEST(ScanCheck, Messages) {
  const std::vector<std::pair<std::string, std::function<void(ScanForwardParams&)>>> wrong{
      {"u must be (batch, dim, seqlen), got (2, 6)",
       [](ScanForwardParams& p) { p.inputs.u.ndim = 2; }},
      {"u must be float32, float16 or bfloat16 (or float64 with u), got int64",
       [](ScanForwardParams& p) { p.inputs.u.dtype = CAUSAL_CONV1D_INT64; }},
      {"delta must be u's shape = (2, 6, 7), got (2, 6, 8)",
       [](ScanForwardParams& p) { p.inputs.delta.sizes[2] = 8; }},
      {"A must be (dim, dstate) with dim = 6, got (7, 5)",
       [](ScanForwardParams& p) { p.inputs.A.sizes[0] = 7; }},
      {"A must have dstate from 1 to 256, got (6, 0)",
       [](ScanForwardParams& p) { p.inputs.A.sizes[1] = 0; }},
      {"A must have dstate from 1 to 256, got (6, 257)",
       [](ScanForwardParams& p) { p.inputs.A.sizes[1] = 257; }},
      {"A must be float32, float16 or bfloat16 (or float64 with u), got complex64",
       [](ScanForwardParams& p) { p.inputs.A.dtype = CAUSAL_CONV1D_COMPLEX64; }},
      {"B must be float64 if and only if u is, got float64 with u float32",
       [](ScanForwardParams& p) { p.inputs.B.dtype = CAUSAL_CONV1D_FLOAT64; }},
      {"B must be (batch, groups, dstate, seqlen) = (2, groups, 5, 7) or (dim, dstate) = (6, 5), "
       "got (2, 3, 5, 8)",
       [](ScanForwardParams& p) { p.inputs.B.sizes[3] = 8; }},
      {"C must have a number of groups that divides dim = 6, got (2, 4, 5, 7)",
       [](ScanForwardParams& p) { p.inputs.C.sizes[1] = 4; }},
      {"C must have a number of groups that divides dim = 6, got (2, 0, 5, 7)",
       [](ScanForwardParams& p) { p.inputs.C.sizes[1] = 0; }},
      {"C must have B's number of groups 3, got (2, 2, 5, 7)",
       [](ScanForwardParams& p) { p.inputs.C.sizes[1] = 2; }},
      {"D must be (dim,) = (6,), got (5,)", [](ScanForwardParams& p) { p.inputs.D.sizes[0] = 5; }},
      {"initial_states must be (batch, dim, dstate) = (2, 6, 5), got (2, 6, 4)",
       [](ScanForwardParams& p) { p.inputs.initial_states.sizes[2] = 4; }},
      {"out must be given", [](ScanForwardParams& p) { p.out.ndim = 0; }},
      {"out must be float64 if and only if u is, got float64 with u float32",
       [](ScanForwardParams& p) { p.out.dtype = CAUSAL_CONV1D_FLOAT64; }},
  };
  for (const auto& [message, spoil] : wrong) {
    Calls calls;
    spoil(calls.forward);
    const causal_conv1d_status status = check(&calls.forward);
    EXPECT_EQ(status.code, CAUSAL_CONV1D_INVALID_ARGUMENT);
    EXPECT_EQ(std::string(status.message), "selective_scan_fwd: " + message);
  }
}

TEST(ScanCheck, MessagesOfTheUpdate) {
  const std::vector<std::pair<std::string, std::function<void(StateUpdateParams&)>>> wrong{
      {"state must be (states, heads, dim, dstate) with heads = 3 and dim = 6, got (4, 2, 6, 5)",
       [](StateUpdateParams& p) { p.state.sizes[1] = 2; }},
      {"state must have dstate from 1 to 256, got (4, 3, 6, 257)",
       [](StateUpdateParams& p) { p.state.sizes[3] = 257; }},
      {"state must have batch = 2 rows unless state_indices is given, got (4, 3, 6, 5)",
       [](StateUpdateParams& p) { p.state_indices = {}; }},
      {"A must be (heads, dim, dstate) = (3, 6, 5), got (3, 6, 4)",
       [](StateUpdateParams& p) { p.A.sizes[2] = 4; }},
      {"B must be (batch, groups, dstate) = (2, groups, 5), got (1, 3, 5)",
       [](StateUpdateParams& p) { p.B.sizes[0] = 1; }},
      {"B must have a number of groups that divides heads = 3, got (2, 2, 5)",
       [](StateUpdateParams& p) { p.B.sizes[1] = 2; }},
      {"C must have B's number of groups 3, got (2, 1, 5)",
       [](StateUpdateParams& p) { p.C.sizes[1] = 1; }},
      {"dt_bias must be (heads, dim) = (3, 6), got (3, 5)",
       [](StateUpdateParams& p) { p.dt_bias.sizes[1] = 5; }},
      {"state_indices must be int32 or int64, got float32",
       [](StateUpdateParams& p) { p.state_indices.dtype = CAUSAL_CONV1D_FLOAT32; }},
      {"state_indices must be (batch,) = (2,), got (3,)",
       [](StateUpdateParams& p) { p.state_indices.sizes[0] = 3; }},
  };
  for (const auto& [message, spoil] : wrong) {
    Calls calls;
    spoil(calls.update);
    const causal_conv1d_status status = check(&calls.update);
    EXPECT_EQ(status.code, CAUSAL_CONV1D_INVALID_ARGUMENT);
    EXPECT_EQ(std::string(status.message), "selective_state_update: " + message);
  }
}

// Of B and C, and dB and dC, either form.
TEST(ScanCheck, ConstantProjections) {
  for (bool constant_B : {false, true}) {
    for (bool constant_C : {false, true}) {
      Calls calls;
      const Tensor constant = calls.tensor({kDim, kStates});
      if (constant_B) calls.backward.inputs.B = constant, calls.backward.dB.ndim = 0;
      if (constant_C) calls.backward.inputs.C = constant, calls.backward.dC.ndim = 0;
      EXPECT_VALID(check(&calls.backward));
      if (!constant_B) continue;
      calls.backward.dB = calls.tensor({kBatch, kGroups, kStates, kLength});
      expect_refused(check(&calls.backward), "selective_scan_bwd: dB", "B's shape = (6, 5)");
      calls.backward.dB = calls.tensor({kDim, kStates});
      EXPECT_VALID(check(&calls.backward));
    }
  }
}

TEST(ScanCheck, PackedSequences) {
  Calls calls(1);
  ScanForwardParams& p = calls.forward;
  const auto spoilt = [&](const std::function<void(Tensor&)>& spoil) {
    p.inputs.cu_seqlens = calls.tensor({4}, CAUSAL_CONV1D_INT64);
    spoil(p.inputs.cu_seqlens);
    return check(&p);
  };
  const std::string name = "selective_scan_fwd: cu_seqlens";
  p.inputs.initial_states = calls.tensor({3, kDim, kStates});
  p.last_states = calls.tensor({3, kDim, kStates});
  EXPECT_VALID(spoilt([](Tensor&) {}));
  EXPECT_VALID(spoilt([](Tensor& t) { t.dtype = CAUSAL_CONV1D_INT32; }));
  expect_refused(spoilt([](Tensor& t) { t.dtype = CAUSAL_CONV1D_INT16; }), name, "int16");
  expect_refused(spoilt([](Tensor& t) { t.ndim = 2; }), name, "(sequences + 1,)");
  expect_refused(spoilt([](Tensor& t) { t.sizes[0] = 0; }), name, "at least one element");
  expect_refused(spoilt([](Tensor& t) { t.sizes[0] = -3; }), name, "sizes >= 0");
  expect_refused(spoilt([](Tensor& t) { t.data = nullptr; }), name, "no data");
  expect_refused(spoilt([](Tensor& t) { t.sizes[0] = 3; }), "selective_scan_fwd: initial_states",
                 "(sequences, dim, dstate) = (2, 6, 5), got (3, 6, 5)");
  Calls many(2);
  many.forward.inputs.cu_seqlens = many.tensor({3}, CAUSAL_CONV1D_INT64);
  expect_refused(check(&many.forward), name, "unless batch is 1, got batch = 2");
}

TEST(ScanCheck, SizesThatOverflow) {
  const auto with_sizes = [](int64_t batch, int64_t seqlen) {
    Calls calls;
    ScanForwardParams p{};
    p.inputs.u = calls.forward.inputs.u;
    p.inputs.delta = calls.forward.inputs.delta;
    p.inputs.A = p.inputs.B = p.inputs.C = calls.forward.inputs.A;
    p.out = calls.forward.out;
    for (Tensor* t : {&p.inputs.u, &p.inputs.delta, &p.out}) {
      t->sizes[0] = batch;
      t->sizes[2] = seqlen;
      t->strides[0] = t->strides[2] = 0;
    }
    p.out.strides[1] = seqlen;
    p.out.strides[2] = 1;
    return check(&p);
  };
  expect_refused(with_sizes(kHuge, 1), "selective_scan_fwd: u", "at most 2^52 elements");
  expect_refused(with_sizes(1, kHuge), "selective_scan_fwd: u", "at most 2^52 elements");
  Calls calls;
  ScanBackwardParams& p = calls.backward;
  const Tensor A = calls.tensor({kDim, 256}), dA = calls.tensor({kDim, 256});
  ScanBackwardParams wide{};
  wide.inputs.u = p.inputs.u;
  wide.inputs.delta = p.inputs.delta;
  wide.inputs.A = wide.inputs.B = wide.inputs.C = A;
  wide.dout = p.dout;
  wide.dA = dA;
  for (Tensor* t : {&wide.inputs.u, &wide.inputs.delta, &wide.dout}) {
    t->sizes[2] = int64_t{1} << 48;
    t->strides[2] = 0;
  }
  expect_refused(check(&wide), "selective_scan_bwd: u", "2^58 elements times dstate");
}

TEST(ScanCheck, OutputsMayNotOverlap) {
  for (const Operator& o : operators()) {
    for (const Argument& a : o.arguments) {
      if (!a.written) continue;
      for (const Argument& b : o.arguments) {
        if (a.name == b.name) continue;
        for (int offset : {0, 4}) {
          Calls calls;
          a.tensor(calls).data = static_cast<char*>(b.tensor(calls).data) + offset;
          const causal_conv1d_status status = o.check(calls);
          const std::string message = status.message;
          SCOPED_TRACE(a.name + " on " + b.name + ": " + message);
          EXPECT_EQ(status.code, CAUSAL_CONV1D_INVALID_ARGUMENT);
          EXPECT_NE(message.find(" must not overlap "), std::string::npos);
          EXPECT_NE(message.find(a.name), std::string::npos);
        }
      }
      Calls calls;
      a.tensor(calls).strides[0] = 0;
      expect_refused(o.check(calls), o.name + ": " + a.name, "expanded tensor");
    }
  }
}

// In four dimensions, in no order that nests: 2, 9 and 25 times numbers below 3, 4 and 6.
TEST(ScanCheck, OutputsOfAnyDistinctStrides) {
  Calls calls;
  Tensor& dB = calls.backward.dB;
  dB = calls.tensor({kBatch, kGroups, kStates, 64});
  dB.sizes[3] = kLength;
  dB.strides[0] = 500;
  dB.strides[1] = 2;
  dB.strides[2] = 9;
  dB.strides[3] = 63;
  EXPECT_VALID(check(&calls.backward));
  dB.strides[3] = 11;  // 9 + 2
  expect_refused(check(&calls.backward), "selective_scan_bwd: dB", "overlap itself");
  // Slices of one buffer, as dB and dC mostly are.
  Tensor& dC = calls.backward.dC;
  dB = calls.tensor({kBatch, kGroups, 2 * kStates, kLength});
  dB.sizes[2] = kStates;
  dC = dB;
  dC.data = static_cast<float*>(dC.data) + kStates * kLength;
  EXPECT_VALID(check(&calls.backward));
  dC.data = static_cast<float*>(dC.data) - 1;
  expect_refused(check(&calls.backward), "selective_scan_bwd: dC", "must not overlap dB");
}

TEST(ScanCheck, InputsMayShareMemoryAndBeExpanded) {
  Calls calls;
  for (causal_conv1d_scan_inputs* in : {&calls.forward.inputs, &calls.backward.inputs}) {
    in->delta = in->z = in->u;
    in->C = in->B;
    in->B.strides[1] = in->B.strides[3] = 0;
    in->u.strides[2] = -1;
    in->u.data = static_cast<float*>(in->u.data) + kLength - 1;
    in->A.strides[0] = in->A.strides[1] = 0;
  }
  EXPECT_VALID(check(&calls.forward));
  EXPECT_VALID(check(&calls.backward));
}

TEST(ScanCheck, NothingToDo) {
  Calls calls(0);
  EXPECT_VALID(check(&calls.forward));
  EXPECT_FALSE(has_work(calls.forward));
  EXPECT_VALID(check(&calls.backward));
  EXPECT_TRUE(has_work(calls.backward));  // dA and others are 0
  EXPECT_VALID(check(&calls.update));
  EXPECT_FALSE(has_work(calls.update));
  // Sizes of any magnitude, without memory.
  ScanForwardParams p = calls.forward;
  for (Tensor* t : {&p.inputs.u, &p.inputs.delta, &p.inputs.z, &p.out, &p.ungated}) {
    t->sizes[0] = t->sizes[2] = kHuge;
    t->sizes[1] = 0;
    t->data = nullptr;
  }
  for (Tensor* t : {&p.inputs.A, &p.inputs.B, &p.inputs.C, &p.inputs.D, &p.inputs.delta_bias,
                    &p.inputs.initial_states, &p.last_states}) {
    *t = {};
  }
  p.inputs.A = calls.tensor({0, kStates});
  p.inputs.B = p.inputs.C = p.inputs.A;
  EXPECT_VALID(check(&p));
  EXPECT_FALSE(has_work(p));
}

}  // namespace
}  // namespace test
