// Host tensors in any layout, and the operations in plain double precision; every test compares
// with these. The letters are those of csrc/causal_conv1d.h.
#pragma once

#include <causal_conv1d.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace test {

inline int64_t element_size(int32_t dtype) {
  switch (dtype) {
    case CAUSAL_CONV1D_FLOAT16:
    case CAUSAL_CONV1D_BFLOAT16: return 2;
    case CAUSAL_CONV1D_FLOAT64:
    case CAUSAL_CONV1D_INT64: return 8;
    default: return 4;
  }
}

inline bool is_16_bit(int32_t dtype) { return element_size(dtype) == 2; }

// The nearest value of a format with `bits` significant bits and least exponent `least`.
inline double round_to(double value, int bits, int least) {
  int exponent = 0;
  std::frexp(value, &exponent);
  const int unit = std::max(exponent, least) - bits;
  return std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
}

inline uint16_t half_bits(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = round_to(std::fabs(value), 11, -13);
  if (std::isnan(value)) return 0x7e00;
  if (magnitude >= 65536) return sign | 0x7c00;
  if (magnitude == 0) return sign;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  exponent = std::max(exponent, -13);
  const double significand = std::ldexp(magnitude, 11 - exponent);
  return static_cast<uint16_t>(sign | ((exponent + 13) * 1024 + static_cast<int>(significand)));
}

inline double half_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  double value =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) value = mantissa == 0 ? INFINITY : NAN;
  return bits & 0x8000 ? -value : value;
}

inline double load(const char* p, int32_t dtype) {
  uint16_t bits16;
  uint32_t bits32;
  float f;
  double d;
  int32_t i;
  int64_t l;
  switch (dtype) {
    case CAUSAL_CONV1D_FLOAT16: return std::memcpy(&bits16, p, 2), half_value(bits16);
    case CAUSAL_CONV1D_BFLOAT16:
      std::memcpy(&bits16, p, 2);
      bits32 = static_cast<uint32_t>(bits16) << 16;
      return std::memcpy(&f, &bits32, 4), f;
    case CAUSAL_CONV1D_FLOAT32: return std::memcpy(&f, p, 4), f;
    case CAUSAL_CONV1D_FLOAT64: return std::memcpy(&d, p, 8), d;
    case CAUSAL_CONV1D_INT32: return std::memcpy(&i, p, 4), i;
    default: return std::memcpy(&l, p, 8), static_cast<double>(l);
  }
}

inline void store(char* p, int32_t dtype, double value) {
  uint16_t bits16;
  uint32_t bits32;
  float f = static_cast<float>(value);
  const int32_t i = static_cast<int32_t>(value);
  const int64_t l = static_cast<int64_t>(value);
  switch (dtype) {
    case CAUSAL_CONV1D_FLOAT16: bits16 = half_bits(value), std::memcpy(p, &bits16, 2); return;
    case CAUSAL_CONV1D_BFLOAT16:
      f = static_cast<float>(round_to(value, 8, -125));
      std::memcpy(&bits32, &f, 4);
      bits16 = static_cast<uint16_t>(bits32 >> 16), std::memcpy(p, &bits16, 2);
      return;
    case CAUSAL_CONV1D_FLOAT32: std::memcpy(p, &f, 4); return;
    case CAUSAL_CONV1D_FLOAT64: std::memcpy(p, &value, 8); return;
    case CAUSAL_CONV1D_INT32: std::memcpy(p, &i, 4); return;
    default: std::memcpy(p, &l, 8);
  }
}

using Sizes = std::vector<int64_t>;

enum class Layout { kChannelFirst, kChannelLast, kStrided };

// A tensor with memory of its own. In kStrided its elements are two apart, start off any alignment
// and have other memory around them. All memory begins as 0x7f bytes.
struct Array {
  std::vector<char> memory;
  causal_conv1d_tensor view{};
  int64_t offset = 0;  // of view.data in memory, in bytes

