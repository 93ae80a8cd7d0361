// The CPU's pool of states against its definition, for every instruction set that this machine
// runs.
#include <gtest/gtest.h>

#include <numeric>

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

struct PoolChoice {
  Options base;  // seqlen is the number of tokens, batch 1
  int32_t state_dtype = CAUSAL_CONV1D_FLOAT32;
  Layout state_layout = Layout::kChannelFirst;
  std::vector<int64_t> bounds;
  int64_t slots = 0, state_len = 3, pad_slot = -1, window_tokens = 2;
  bool indexed = true, has_initial = false, accepted = false, windows = false, in_place = false;
};

// The arguments of a call, and all that it should change.
struct PoolCall {
  PoolChoice chosen;
  Problem p;
  Array out, states, starts, slots, has_initial, accepted, windows, window_rows;
  Values want_out, want_states, want_windows;
  causal_conv1d_pool_params params{};

  PoolCall(const PoolChoice& c, std::mt19937& random) : chosen(c), p(make_problem(c.base)) {
    const int64_t count = sequences(), dim = c.base.dim, halo = c.base.width - 1;
    const auto indices = [&](int64_t n) { return Array(c.base.index_dtype, {n}); };
    out = Array(c.base.dtype, {1, dim, c.base.seqlen}, c.base.layout);
    states = std::move(
        Array(c.state_dtype, {c.slots, dim, c.state_len}, c.state_layout).fill_normal(random));
    starts = indices(count + 1);
    for (int64_t i = 0; i <= count; ++i) starts.set(static_cast<double>(c.bounds[i]), i);
    std::vector<int64_t> order(static_cast<size_t>(c.slots));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    if (c.indexed) slots = indices(count);
    if (c.has_initial) has_initial = indices(count);
    if (c.accepted) accepted = indices(count);
    if (c.windows) {
      windows = Array(c.state_dtype, {count + 2, c.window_tokens, dim * halo}, c.base.layout);
      windows.fill_normal(random);
      window_rows = indices(count);
    }
    for (int64_t i = 0; i < count; ++i) {
      if (c.indexed) slots.set(static_cast<double>(random() % 6 ? order[i] : c.pad_slot), i);
      if (c.has_initial) has_initial.set(static_cast<double>(random() % 2), i);
      const int64_t most = c.state_len - halo;
      if (c.accepted) accepted.set(static_cast<double>(1 + random() % (most + 1)), i);
      if (c.windows) window_rows.set(static_cast<double>(random() % 5 ? count + 1 - i : -1), i);
    }
    set_params();
    find_wanted();
  }

  int64_t sequences() const { return static_cast<int64_t>(chosen.bounds.size()) - 1; }
  int64_t slot(int64_t i) const {
    const int64_t slot = chosen.indexed ? static_cast<int64_t>(slots.get(i)) : i;
    return slot == chosen.pad_slot ? -1 : slot;
  }

  void set_params() {
    const auto plain = [](causal_conv1d_tensor t) {  // (1, dim, total) as (dim, total)
      t.ndim = 2;
      for (int i = 0; i < 2; ++i) t.sizes[i] = t.sizes[i + 1], t.strides[i] = t.strides[i + 1];
      return t;
    };
    params.size = sizeof params;
    params.x = plain(p.x.tensor());
    params.out = chosen.in_place ? params.x : plain(out.tensor());
    params.weight = p.weight.tensor();
    params.bias = p.bias.tensor();
    params.conv_states = states.tensor();
    params.query_start_loc = starts.tensor();
    params.cache_indices = slots.tensor();
    params.has_initial_state = has_initial.tensor();
    params.num_accepted_tokens = accepted.tensor();
    params.windows_out = windows.tensor();
    params.window_indices = window_rows.tensor();
    params.pad_slot = chosen.pad_slot;
    params.silu = p.silu;
  }

  void find_wanted() {
    const int64_t dim = p.dim(), width = p.width(), halo = width - 1;
    want_out = Values(1, dim, p.seqlen());
    want_states = Values(chosen.slots, dim, chosen.state_len);
    want_states.data = states.values();
    if (windows.given()) {
      want_windows = Values(windows.size(0), windows.size(1), windows.size(2));
      want_windows.data = windows.values();
    }
    for (int64_t i = 0; i < sequences(); ++i) {
      const int64_t start = chosen.bounds[i], length = chosen.bounds[i + 1] - start;
      if (slot(i) < 0 || length == 0) continue;
      for (int64_t d = 0; d < dim; ++d) find_wanted(i, d, start, length, halo);
    }
  }

