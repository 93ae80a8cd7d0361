// The CPU's selective scan, by each instruction set that this machine has, against the formulas in
// double precision. All memory is as large as the tensors in it, for AddressSanitizer.
#include <cpu/dispatch.h>
#include <gtest/gtest.h>
#include <selective_scan.h>

#include "reference.h"

namespace test {
namespace {

using Tensor4 = causal_conv1d_tensor4;

struct Sizing {
  int32_t dtype;
  Layout layout;
  int64_t batch, dim, seqlen, dstate, groups;
  bool constant_B, constant_C, options;
};

// A tensor, and its values in the order of the indices.
struct Array4 {
  std::vector<char> memory;
  std::vector<double> values;
  Tensor4 t{};

  // kChannelLast: the last dimension is the slowest; kStrided: elements are two apart, backwards.
  void make(int32_t dtype, const Sizes& sizes, Layout layout) {
    t.ndim = static_cast<int32_t>(sizes.size());
    t.dtype = dtype;
    int64_t count = layout == Layout::kStrided ? 2 : 1;
    for (int i = 0; i < t.ndim; ++i) {
      const int d = layout == Layout::kChannelLast ? i : t.ndim - 1 - i;
      t.sizes[d] = sizes[static_cast<size_t>(d)];
      t.strides[d] = count;
      count *= t.sizes[d];
    }
    memory.assign(static_cast<size_t>(count * element_size(dtype)), 0x7f);
    t.data = memory.data();
    if (layout == Layout::kStrided && count > 0) {
      t.data = memory.data() + (count - 1) * element_size(dtype);
      for (int i = 0; i < t.ndim; ++i) t.strides[i] *= -1;
    }
  }

  template <class F>
  void for_each(F f) {
    int64_t count = 1;
    for (int i = 0; i < t.ndim; ++i) count *= t.sizes[i];
    for (int64_t i = 0; i < count; ++i) {
      int64_t rest = i, at = 0;
      for (int d = t.ndim - 1; d >= 0; rest /= t.sizes[d--]) at += rest % t.sizes[d] * t.strides[d];
      f(i, static_cast<char*>(t.data) + at * element_size(t.dtype));
    }
    values.resize(static_cast<size_t>(count));
  }
  void fill(std::mt19937& random, double scale, double shift) {
    std::normal_distribution<double> normal;
    for_each([](int64_t, char*) {});
    for_each([&](int64_t i, char* p) {
      store(p, t.dtype, normal(random) * scale + shift);
      values[static_cast<size_t>(i)] = load(p, t.dtype);
    });
  }
  std::vector<double> read() {
    for_each([](int64_t, char*) {});
    for_each([&](int64_t i, char* p) { values[static_cast<size_t>(i)] = load(p, t.dtype); });
    return values;
  }
};

struct Scan {
  Sizing s;
  std::mt19937 random{3};
  Array4 u, delta, A, B, C, D, z, bias, initial, dout, dlast;
  Array4 out, last, du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial;
  std::vector<double> want_out, want_last;
  std::vector<double> want_du, want_ddelta, want_dA, want_dB, want_dC, want_dD, want_dz, want_dbias,
      want_dinitial;

  explicit Scan(const Sizing& sizing) : s(sizing) {
    const Sizes row{s.batch, s.dim, s.seqlen}, states{s.batch, s.dim, s.dstate};
    const Sizes constant{s.dim, s.dstate}, varying{s.batch, s.groups, s.dstate, s.seqlen};
    const auto both = [&](Array4& x, Array4& dx, const Sizes& sizes, double scale, double shift) {
      x.make(s.dtype, sizes, s.layout);
      x.fill(random, scale, shift);
      dx.make(s.dtype, sizes, s.layout);
    };
    both(u, du, row, 1, 0);
    both(delta, ddelta, row, 0.5, 0.2);
    both(A, dA, constant, 0.2, -0.7);
    both(B, dB, s.constant_B ? constant : varying, 1, 0);
    both(C, dC, s.constant_C ? constant : varying, 1, 0);
    both(dout, out, row, 1, 0);
    both(dlast, last, states, 1, 0);
    if (!s.options) return;
    both(z, dz, row, 1, 0);
    both(D, dD, {s.dim}, 1, 0);
    both(bias, dbias, {s.dim}, 1, -1);
    both(initial, dinitial, states, 1, 0);
  }

  causal_conv1d_scan_inputs inputs() const {
    causal_conv1d_scan_inputs in{};
    in.u = u.t;
    in.delta = delta.t;
    in.A = A.t;
    in.B = B.t;
    in.C = C.t;
    in.D = D.t;
    in.z = z.t;
    in.delta_bias = bias.t;
    in.initial_states = initial.t;
    in.delta_softplus = s.options;
    return in;
  }