  Array() = default;
  Array(int32_t dtype, const Sizes& sizes, Layout layout = Layout::kChannelFirst) {
    const int n = static_cast<int>(sizes.size());
    view.ndim = n;
    view.dtype = dtype;
    std::copy(sizes.begin(), sizes.end(), view.sizes);
    std::vector<int> order(n);  // from the fastest dimension to the slowest
    for (int i = 0; i < n; ++i) order[i] = n - 1 - i;
    if (layout != Layout::kChannelFirst && n == 3) std::swap(order[0], order[1]);
    int64_t stride = layout == Layout::kStrided ? 2 : 1;
    offset = layout == Layout::kStrided ? 3 * element_size(dtype) : 0;
    for (int i : order) {
      view.strides[i] = stride;
      stride *= sizes[i] + (layout == Layout::kStrided ? 1 : 0);
    }
    memory.assign(static_cast<size_t>(offset + stride * element_size(dtype) + 64), 0x7f);
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  Array(Array&&) = default;
  Array& operator=(Array&&) = default;

  bool given() const { return view.ndim != 0; }
  int64_t size(int i) const { return view.sizes[i]; }
  // The description that the C API takes, valid while this object stays where it is.
  causal_conv1d_tensor tensor() { return at(memory.data()); }
  // The same for a copy of memory at another address.
  causal_conv1d_tensor at(void* base) const {
    causal_conv1d_tensor t = view;
    if (given()) t.data = static_cast<char*>(base) + offset;
    return t;
  }

  int64_t position(int64_t i, int64_t j, int64_t k) const {
    return offset + (i * view.strides[0] + j * view.strides[1] + k * view.strides[2]) *
                        element_size(view.dtype);
  }
  double get(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return load(memory.data() + position(i, j, k), view.dtype);
  }
  void set(double value, int64_t i, int64_t j = 0, int64_t k = 0) {
    store(memory.data() + position(i, j, k), view.dtype, value);
  }

  template <class F>
  void for_each(F f) const {
    for (int64_t i = 0; i < view.sizes[0]; ++i)
      for (int64_t j = 0; j < (view.ndim > 1 ? view.sizes[1] : 1); ++j)
        for (int64_t k = 0; k < (view.ndim > 2 ? view.sizes[2] : 1); ++k) f(i, j, k);
  }
  std::vector<double> values() const {
    std::vector<double> all;
    for_each([&](int64_t i, int64_t j, int64_t k) { all.push_back(get(i, j, k)); });
    return all;
  }
  Array& fill_normal(std::mt19937& random) {
    std::normal_distribution<double> normal;
    for_each([&](int64_t i, int64_t j, int64_t k) { set(normal(random), i, j, k); });
    return *this;
  }
};

// Values of a (batch, dim, length) result.
struct Values {
  int64_t dim = 0, length = 0;
  std::vector<double> data;
  Values() = default;
  Values(int64_t b, int64_t d, int64_t n)
      : dim(d), length(n), data(static_cast<size_t>(b * d * n), 0.0) {}
  double& operator()(int64_t b, int64_t d, int64_t t) {
    return data[static_cast<size_t>((b * dim + d) * length + t)];
  }
};

// The arguments of a forward and a backward.
struct Problem {
  Array x, weight, bias, seq_idx, initial_states, dout, dfinal_states;
  bool silu = false;

  int64_t batch() const { return x.size(0); }
  int64_t dim() const { return x.size(1); }
  int64_t seqlen() const { return x.size(2); }
  int64_t width() const { return weight.size(1); }