  void find_wanted(int64_t i, int64_t d, int64_t start, int64_t length, int64_t halo) {
    const bool fresh = has_initial.given() && has_initial.get(i) == 0;
    const int64_t first = accepted.given() ? static_cast<int64_t>(accepted.get(i)) - 1 : 0;
    std::vector<double> inputs;
    for (int64_t j = 0; j < halo; ++j) {
      inputs.push_back(fresh ? 0 : states.get(slot(i), d, first + j));
    }
    for (int64_t t = 0; t < length; ++t) inputs.push_back(p.x.get(0, d, start + t));
    for (int64_t t = 0; t < length; ++t) {
      double z = p.bias.given() ? p.bias.get(d) : 0;
      for (int64_t k = 0; k <= halo; ++k) z += p.weight.get(d, k) * inputs[t + k];
      want_out(0, d, start + t) = p.silu ? z / (1 + std::exp(-z)) : z;
      for (int64_t j = 0; windows.given() && t < chosen.window_tokens && j < halo; ++j) {
        const int64_t row = static_cast<int64_t>(window_rows.get(i));
        if (row >= 0) want_windows(row, t, d * halo + j) = rounded(inputs[t + 1 + j]);
      }
    }
    const int64_t columns = accepted.given() ? std::min(chosen.state_len, halo - 1 + length) : halo;
    const size_t from = inputs.size() - static_cast<size_t>(columns);
    for (int64_t c = 0; c < columns; ++c) {
      want_states(slot(i), d, c) = rounded(inputs[from + static_cast<size_t>(c)]);
    }
  }

  double rounded(double value) const {
    char bytes[8];
    store(bytes, chosen.state_dtype, value);
    return load(bytes, chosen.state_dtype);
  }
};

std::string describe(const PoolChoice& c) {
  std::string text = describe(c.base) + ", states " + std::to_string(c.state_dtype) + " of " +
                     std::to_string(c.state_len) + ", pad slot " + std::to_string(c.pad_slot);
  if (c.has_initial) text += ", has_initial_state";
  if (c.accepted) text += ", num_accepted_tokens";
  if (c.windows) text += ", windows of " + std::to_string(c.window_tokens);
  if (c.in_place) text += ", in place";
  text += ", bounds";
  for (int64_t bound : c.bounds) text += ' ' + std::to_string(bound);
  return text;
}

// The same values; says which ones are not.
void expect_same(const char* name, const Array& got, const Values& want) {
  const std::vector<double> values = got.values();
  ASSERT_EQ(values.size(), want.data.size());
  for (size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(values[i], want.data[i]) << name << " at " << i << " of " << values.size();
  }
}

PoolChoice random_pool(std::mt19937& random) {
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  PoolChoice c;
  c.base = random_choice(random).base;
  c.base.batch = 1;
  c.base.seq_idx = c.base.states = false;
  c.bounds = random_bounds(random, c.base.seqlen, below(3) == 0 ? 120 : 6);
  const bool fp64 = c.base.dtype == CAUSAL_CONV1D_FLOAT64;
  const int32_t dtypes[] = {CAUSAL_CONV1D_FLOAT32, CAUSAL_CONV1D_FLOAT16, CAUSAL_CONV1D_BFLOAT16};
  c.state_dtype = fp64 || below(2) == 0 ? c.base.dtype : dtypes[below(3)];
  c.state_layout = static_cast<Layout>(below(3));
  c.state_len = c.base.width - 1 + (below(2) == 0 ? 0 : below(6));
  c.slots = static_cast<int64_t>(c.bounds.size()) + below(4);
  c.indexed = below(4) != 0;
  c.pad_slot = c.indexed && below(2) == 0 ? 0 : -1;
  c.has_initial = below(2) == 0;
  c.accepted = !c.has_initial && below(2) == 0;
  c.windows = below(3) == 0;
  c.window_tokens = below(4);
  c.in_place = below(2) == 0;
  return c;
}

class Pool : public testing::TestWithParam<const KernelTable*> {
 protected:
  void SetUp() override { active_kernels = GetParam(); }
  void TearDown() override { active_kernels = best_; }

 private:
  const KernelTable* const best_ = active_kernels;
};

TEST_P(Pool, RandomCasesMatchTheDefinition) {
  std::mt19937 random(test_seed());
  for (int i = test_cases(300); i > 0 && !HasFailure(); --i) {
    const PoolChoice chosen = random_pool(random);
    SCOPED_TRACE(describe(chosen));
    PoolCall call(chosen, random);
    ASSERT_OK(causal_conv1d_cpu_pool(&call.params, 2));
    const Array& out = chosen.in_place ? call.p.x : call.out;
    EXPECT_LE(relative_error(out.values(), call.want_out.data),
              2 * tolerance(chosen.base.dtype, call.want_out.data.size()));
    expect_same("conv_states", call.states, call.want_states);
    if (chosen.windows) expect_same("windows_out", call.windows, call.want_windows);
    expect_untouched_around(call.states);
  }
}

