// What a program may get wrong in calls of the pool of states.
#include <gtest/gtest.h>
#include <pool_check.h>

#include <cstddef>
#include <cstring>
#include <functional>
#include <limits>
#include <list>
#include <string>
#include <vector>

namespace test {
namespace {

using causal_conv1d::check;
using causal_conv1d::has_work;
using causal_conv1d::PoolParams;
using causal_conv1d::read;
using Tensor = causal_conv1d_tensor;

constexpr int64_t kDim = 6, kWidth = 4, kTotal = 11, kSequences = 3, kSlots = 5, kStateLen = 7;

// The arguments of one call, with memory of their own: all but num_accepted_tokens, which is in the
// place of has_initial_state if accepted.
struct Call {
  std::list<std::vector<double>> memory;
  PoolParams params{};

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
    memory.emplace_back(static_cast<size_t>(stride) + 8);
    t.data = memory.back().data();
    return t;
  }

  explicit Call(bool accepted = false) {
    PoolParams& p = params;
    p.size = sizeof p;
    p.x = tensor({kDim, kTotal});
    p.conv_states = tensor({kSlots, kDim, kStateLen});
    p.weight = tensor({kDim, kWidth});
    p.bias = tensor({kDim});
    p.out = tensor({kDim, kTotal});
    p.query_start_loc = tensor({kSequences + 1}, CAUSAL_CONV1D_INT32);
    p.cache_indices = tensor({kSequences}, CAUSAL_CONV1D_INT64);
    (accepted ? p.num_accepted_tokens : p.has_initial_state) =
        tensor({kSequences}, accepted ? CAUSAL_CONV1D_INT32 : CAUSAL_CONV1D_BOOL);
    p.windows_out = tensor({4, 2, kDim * (kWidth - 1)});
    p.window_indices = tensor({kSequences}, CAUSAL_CONV1D_INT32);
    p.pad_slot = -1;
  }
};

causal_conv1d_status checked(const PoolParams& p) {
  PoolParams full;
  const causal_conv1d_status status = read(&p, &full);
  return status.code == CAUSAL_CONV1D_OK ? check(&full) : status;
}

std::string message_of(const PoolParams& p) {
  const causal_conv1d_status status = checked(p);
  EXPECT_EQ(status.code,
            status.message[0] == '\0' ? CAUSAL_CONV1D_OK : CAUSAL_CONV1D_INVALID_ARGUMENT);
  return status.message;
}

struct Argument {
  std::string name;
  Tensor PoolParams::*member;
  bool optional;
};

const std::vector<Argument>& arguments() {
  static const std::vector<Argument> all{
      {"x", &PoolParams::x, false},
      {"conv_states", &PoolParams::conv_states, false},
      {"weight", &PoolParams::weight, false},
      {"bias", &PoolParams::bias, true},
      {"out", &PoolParams::out, false},
      {"query_start_loc", &PoolParams::query_start_loc, true},
      {"cache_indices", &PoolParams::cache_indices, true},
      {"has_initial_state", &PoolParams::has_initial_state, true},
      {"num_accepted_tokens", &PoolParams::num_accepted_tokens, true},
      {"windows_out", &PoolParams::windows_out, true},
      {"window_indices", &PoolParams::window_indices, true},
  };
  return all;
}

TEST(PoolCheck, TheArgumentsUsedHereAreValid) {
  EXPECT_EQ(message_of(Call().params), "");
  EXPECT_EQ(message_of(Call(true).params), "");
}

// Each argument, spoilt in every way that is wrong whatever it is.
TEST(PoolCheck, AnyArgumentMayBeSpoilt) {
  constexpr int64_t kHuge = int64_t{1} << 62, kLeast = std::numeric_limits<int64_t>::min();
  const std::vector<std::function<void(Tensor&)>> ways{
      [](Tensor& t) { t.ndim = t.ndim == 3 ? 2 : 3; },
      [](Tensor& t) { t.ndim = 4; },
      [](Tensor& t) { t.ndim = -1; },
      [](Tensor& t) { t.dtype = -1; },
      [](Tensor& t) { t.dtype = CAUSAL_CONV1D_UNSUPPORTED_DTYPE; },
      [](Tensor& t) { t.dtype = CAUSAL_CONV1D_FLOAT64; },
      [](Tensor& t) { t.dtype = CAUSAL_CONV1D_INT8; },
      [](Tensor& t) { t.data = nullptr; },
      [](Tensor& t) { t.sizes[t.ndim - 1] = -1; },
      [](Tensor& t) { t.sizes[0] = kLeast; },
      [](Tensor& t) { t.strides[0] = kHuge; },
      [](Tensor& t) { t.strides[t.ndim - 1] = -kHuge; },
      [](Tensor& t) { t.data = reinterpret_cast<void*>(~uintptr_t{1}); },
  };
  for (bool accepted : {false, true}) {
    for (const Argument& a : arguments()) {
      for (size_t i = 0; i < ways.size(); ++i) {
        Call call(accepted);
        Tensor& t = call.params.*a.member;
        if (t.ndim == 0) continue;
        ways[i](t);
        EXPECT_EQ(message_of(call.params).rfind("causal_conv1d_pool: ", 0), 0U)
            << a.name << ' ' << i;
      }
      Call call(accepted);
      call.params.*a.member = {};
      const std::string message = message_of(call.params);
      if (a.name == "windows_out") {
        EXPECT_EQ(message,
                  "causal_conv1d_pool: window_indices must not be given without windows_out");
      } else if (a.name == "window_indices") {
        EXPECT_EQ(message,
                  "causal_conv1d_pool: windows_out must be (sequences, tokens, dim * (width - 1) = "
                  "18), got (4, 2, 18)");
      } else if (a.name == "query_start_loc") {  // each token is a sequence then
        EXPECT_EQ(message,
                  "causal_conv1d_pool: cache_indices must be (sequences,) = (11,), got (3,)");
      } else {
        EXPECT_EQ(message, a.optional ? "" : "causal_conv1d_pool: " + a.name + " must be given");
      }
    }
  }
}

TEST(PoolCheck, Messages) {
  const std::vector<std::pair<std::string, std::function<void(PoolParams&)>>> wrong{
      {"x must be (dim, total), got (6, 11, 1)",
       [](PoolParams& p) { p.x.ndim = 3, p.x.sizes[2] = 1; }},
      {"x must be float32, float16 or bfloat16 (or float64 with x), got int32",
       [](PoolParams& p) { p.x.dtype = CAUSAL_CONV1D_INT32; }},
      {"weight must be (dim, width) with dim = 6, got (5, 4)",
       [](PoolParams& p) { p.weight.sizes[0] = 5; }},
      {"bias must be (dim,) = (6,), got (7,)", [](PoolParams& p) { p.bias.sizes[0] = 7; }},
      {"conv_states must be (slots, dim, state_len) with dim = 6, got (5, 7, 7)",
       [](PoolParams& p) { p.conv_states.sizes[1] = 7; }},
      {"conv_states must have state_len >= width - 1 = 3, got (5, 6, 2)",
       [](PoolParams& p) { p.conv_states.sizes[2] = 2; }},
      {"conv_states must be float64 if and only if x is, got float64 with x float32",
       [](PoolParams& p) { p.conv_states.dtype = CAUSAL_CONV1D_FLOAT64; }},
      {"conv_states must have at least 3 slots unless cache_indices is given, got (2, 6, 7)",
       [](PoolParams& p) { p.cache_indices = {}, p.conv_states.sizes[0] = 2; }},
      {"out must be x's shape = (6, 11), got (6, 10)", [](PoolParams& p) { p.out.sizes[1] = 10; }},
      {"out must have x's dtype float32, got float16",
       [](PoolParams& p) { p.out.dtype = CAUSAL_CONV1D_FLOAT16; }},
      {"query_start_loc must be int32 or int64, got float32",
       [](PoolParams& p) { p.query_start_loc.dtype = CAUSAL_CONV1D_FLOAT32; }},
      {"query_start_loc must have at least one element",
       [](PoolParams& p) { p.query_start_loc.sizes[0] = 0; }},
      {"cache_indices must be (sequences,) = (3,), got (4,)",
       [](PoolParams& p) { p.cache_indices.sizes[0] = 4; }},
      {"has_initial_state must be (sequences,) = (3,), got (2,)",
       [](PoolParams& p) { p.has_initial_state.sizes[0] = 2; }},
      {"has_initial_state must be bool, uint8, int32 or int64, got float32",
       [](PoolParams& p) { p.has_initial_state.dtype = CAUSAL_CONV1D_FLOAT32; }},
      {"has_initial_state must not be given with num_accepted_tokens",
       [](PoolParams& p) { p.num_accepted_tokens = p.cache_indices; }},
      {"num_accepted_tokens must be int32 or int64, got bool",
       [](PoolParams& p) {
         p.num_accepted_tokens = p.has_initial_state;
         p.has_initial_state = {};
       }},
      {"windows_out must be (rows, tokens, dim * (width - 1) = 18), got (4, 2, 17)",
       [](PoolParams& p) { p.windows_out.sizes[2] = 17; }},
      {"windows_out must be float64 if and only if x is, got float64 with x float32",
       [](PoolParams& p) { p.windows_out.dtype = CAUSAL_CONV1D_FLOAT64; }},
      {"window_indices must be (sequences,) = (3,), got (2,)",
       [](PoolParams& p) { p.window_indices.sizes[0] = 2; }},
      {"max_seqlen must be >= 0, got -1", [](PoolParams& p) { p.max_seqlen = -1; }},
      {"out must not overlap x in memory",
       [](PoolParams& p) { p.out.data = p.x.data, p.out.strides[0] = 1, p.out.strides[1] = kDim; }},
      {"conv_states must not overlap weight in memory",
       [](PoolParams& p) { p.weight.data = p.conv_states.data; }},
      {"windows_out must not overlap conv_states in memory",
       [](PoolParams& p) { p.windows_out.data = p.conv_states.data; }},
      {"conv_states is written and must not be an expanded tensor (stride 0)",
       [](PoolParams& p) { p.conv_states.strides[0] = 0; }},
      {"size must be the size of the parameter struct, got 0", [](PoolParams& p) { p.size = 0; }},
  };
  for (const auto& [message, spoil] : wrong) {
    Call call;
    spoil(call.params);
    EXPECT_EQ(message_of(call.params), "causal_conv1d_pool: " + message);
  }
  PoolParams full;
  EXPECT_EQ(std::string(read(nullptr, &full).message),
            "causal_conv1d_pool: params must not be NULL");
}

TEST(PoolCheck, EachTokenASequence) {
  Call call;
  call.params.x.sizes[1] = call.params.out.sizes[1] = kSequences;
  call.params.query_start_loc = {};
  EXPECT_EQ(message_of(call.params), "");
}

TEST(PoolCheck, OutMayBeX) {
  Call call;
  call.params.out = call.params.x;
  EXPECT_EQ(message_of(call.params), "");
}

TEST(PoolCheck, FlagsOfAnyType) {
  for (int32_t dtype : {CAUSAL_CONV1D_UINT8, CAUSAL_CONV1D_INT32, CAUSAL_CONV1D_INT64}) {
    Call call;
    call.params.has_initial_state.dtype = dtype;
    EXPECT_EQ(message_of(call.params), "");
  }
  Call call;  // a byte has no alignment
  call.params.has_initial_state.data = static_cast<char*>(call.params.has_initial_state.data) + 1;
  EXPECT_EQ(message_of(call.params), "");
}

// A caller's struct may end earlier, or later with zeros.
TEST(PoolCheck, StructsOfOtherVersions) {
  struct Later {
    PoolParams params;
    int64_t more[2];
  } later{};
  Call call;
  later.params = call.params;
  later.params.size = sizeof later;
  EXPECT_EQ(message_of(later.params), "");
  later.more[1] = 1;
  EXPECT_EQ(message_of(later.params),
            "causal_conv1d_pool: size tells of parameters that this library does not know: " +
                std::to_string(sizeof later) + " of " + std::to_string(sizeof(PoolParams)) +
                " bytes");

  call.params.size = offsetof(PoolParams, windows_out);
  call.params.max_seqlen = -1;  // beyond it
  PoolParams full;
  std::memset(&full, 0xff, sizeof full);
  ASSERT_EQ(read(&call.params, &full).code, CAUSAL_CONV1D_OK);
  EXPECT_EQ(full.windows_out.ndim, 0);
  EXPECT_EQ(full.max_seqlen, 0);
  EXPECT_EQ(message_of(call.params), "");
}

TEST(PoolCheck, NothingToDo) {
  Call call;
  EXPECT_TRUE(has_work(call.params));
  call.params.x.sizes[1] = call.params.out.sizes[1] = 0;
  EXPECT_EQ(message_of(call.params), "");
  EXPECT_FALSE(has_work(call.params));
}

}  // namespace
}  // namespace test