  // x~[b,d,s], s >= -(W-1)
  double input(int64_t b, int64_t d, int64_t s) const {
    if (s >= 0) return x.get(b, d, s);
    return initial_states.given() ? initial_states.get(b, d, width() - 1 + s) : 0;
  }
  bool padding(int64_t b, int64_t t) const { return seq_idx.given() && seq_idx.get(b, t) < 0; }
  bool counts(int64_t b, int64_t s, int64_t t) const {
    return !padding(b, t) &&
           (!seq_idx.given() || seq_idx.get(b, std::max<int64_t>(s, 0)) == seq_idx.get(b, t));
  }
  // The position of the input that final_states[b,:,j] is, or none (-width()), where it is 0.
  int64_t state_position(int64_t b, int64_t j) const {
    int64_t end = seqlen();
    while (end > 0 && padding(b, end - 1)) --end;
    const int64_t s = end - (width() - 1) + j;
    const bool counts = end == 0 || !padding(b, std::max<int64_t>(s, 0));
    return counts ? s : -width();
  }
  double before_activation(int64_t b, int64_t d, int64_t t) const {
    double z = bias.given() ? bias.get(d) : 0;
    for (int64_t k = 0; k < width(); ++k) {
      const int64_t s = t - (width() - 1) + k;
      if (counts(b, s, t)) z += weight.get(d, k) * input(b, d, s);
    }
    return z;
  }
};

struct ForwardValues {
  Values out, final_states;
};

inline ForwardValues reference_forward(const Problem& p) {
  const int64_t states = p.width() - 1;
  ForwardValues r{{p.batch(), p.dim(), p.seqlen()}, {p.batch(), p.dim(), states}};
  for (int64_t b = 0; b < p.batch(); ++b) {
    for (int64_t d = 0; d < p.dim(); ++d) {
      for (int64_t t = 0; t < p.seqlen(); ++t) {
        const double z = p.before_activation(b, d, t);
        const double y = p.silu ? z / (1 + std::exp(-z)) : z;
        r.out(b, d, t) = p.padding(b, t) ? 0 : y;
      }
      for (int64_t j = 0; j < states; ++j) {
        const int64_t s = p.state_position(b, j);
        if (s >= -states) r.final_states(b, d, j) = p.input(b, d, s);
      }
    }
  }
  return r;
}

struct BackwardValues {
  Values dx, dweight, dbias, dinitial_states;
};

inline BackwardValues reference_backward(const Problem& p) {
  const int64_t states = p.width() - 1;
  BackwardValues r{{p.batch(), p.dim(), p.seqlen()},
                   {1, p.dim(), p.width()},
                   {1, p.dim(), 1},
                   {p.batch(), p.dim(), states}};
  const auto to_input = [&](int64_t b, int64_t d, int64_t s) -> double& {
    return s >= 0 ? r.dx(b, d, s) : r.dinitial_states(b, d, states + s);
  };
  for (int64_t b = 0; b < p.batch(); ++b) {
    for (int64_t d = 0; d < p.dim(); ++d) {
      for (int64_t t = 0; t < p.seqlen(); ++t) {
        if (p.padding(b, t)) continue;
        double dz = p.dout.get(b, d, t);
        if (p.silu) {
          const double z = p.before_activation(b, d, t), sigmoid = 1 / (1 + std::exp(-z));
          dz *= sigmoid * (1 + z * (1 - sigmoid));
        }
        r.dbias(0, d, 0) += dz;
        for (int64_t k = 0; k < p.width(); ++k) {
          const int64_t s = t - states + k;
          if (!p.counts(b, s, t)) continue;
          r.dweight(0, d, k) += dz * p.input(b, d, s);
          to_input(b, d, s) += dz * p.weight.get(d, k);
        }
      }
      for (int64_t j = 0; p.dfinal_states.given() && j < states; ++j) {
        const int64_t s = p.state_position(b, j);
        if (s >= -states) to_input(b, d, s) += p.dfinal_states.get(b, d, j);
      }
    }
  }
  return r;
}

// |got - want| / |want| in the 2-norm.
inline double relative_error(const std::vector<double>& got, const std::vector<double>& want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  if (norm == 0) return difference == 0 ? 0 : INFINITY;
  return std::sqrt(difference / norm);
}

// What relative_error may be for results of x's dtype; one rounding for the 16-bit types. In a few
// elements roundings do not average out.
inline double tolerance(int32_t dtype, size_t elements) {
  const double few = elements < 256 ? 2 : 1;
  switch (dtype) {
    case CAUSAL_CONV1D_FLOAT16: return few * 3e-4;
    case CAUSAL_CONV1D_BFLOAT16: return few * 2e-3;
    case CAUSAL_CONV1D_FLOAT64: return 1e-12;
    default: return few * 5e-7;
  }
}

// The same for dweight and dbias in float32 (float64): sums over batch and time.
inline double parameter_tolerance(int32_t x_dtype) {
  if (x_dtype == CAUSAL_CONV1D_FLOAT64) return 1e-12;
  return is_16_bit(x_dtype) ? 1e-5 : 2e-6;
}

#define EXPECT_CLOSE(array, want, dtype) \
  EXPECT_LE(relative_error((array).values(), (want).data), tolerance(dtype, (want).data.size()))
#define EXPECT_SUMS_CLOSE(array, want, dtype) \
  EXPECT_LE(relative_error((array).values(), (want).data), parameter_tolerance(dtype))

struct Options {
  int32_t dtype = CAUSAL_CONV1D_FLOAT32;
  int32_t parameter_dtype = CAUSAL_CONV1D_FLOAT32;
  int32_t index_dtype = CAUSAL_CONV1D_INT32;
  Layout layout = Layout::kChannelFirst;
  int64_t batch = 2, dim = 19, seqlen = 53, width = 4;
  bool bias = true, silu = true, states = false, seq_idx = false;
};

inline Problem make_problem(const Options& o) {
  std::mt19937 random(7);
  Problem p;
  const Sizes x{o.batch, o.dim, o.seqlen}, states{o.batch, o.dim, o.width - 1};
  p.silu = o.silu;
  p.x = std::move(Array(o.dtype, x, o.layout).fill_normal(random));
  p.weight = std::move(Array(o.parameter_dtype, {o.dim, o.width}).fill_normal(random));
  p.dout = std::move(Array(o.dtype, x, o.layout).fill_normal(random));
  if (o.bias) p.bias = std::move(Array(o.parameter_dtype, {o.dim}).fill_normal(random));
  if (o.states) {
    p.initial_states = std::move(Array(o.dtype, states, o.layout).fill_normal(random));
    p.dfinal_states = std::move(Array(o.dtype, states, o.layout).fill_normal(random));
  }
  if (o.seq_idx) {  // segments of 1 to 12, some of them padding; the last row ends with padding
    p.seq_idx = Array(o.index_dtype, {o.batch, o.seqlen});
    for (int64_t b = 0; b < o.batch; ++b) {
      for (int64_t t = 0, id = 0, left = 0; t < o.seqlen; ++t) {
        if (left-- == 0) {
          id = static_cast<int64_t>(random() % 4) == 0 ? -1 : id + 2;
          left = static_cast<int64_t>(random() % 12);
        }
        const bool ends = b == o.batch - 1 && t > o.seqlen / 2;
        p.seq_idx.set(static_cast<double>(ends ? -2 : id), b, t);
      }
    }
  }
  return p;
}

// Every case that a backend's forward and backward are compared in.
inline std::vector<Options> cases() {
  const int32_t f32 = CAUSAL_CONV1D_FLOAT32, f16 = CAUSAL_CONV1D_FLOAT16;
  const int32_t bf16 = CAUSAL_CONV1D_BFLOAT16, f64 = CAUSAL_CONV1D_FLOAT64;
  std::vector<Options> all;
  for (auto [dtype, parameter] : {std::array{f32, f32}, {f16, f32}, {bf16, bf16}, {f64, f64}}) {
    for (Layout layout : {Layout::kChannelFirst, Layout::kChannelLast, Layout::kStrided}) {
      for (int64_t width : {1, 2, 4, 7, 11}) {
        Options o;
        o.dtype = dtype;
        o.parameter_dtype = parameter;
        o.layout = layout;
        o.width = width;
        all.push_back(o);
        o.silu = o.bias = false;
        o.states = true;
        all.push_back(o);
        o.silu = o.bias = o.seq_idx = true;
        all.push_back(o);
        o.batch = 1;
        o.dim = 130;
        o.seqlen = 2;  // shorter than the state
        all.push_back(o);
      }
    }
    Options large;  // several units of work, a tail everywhere
    large.dtype = dtype;
    large.parameter_dtype = parameter;
    large.batch = 1;
    large.dim = 67;
    large.seqlen = 2051;
    all.push_back(large);
    large.layout = Layout::kChannelLast;
    all.push_back(large);
  }
  return all;
}

// ------------------------------------------------------------------- a call's outputs and
// parameters

#define ASSERT_OK(status)                                         \
  do {                                                            \
    const causal_conv1d_status status_ = (status);                \
    ASSERT_EQ(status_.code, CAUSAL_CONV1D_OK) << status_.message; \
    ASSERT_STREQ(status_.message, "");                            \
  } while (0)

inline std::string describe(const Options& o) {
  return "dtype " + std::to_string(o.dtype) + ", parameters " + std::to_string(o.parameter_dtype) +
         ", layout " + std::to_string(static_cast<int>(o.layout)) + ", (" +
         std::to_string(o.batch) + ", " + std::to_string(o.dim) + ", " + std::to_string(o.seqlen) +
         "), width " + std::to_string(o.width) + (o.bias ? ", bias" : "") +
         (o.silu ? ", silu" : "") + (o.states ? ", states" : "") + (o.seq_idx ? ", seq_idx" : "");
}

struct Forward {
  Array out, final_states;
  causal_conv1d_forward_params params{};