  size_t row_at(int64_t b, int64_t d, int64_t t) const {
    return static_cast<size_t>((b * s.dim + d) * s.seqlen + t);
  }
  size_t state_at(int64_t b, int64_t d, int64_t n) const {
    return static_cast<size_t>((b * s.dim + d) * s.dstate + n);
  }
  size_t projection_at(bool constant, int64_t b, int64_t d, int64_t n, int64_t t) const {
    const int64_t g = d / (s.dim / s.groups);
    return constant ? state_at(0, d, n)
                    : static_cast<size_t>(((b * s.groups + g) * s.dstate + n) * s.seqlen + t);
  }

  void reference() {
    want_out.assign(u.values.size(), 0);
    want_last.assign(dlast.values.size(), 0);
    want_du = want_ddelta = want_dz = want_out;
    want_dinitial = want_last;
    want_dA.assign(A.values.size(), 0);
    want_dB.assign(B.values.size(), 0);
    want_dC.assign(C.values.size(), 0);
    want_dD.assign(static_cast<size_t>(s.dim), 0);
    want_dbias = want_dD;
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t d = 0; d < s.dim; ++d) reference_row(b, d);
    }
  }

  void reference_row(int64_t b, int64_t d) {
    const size_t L = static_cast<size_t>(s.seqlen), channel = static_cast<size_t>(d);
    std::vector<double> dt(L), y(L, 0), slope(L, 1), dy(L), q(L, 0), r(L, 0);
    for (size_t t = 0; t < L; ++t) {
      const size_t at = row_at(b, d, static_cast<int64_t>(t));
      const double raw = delta.values[at] + (s.options ? bias.values[channel] : 0);
      dt[t] = s.options ? std::log1p(std::exp(raw)) : raw;
      if (s.options) slope[t] = 1 / (1 + std::exp(-raw));
      const double x = s.options ? z.values[at] : 0, sigmoid = 1 / (1 + std::exp(-x));
      dy[t] = dout.values[at] * (s.options ? x * sigmoid : 1);
      y[t] = s.options ? D.values[channel] * u.values[at] : 0;
    }
    for (int64_t n = 0; n < s.dstate; ++n) {
      const size_t of_state = state_at(b, d, n), of_A = state_at(0, d, n);
      std::vector<double> h(L + 1);
      h[0] = s.options ? initial.values[of_state] : 0;
      for (size_t t = 0; t < L; ++t) {
        const int64_t i = static_cast<int64_t>(t);
        const double b_t = B.values[projection_at(s.constant_B, b, d, n, i)];
        h[t + 1] =
            std::exp(dt[t] * A.values[of_A]) * h[t] + dt[t] * b_t * u.values[row_at(b, d, i)];
        y[t] += C.values[projection_at(s.constant_C, b, d, n, i)] * h[t + 1];
      }
      want_last[of_state] = h[L];
      double g = dlast.values[of_state];
      for (size_t t = L; t-- > 0;) {
        const int64_t i = static_cast<int64_t>(t);
        const size_t at_B = projection_at(s.constant_B, b, d, n, i);
        const size_t at_C = projection_at(s.constant_C, b, d, n, i);
        want_dC[at_C] += dy[t] * h[t + 1];
        g += dy[t] * C.values[at_C];
        want_dB[at_B] += g * dt[t] * u.values[row_at(b, d, i)];
        q[t] += g * B.values[at_B];
        g *= std::exp(dt[t] * A.values[of_A]);
        want_dA[of_A] += g * h[t] * dt[t];
        r[t] += g * h[t] * A.values[of_A];
      }
      want_dinitial[of_state] = g;
    }
    for (size_t t = 0; t < L; ++t) {
      const size_t at = row_at(b, d, static_cast<int64_t>(t));
      const double x = s.options ? z.values[at] : 0, sigmoid = 1 / (1 + std::exp(-x));
      want_out[at] = y[t] * (s.options ? x * sigmoid : 1);
      want_dz[at] = dout.values[at] * y[t] * sigmoid * (1 + x * (1 - sigmoid));
      want_du[at] = q[t] * dt[t] + (s.options ? D.values[channel] * dy[t] : 0);
      want_ddelta[at] = (r[t] + q[t] * u.values[at]) * slope[t];
      want_dD[channel] += dy[t] * u.values[at];
      want_dbias[channel] += want_ddelta[at];
    }
  }
};

std::vector<Sizing> sizings() {
  std::vector<Sizing> all;
  const int32_t f32 = CAUSAL_CONV1D_FLOAT32, f64 = CAUSAL_CONV1D_FLOAT64;
  for (Layout layout : {Layout::kChannelFirst, Layout::kChannelLast, Layout::kStrided}) {
    for (int32_t dtype : {f32, f64, static_cast<int32_t>(CAUSAL_CONV1D_BFLOAT16),
                          static_cast<int32_t>(CAUSAL_CONV1D_FLOAT16)}) {
      all.push_back({dtype, layout, 2, 18, 37, 5, 2, false, false, true});
      all.push_back({dtype, layout, 1, 35, 67, 16, 1, false, false, false});
    }
    all.push_back({f32, layout, 1, 19, 20, 6, 1, true, false, true});
    all.push_back({f32, layout, 2, 6, 20, 3, 3, false, true, true});
    all.push_back({f32, layout, 2, 17, 9, 1, 1, true, true, false});
    all.push_back({f32, layout, 2, 3, 150, 256, 1, false, false, true});
    all.push_back({f32, layout, 2, 7, 0, 4, 1, false, false, true});
  }
  return all;
}

