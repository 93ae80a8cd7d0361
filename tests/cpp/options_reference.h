// Forward and backward with options (gates, residual, dilation, packed sequences) in plain double
// precision, and calls of them. The letters are those of csrc/causal_conv1d.h.
#pragma once

#include <cstdlib>

#include "reference.h"

namespace test {

struct Chosen {
  Options base;
  int64_t dilation = 1;
  bool pre_gate = false, post_gate = false, residual = false, residual_is_x = false;
  std::vector<int64_t> bounds;  // packed sequences; the batch is 1
};

inline std::string describe(const Chosen& c) {
  std::string text = describe(c.base) + ", dilation " + std::to_string(c.dilation);
  if (c.pre_gate) text += ", pre_gate";
  if (c.post_gate) text += ", post_gate";
  if (c.residual) text += ", residual";
  if (c.residual_is_x) text += ", residual is x";
  if (!c.bounds.empty()) text += ", bounds";
  for (int64_t bound : c.bounds) text += ' ' + std::to_string(bound);
  return text;
}

// A problem whose states are as many and as long as the options ask for.
struct OptionsProblem {
  Chosen chosen;
  Problem p;
  Array cu_seqlens, pre_gate, post_gate, residual;

  explicit OptionsProblem(const Chosen& c) : chosen(c), p(make_problem(c.base)) {
    std::mt19937 random(13);
    const Options& o = c.base;
    const Sizes like_x{o.batch, o.dim, o.seqlen};
    const auto normal = [&](const Sizes& sizes) {
      return std::move(Array(o.dtype, sizes, o.layout).fill_normal(random));
    };
    if (o.states) {
      const Sizes states{rows(), o.dim, state_len()};
      p.initial_states = normal(states);
      p.dfinal_states = normal(states);
    }
    if (c.pre_gate) pre_gate = normal(like_x);
    if (c.post_gate) post_gate = normal(like_x);
    if (c.residual) residual = normal(like_x);
    if (c.bounds.empty()) return;
    cu_seqlens = Array(o.index_dtype, {static_cast<int64_t>(c.bounds.size())});
    for (size_t i = 0; i < c.bounds.size(); ++i) {
      cu_seqlens.set(static_cast<double>(c.bounds[i]), static_cast<int64_t>(i));
    }
  }

  int64_t state_len() const { return (chosen.base.width - 1) * chosen.dilation; }
  int64_t rows() const {
    return chosen.bounds.empty() ? chosen.base.batch
                                 : static_cast<int64_t>(chosen.bounds.size()) - 1;
  }
  int64_t entry(int64_t row) const { return chosen.bounds.empty() ? row : 0; }
  int64_t start(int64_t row) const { return chosen.bounds.empty() ? 0 : chosen.bounds[row]; }
  int64_t length(int64_t row) const {
    return chosen.bounds.empty() ? p.seqlen() : chosen.bounds[row + 1] - chosen.bounds[row];
  }

  causal_conv1d_options options() {
    causal_conv1d_options o{};
    o.size = sizeof o;
    o.dilation = chosen.dilation;
    o.cu_seqlens = cu_seqlens.tensor();
    o.pre_gate = pre_gate.tensor();
    o.post_gate = post_gate.tensor();
    o.residual = chosen.residual_is_x ? p.x.tensor() : residual.tensor();
    return o;
  }