  explicit Forward(Problem& p, Layout layout = Layout::kChannelFirst)
      : out(p.x.view.dtype, {p.batch(), p.dim(), p.seqlen()}, layout),
        final_states(p.x.view.dtype, {p.batch(), p.dim(), p.width() - 1}, layout) {
    params.x = p.x.tensor();
    params.weight = p.weight.tensor();
    params.bias = p.bias.tensor();
    params.seq_idx = p.seq_idx.tensor();
    params.initial_states = p.initial_states.tensor();
    params.out = out.tensor();
    params.final_states_out = final_states.tensor();
    params.silu = p.silu;
  }
};

struct Backward {
  Array dx, dweight, dbias, dinitial_states;
  causal_conv1d_backward_params params{};

  explicit Backward(Problem& p, Layout layout = Layout::kChannelFirst) {
    const int32_t dtype = p.x.view.dtype;
    const int32_t sum = dtype == CAUSAL_CONV1D_FLOAT64 ? dtype : CAUSAL_CONV1D_FLOAT32;
    dx = Array(dtype, {p.batch(), p.dim(), p.seqlen()}, layout);
    dweight = Array(sum, {p.dim(), p.width()});
    if (p.bias.given()) dbias = Array(sum, {p.dim()});
    if (p.initial_states.given()) {
      dinitial_states = Array(dtype, {p.batch(), p.dim(), p.width() - 1}, layout);
    }
    params.x = p.x.tensor();
    params.weight = p.weight.tensor();
    params.bias = p.bias.tensor();
    params.dout = p.dout.tensor();
    params.seq_idx = p.seq_idx.tensor();
    params.initial_states = p.initial_states.tensor();
    params.dfinal_states = p.dfinal_states.tensor();
    params.dx = dx.tensor();
    params.dweight = dweight.tensor();
    params.dbias = dbias.tensor();
    params.dinitial_states = dinitial_states.tensor();
    params.silu = p.silu;
  }
};

// Memory between and around a strided tensor's elements still holds its first bytes.
inline void expect_untouched_around(Array& a) {
  a.for_each([&](int64_t i, int64_t j, int64_t k) {
    std::memset(a.memory.data() + a.position(i, j, k), 0x7f,
                static_cast<size_t>(element_size(a.view.dtype)));
  });
  EXPECT_EQ(std::count(a.memory.begin(), a.memory.end(), 0x7f),
            static_cast<std::ptrdiff_t>(a.memory.size()));
}

struct Update {
  Array x, state, weight, bias, out, cache_seqlens, indices;
  causal_conv1d_update_params params{};