TEST(Scan, MatchesTheFormulas) {
  const causal_conv1d::KernelTable* const best = causal_conv1d::active_kernels;
  for (const Sizing& sizing : sizings()) {
    Scan x(sizing);
    x.reference();
    for (auto k = causal_conv1d::runnable_kernels(); *k != nullptr; ++k) {
      SCOPED_TRACE(testing::Message() << (*k)->name << ", dtype " << sizing.dtype << ", layout "
                                      << static_cast<int>(sizing.layout) << ", dstate "
                                      << sizing.dstate << ", seqlen " << sizing.seqlen);
      causal_conv1d::active_kernels = *k;
      causal_conv1d_scan_forward_params f{};
      f.inputs = x.inputs();
      f.out = x.out.t;
      f.last_states = x.last.t;
      ASSERT_OK(causal_conv1d_cpu_scan_forward(&f, 2));
      const auto close = [&](Array4& got, const std::vector<double>& want) {
        if (got.t.ndim == 0) return;
        const double sums = sizing.dtype == CAUSAL_CONV1D_FLOAT32 ? 4 : 1;
        EXPECT_LE(relative_error(got.read(), want), sums * tolerance(sizing.dtype, want.size()));
      };
      close(x.out, x.want_out);
      close(x.last, x.want_last);
      causal_conv1d_scan_backward_params p{};
      p.inputs = x.inputs();
      p.dout = x.dout.t;
      p.dlast_states = x.dlast.t;
      p.du = x.du.t;
      p.ddelta = x.ddelta.t;
      p.dA = x.dA.t;
      p.dB = x.dB.t;
      p.dC = x.dC.t;
      p.dD = x.dD.t;
      p.dz = x.dz.t;
      p.ddelta_bias = x.dbias.t;
      p.dinitial_states = x.dinitial.t;
      ASSERT_OK(causal_conv1d_cpu_scan_backward(&p, 2));
      close(x.du, x.want_du);
      close(x.ddelta, x.want_ddelta);
      close(x.dA, x.want_dA);
      close(x.dB, x.want_dB);
      close(x.dC, x.want_dC);
      close(x.dD, x.want_dD);
      close(x.dz, x.want_dz);
      close(x.dbias, x.want_dbias);
      close(x.dinitial, x.want_dinitial);
    }
    causal_conv1d::active_kernels = best;
  }
}

// A token of a scan of one step, whose dim is the update's.
TEST(StateUpdate, IsAScanOfOneStep) {
  const causal_conv1d::KernelTable* const best = causal_conv1d::active_kernels;
  for (auto k = causal_conv1d::runnable_kernels(); *k != nullptr; ++k) {
    causal_conv1d::active_kernels = *k;
    for (int64_t dstate : {1, 3, 16, 67}) {
      for (Layout layout : {Layout::kChannelFirst, Layout::kChannelLast, Layout::kStrided}) {
        SCOPED_TRACE(testing::Message() << (*k)->name << ' ' << dstate);
        Scan x({CAUSAL_CONV1D_FLOAT32, layout, 3, 70, 1, dstate, 1, false, false, true});
        x.reference();
        const auto with_head = [](Tensor4 t, int32_t ndim, int at) {  // a dimension of 1 there
          for (int i = ndim - 1; i > at; --i) {
            t.sizes[i] = t.sizes[i - 1];
            t.strides[i] = t.strides[i - 1];
          }
          t.sizes[at] = 1;
          t.ndim = ndim;
          return t;
        };
        causal_conv1d_state_update_params p{};
        p.state = with_head(x.initial.t, 4, 1);
        p.x = with_head(x.u.t, 3, 1);
        p.dt = with_head(x.delta.t, 3, 1);
        p.z = with_head(x.z.t, 3, 1);
        p.out = with_head(x.out.t, 3, 1);
        p.A = with_head(x.A.t, 3, 0);
        p.D = with_head(x.D.t, 2, 0);
        p.dt_bias = with_head(x.bias.t, 2, 0);
        p.B = x.B.t;
        p.C = x.C.t;
        p.B.ndim = p.C.ndim = 3;
        p.dt_softplus = 1;
        ASSERT_OK(causal_conv1d_cpu_state_update(&p, 2));
        EXPECT_LE(relative_error(x.out.read(), x.want_out), 1e-6);
        EXPECT_LE(relative_error(x.initial.read(), x.want_last), 1e-6);
      }
    }
  }
  causal_conv1d::active_kernels = best;
}

}  // namespace
}  // namespace test