  // The gated input at time t of an entry, rounded as x is.
  double gated(int64_t b, int64_t d, int64_t t) const {
    const double x = p.x.get(b, d, t);
    if (!pre_gate.given()) return x;
    char rounded[8];
    store(rounded, p.x.view.dtype, x * pre_gate.get(b, d, t));
    return load(rounded, p.x.view.dtype);
  }
  double added(int64_t b, int64_t d, int64_t t) const {
    if (chosen.residual_is_x) return p.x.get(b, d, t);
    return residual.given() ? residual.get(b, d, t) : 0;
  }
  double factor(int64_t b, int64_t d, int64_t t) const {
    return post_gate.given() ? post_gate.get(b, d, t) : 1;
  }
  // x~ of a row of states at its step s.
  double input(int64_t row, int64_t d, int64_t s) const {
    if (s >= 0) return gated(entry(row), d, start(row) + s);
    return p.initial_states.given() ? p.initial_states.get(row, d, state_len() + s) : 0;
  }
  // The step that a column of a row's final states is of, or none, where it is 0.
  bool state_step(int64_t row, int64_t column, int64_t* s) const {
    int64_t end = length(row);
    while (p.seq_idx.given() && end > 0 && p.padding(row, end - 1)) --end;
    *s = end - state_len() + column;
    return !p.seq_idx.given() || end == 0 || !p.padding(row, std::max<int64_t>(*s, 0));
  }
  // Calls f(k, s) for the taps that count at step t.
  template <class F>
  void for_taps(int64_t row, int64_t t, F f) const {
    for (int64_t k = 0; k < p.width(); ++k) {
      const int64_t s = t - (p.width() - 1 - k) * chosen.dilation;
      if (!p.seq_idx.given() || p.counts(row, s, t)) f(k, s);
    }
  }
  double sum(int64_t row, int64_t d, int64_t t) const {
    double z = p.bias.given() ? p.bias.get(d) : 0;
    for_taps(row, t, [&](int64_t k, int64_t s) { z += p.weight.get(d, k) * input(row, d, s); });
    return z;
  }
};

inline ForwardValues reference_forward(const OptionsProblem& o) {
  const Problem& p = o.p;
  ForwardValues r{{p.batch(), p.dim(), p.seqlen()}, {o.rows(), p.dim(), o.state_len()}};
  p.x.for_each([&](int64_t b, int64_t d, int64_t t) { r.out(b, d, t) = o.added(b, d, t); });
  for (int64_t i = 0; i < o.rows(); ++i) {
    const int64_t b = o.entry(i), start = o.start(i);
    for (int64_t d = 0; d < p.dim(); ++d) {
      for (int64_t t = 0; t < o.length(i); ++t) {
        if (p.seq_idx.given() && p.padding(i, t)) continue;
        const double z = o.sum(i, d, t);
        const double a = p.silu ? z / (1 + std::exp(-z)) : z;
        r.out(b, d, start + t) += a * o.factor(b, d, start + t);
      }
      for (int64_t j = 0, s; j < o.state_len(); ++j) {
        if (o.state_step(i, j, &s)) r.final_states(i, d, j) = o.input(i, d, s);
      }
    }
  }
  return r;
}

struct OptionsBackwardValues : BackwardValues {
  Values dpre_gate, dpost_gate;
};

inline OptionsBackwardValues reference_backward(const OptionsProblem& o) {
  const Problem& p = o.p;
  const int64_t states = o.state_len();
  const Values like_x(p.batch(), p.dim(), p.seqlen());
  OptionsBackwardValues r;
  r.dx = r.dpre_gate = r.dpost_gate = like_x;
  r.dweight = Values(1, p.dim(), p.width());
  r.dbias = Values(1, p.dim(), 1);
  r.dinitial_states = Values(o.rows(), p.dim(), states);
  for (int64_t i = 0; i < o.rows(); ++i) {
    const int64_t b = o.entry(i), start = o.start(i);
    for (int64_t d = 0; d < p.dim(); ++d) {
      const auto to_input = [&](int64_t s) -> double& {
        return s >= 0 ? r.dx(b, d, start + s) : r.dinitial_states(i, d, states + s);
      };
      for (int64_t t = 0; t < o.length(i); ++t) {
        if (p.seq_idx.given() && p.padding(i, t)) continue;
        const double z = o.sum(i, d, t), sigmoid = 1 / (1 + std::exp(-z));
        const double dout = p.dout.get(b, d, start + t);
        r.dpost_gate(b, d, start + t) = dout * (p.silu ? z * sigmoid : z);
        double dz = dout * o.factor(b, d, start + t);
        if (p.silu) dz *= sigmoid * (1 + z * (1 - sigmoid));
        r.dbias(0, d, 0) += dz;
        o.for_taps(i, t, [&](int64_t k, int64_t s) {
          r.dweight(0, d, k) += dz * o.input(i, d, s);
          to_input(s) += dz * p.weight.get(d, k);
        });
      }
      for (int64_t j = 0, s; p.dfinal_states.given() && j < states; ++j) {
        if (o.state_step(i, j, &s)) to_input(s) += p.dfinal_states.get(i, d, j);
      }
    }
  }
  p.x.for_each([&](int64_t b, int64_t d, int64_t t) {
    double& dx = r.dx(b, d, t);
    r.dpre_gate(b, d, t) = dx * p.x.get(b, d, t);
    if (o.pre_gate.given()) dx *= o.pre_gate.get(b, d, t);
    if (o.chosen.residual_is_x) dx += p.dout.get(b, d, t);
  });
  return r;
}

struct OptionsForward : Forward {
  causal_conv1d_options options;
  explicit OptionsForward(OptionsProblem& o, Layout layout = Layout::kChannelFirst)
      : Forward(o.p, layout), options(o.options()) {
    final_states = Array(o.p.x.view.dtype, {o.rows(), o.p.dim(), o.state_len()}, layout);
    params.final_states_out = final_states.tensor();
  }
};

struct OptionsBackward : Backward {
  Array dpre_gate, dpost_gate;
  causal_conv1d_options options;
  causal_conv1d_option_gradients gradients{};
  explicit OptionsBackward(OptionsProblem& o, Layout layout = Layout::kChannelFirst)
      : Backward(o.p, layout), options(o.options()) {
    const Sizes like_x{o.p.batch(), o.p.dim(), o.p.seqlen()};
    if (o.pre_gate.given()) dpre_gate = Array(o.p.x.view.dtype, like_x, layout);
    if (o.post_gate.given()) dpost_gate = Array(o.p.x.view.dtype, like_x, layout);
    if (dinitial_states.given()) {
      dinitial_states = Array(o.p.x.view.dtype, {o.rows(), o.p.dim(), o.state_len()}, layout);
      params.dinitial_states = dinitial_states.tensor();
    }
    gradients.size = sizeof gradients;
    gradients.dpre_gate = dpre_gate.tensor();
    gradients.dpost_gate = dpost_gate.tensor();
    gradients.residual_is_x = o.chosen.residual_is_x;
  }
};

// The seed of random cases and their number, for longer runs than those of the test command.
inline unsigned test_seed() {
  const char* const value = std::getenv("CAUSAL_CONV1D_TEST_SEED");
  return value == nullptr ? 1 : static_cast<unsigned>(std::atoi(value));
}
inline int test_cases(int otherwise) {
  const char* const value = std::getenv("CAUSAL_CONV1D_TEST_CASES");
  return value == nullptr ? otherwise : std::atoi(value);
}

// Sequences of 0 to `longest` steps that fill `total`, but perhaps for some steps before and after.
inline std::vector<int64_t> random_bounds(std::mt19937& random, int64_t total, int64_t longest) {
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % (n + 1)); };
  std::vector<int64_t> bounds{below(1) == 0 ? 0 : below(std::min<int64_t>(3, total))};
  const int64_t last = below(1) == 0 ? total : std::max(bounds[0], total - below(3));
  while (bounds.back() < last) bounds.push_back(std::min(last, bounds.back() + below(longest)));
  if (below(2) == 0) bounds.push_back(bounds.back());
  return bounds;
}