  Update(Problem& p, int64_t tokens, int64_t rows, int64_t state_len, bool ring, bool indexed) {
    std::mt19937 random(11);
    const int32_t dtype = p.x.view.dtype;
    x = Array(dtype, {p.batch(), p.dim(), tokens}, Layout::kChannelLast);
    state = std::move(Array(dtype, {rows, p.dim(), state_len}).fill_normal(random));
    out = Array(dtype, {p.batch(), p.dim(), tokens}, Layout::kChannelLast);
    if (ring) cache_seqlens = Array(CAUSAL_CONV1D_INT32, {p.batch()});
    if (indexed) indices = Array(CAUSAL_CONV1D_INT32, {p.batch()});
    for (int64_t b = 0; b < p.batch(); ++b) {
      if (ring) cache_seqlens.set(static_cast<double>(5 * b), b);
      if (indexed) indices.set(static_cast<double>(rows - 1 - b), b);
    }
    params.x = x.tensor();
    params.conv_state = state.tensor();
    params.weight = p.weight.tensor();
    params.bias = p.bias.tensor();
    params.out = out.tensor();
    params.cache_seqlens = cache_seqlens.tensor();
    params.conv_state_indices = indices.tensor();
    params.silu = p.silu;
  }
  int64_t row(int64_t b) const {
    return indices.given() ? static_cast<int64_t>(indices.get(b)) : b;
  }
  int64_t start(int64_t b) const {
    return cache_seqlens.given() ? static_cast<int64_t>(cache_seqlens.get(b)) % state.size(2) : 0;
  }
};

}  // namespace test