INSTANTIATE_TEST_SUITE_P(, Pool, testing::ValuesIn(runnable()),
                         [](const auto& isa) { return std::string(isa.param->name); });

// Chunks of a prompt and single tokens, by the pool, have the bits of the sequence in one call.
TEST(PoolOfStates, ContinuesSequencesBitwise) {
  for (int32_t dtype : {CAUSAL_CONV1D_FLOAT32, CAUSAL_CONV1D_BFLOAT16}) {
    for (int64_t width : {4, 7}) {
      Options o;
      o.dtype = dtype;
      o.width = width;
      o.batch = 1;
      o.dim = 530;
      o.seqlen = 70;
      o.layout = Layout::kChannelLast;
      Problem p = make_problem(o);
      Forward whole(p, o.layout);
      ASSERT_OK(causal_conv1d_cpu_forward(&whole.params, 2));
      PoolChoice c;
      c.base = o;
      c.state_dtype = dtype;
      c.state_len = width - 1;
      c.slots = 2;
      c.indexed = false;
      std::mt19937 random(3);
      std::vector<double> got;
      Array states(dtype, {2, o.dim, width - 1});
      std::fill(states.memory.begin(), states.memory.end(), 0);
      for (int64_t t = 0, n; t < o.seqlen; t += n) {
        n = std::min<int64_t>(o.seqlen - t, t < 40 ? 20 : 1);
        c.base.seqlen = n;
        c.bounds = {0, n};
        PoolCall call(c, random);
        call.params.conv_states = states.tensor();
        call.p.x.for_each(
            [&](int64_t, int64_t d, int64_t i) { call.p.x.set(p.x.get(0, d, t + i), 0, d, i); });
        std::memcpy(call.p.weight.memory.data(), p.weight.memory.data(), p.weight.memory.size());
        std::memcpy(call.p.bias.memory.data(), p.bias.memory.data(), p.bias.memory.size());
        ASSERT_OK(causal_conv1d_cpu_pool(&call.params, 2));
        call.out.for_each([&](int64_t, int64_t d, int64_t i) {
          ASSERT_EQ(call.out.get(0, d, i), whole.out.get(0, d, t + i)) << d << ' ' << t + i;
        });
      }
    }
  }
}

// Values of index tensors that fit no call: an error that names the tensor, and nothing is written.
TEST(PoolOfStates, ValuesAreChecked) {
  PoolChoice c;
  c.base.batch = 1;
  c.base.layout = Layout::kChannelLast;
  c.state_len = 5;
  c.slots = 6;
  c.pad_slot = 0;
  c.bounds = {0, 20, 30, 53};
  const auto refused = [&](const char* start, auto spoil) {
    std::mt19937 random(1);
    PoolCall call(c, random);
    for (int64_t i = 0; i < 3; ++i) {
      call.slots.set(static_cast<double>(i + 1), i);
      if (c.accepted) call.accepted.set(1, i);
      if (c.windows) call.window_rows.set(static_cast<double>(i), i);
    }
    spoil(call);
    const std::vector<char> out = call.out.memory, states = call.states.memory;
    const causal_conv1d_status status = causal_conv1d_cpu_pool(&call.params, 0);
    EXPECT_EQ(status.code, CAUSAL_CONV1D_INVALID_ARGUMENT);
    EXPECT_EQ(std::string(status.message).rfind(start, 0), 0U) << status.message;
    EXPECT_EQ(call.out.memory, out);
    EXPECT_EQ(call.states.memory, states);
  };
  refused("causal_conv1d_pool: query_start_loc must not decrease and lie within 0..53",
          [](PoolCall& call) { call.starts.set(19, 2); });
  refused("causal_conv1d_pool: cache_indices must be pad_slot or a slot of conv_states, got 6 at 1",
          [](PoolCall& call) { call.slots.set(6, 1); });
  refused(
      "causal_conv1d_pool: cache_indices must be pad_slot or a slot of conv_states, got -1 at 2",
      [](PoolCall& call) { call.slots.set(-1, 2); });
  refused("causal_conv1d_pool: cache_indices must differ, got 3 twice",
          [](PoolCall& call) { call.slots.set(3, 0); });
  c.accepted = true;
  for (double accepted : {0.0, 4.0}) {
    refused("causal_conv1d_pool: num_accepted_tokens must be >= 1 and leave width - 1 columns",
            [&](PoolCall& call) { call.accepted.set(accepted, 1); });
  }
  c.accepted = false;
  c.windows = true;
  refused("causal_conv1d_pool: window_indices must be < the rows of windows_out, got 5 at 0",
          [](PoolCall& call) { call.window_rows.set(5, 0); });
  refused("causal_conv1d_pool: window_indices must differ, got 2 twice",
          [](PoolCall& call) { call.window_rows.set(2, 1); });
}

}  // namespace
}  // namespace test