// Any of all options.
inline Chosen random_choice(std::mt19937& random) {
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  const int32_t f32 = CAUSAL_CONV1D_FLOAT32, f16 = CAUSAL_CONV1D_FLOAT16;
  const int32_t bf16 = CAUSAL_CONV1D_BFLOAT16, f64 = CAUSAL_CONV1D_FLOAT64;
  Chosen c;
  Options& o = c.base;
  o.dtype = std::array{f32, f16, bf16, bf16, f64}[below(5)];
  o.parameter_dtype = o.dtype == f64 ? f64 : std::array{f32, f16, bf16}[below(3)];
  o.index_dtype = below(2) == 0 ? CAUSAL_CONV1D_INT32 : CAUSAL_CONV1D_INT64;
  o.layout = static_cast<Layout>(below(3));
  o.width = std::array<int64_t, 8>{1, 2, 3, 4, 4, 5, 7, 11}[below(8)];
  o.dim = below(4) == 0 ? 1 + below(140) : 1 + below(40);
  o.seqlen = below(8) == 0 ? below(4) : 1 + below(o.dim < 40 ? 200 : 60);
  o.batch = 1 + below(3);
  o.bias = below(2) == 0;
  o.silu = below(3) != 0;
  o.states = below(2) == 0;
  c.dilation = below(2) == 0 ? 1 : 1 + below(below(3) == 0 ? 40 : 5);
  if (below(2) == 0) {
    o.batch = 1;
    c.bounds = random_bounds(random, o.seqlen, below(3) == 0 ? 100 : 8);
  } else {
    o.seq_idx = below(3) == 0;
  }
  if (below(2) == 0) {
    c.pre_gate = below(2) == 0;
    c.post_gate = below(2) == 0;
    c.residual_is_x = below(3) == 0;
    c.residual = !c.residual_is_x && below(2) == 0;
  }
  return c;
}

}  // namespace test
