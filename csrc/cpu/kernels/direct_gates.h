// The gates and the residual in the direct kernels: passes over a run that is in the L1 cache,
// before and after those of the convolution, so that the convolution has no variants for them.
#pragma once

#include <stdint.h>

#include "../simd/groups.h"
#include "direct_run.h"
#include "silu.h"

namespace causal_conv1d {
namespace {

// Rows of whole groups in memory, `stride` elements apart; without data not given.
template <class T>
struct Groups {
  T* data;
  int64_t stride;

  CAUSAL_CONV1D_INLINE Groups at(int64_t column) const {
    return {data == nullptr ? nullptr : data + column, stride};
  }
  CAUSAL_CONV1D_INLINE T* group(int64_t r, int64_t g) const {
    return data + r * stride + g * kGroup;
  }
};

// What a forward reads and writes of some rows of groups.
template <class T>
struct ForwardGroups {
  Groups<const T> x, pre_gate, post_gate, residual;
  Groups<T> out;
  Groups<const T> before = {nullptr, 0};  // of joined sequences

  CAUSAL_CONV1D_INLINE ForwardGroups at(int64_t column) const {
    return {x.at(column),        pre_gate.at(column), post_gate.at(column),
            residual.at(column), out.at(column),      before.at(column)};
  }
};

// What a backward reads and writes where it has x and dout.
template <class T>
struct GradientGroups {
  Groups<const T> x, pre_gate, dout, post_gate;
  Groups<T> dpost_gate;
  Groups<const T> before = {nullptr, 0};  // of joined sequences

  CAUSAL_CONV1D_INLINE GradientGroups at(int64_t column) const {
    return {x.at(column),         pre_gate.at(column),   dout.at(column),
            post_gate.at(column), dpost_gate.at(column), before.at(column)};
  }
};

// The same where it has dx. dout is given if the residual is x.
template <class T>
struct DxGroups {
  Groups<T> dx;
  Groups<const T> x, pre_gate, dout;
  Groups<T> dpre_gate;
  Groups<const T> behind = {nullptr, 0};  // of joined sequences

  CAUSAL_CONV1D_INLINE DxGroups at(int64_t column) const {
    return {dx.at(column),   x.at(column),         pre_gate.at(column),
            dout.at(column), dpre_gate.at(column), behind.at(column)};
  }
  CAUSAL_CONV1D_INLINE bool is_gated() const {
    return pre_gate.data != nullptr || dout.data != nullptr;
  }
};

// Rows x groups of x times its gate, rounded to T, to rows of `groups` groups, which may be x.
template <class T>
void multiply_groups(Groups<const T> x, Groups<const T> gate, int64_t rows, int64_t groups,
                     Ahead<T> gate_ahead, T* products) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g) {
      gate_ahead.fetch(r, g);
      const Vec product = mul(load_group(x.group(r, g)), load_group(gate.group(r, g)));
      store_group(product, false, products + (r * groups + g) * kGroup);
    }
  }
}

// What comes out of the sums of rows x groups with a gate or a residual; see store_sums_as.
template <class T, bool kSilu>
void store_gated_as(Run* run, int64_t rows, int64_t groups, const ForwardGroups<T>& at,
                    Ahead<T> x_ahead, Ahead<T> gate_ahead, Ahead<T> residual_ahead, bool stream) {
  int64_t i = 0;
  for (int64_t r = 0; kSilu && r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g, i += kGroup) {
      x_ahead.fetch(r, g);
      begin_silu<kShortSilu<T>>(Vec::load(run->sums + i)).store(run->parts + i);
    }
  }
  i = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g, i += kGroup) {
      if (!kSilu) x_ahead.fetch(r, g);
      Vec a = Vec::load(run->sums + i);
      if (kSilu) a = end_silu<kShortSilu<T>>(a, Vec::load(run->parts + i));
      if (at.residual.data != nullptr) {
        residual_ahead.fetch(r, g);
        const Vec residual = load_group(at.residual.group(r, g));
        if (at.post_gate.data != nullptr) {
          gate_ahead.fetch(r, g);
          a = fma(a, load_group(at.post_gate.group(r, g)), residual);
        } else {
          a = add(a, residual);
        }
      } else {
        gate_ahead.fetch(r, g);
        a = mul(a, load_group(at.post_gate.group(r, g)));
      }
      store_group(a, stream, at.out.group(r, g));
    }
  }
}

// The sums become dz = dout * post_gate * silu'(sum), and dpost_gate = dout * silu(sum) is stored
// if it is given.
template <class T, bool kSilu>
void to_gated_gradients_as(Run* run, int64_t rows, int64_t groups, const GradientGroups<T>& at,
                           Ahead<T> x_ahead, Ahead<T> dout_ahead, Ahead<T> gate_ahead,
                           bool stream) {
  int64_t i = 0;
  for (int64_t r = 0; kSilu && r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g, i += kGroup) {
      x_ahead.fetch(r, g);
      begin_derivative<kShortSilu<T>>(Vec::load(run->sums + i)).store(run->parts + i);
    }
  }
  i = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g, i += kGroup) {
      if (!kSilu) x_ahead.fetch(r, g);
      dout_ahead.fetch(r, g);
      gate_ahead.fetch(r, g);
      const Vec dout = load_group(at.dout.group(r, g));
      Vec value = Vec::load(run->sums + i), dz = mul(dout, load_group(at.post_gate.group(r, g)));
      if (kSilu) {
        const auto silu = end_silu_and_derivative<kShortSilu<T>>(value, Vec::load(run->parts + i));
        value = silu.value;
        dz = mul(dz, silu.derivative);
      }
      if (at.dpost_gate.data != nullptr) {
        store_group(mul(dout, value), stream, at.dpost_gate.group(r, g));
      }
      dz.store(run->sums + i);
    }
  }
}

// dx and dpre_gate of rows x groups whose gradients of the gated x are in `from`.
template <class T>
void finish_dx(const float* from, int64_t rows, int64_t groups, const DxGroups<T>& at,
               bool stream) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g, from += kGroup) {
      const Vec gradient = Vec::load(from);
      Vec dx = gradient;
      if (at.pre_gate.data == nullptr) {
        if (at.dout.data != nullptr) dx = add(gradient, load_group(at.dout.group(r, g)));
      } else {
        const Vec gate = load_group(at.pre_gate.group(r, g));
        dx = at.dout.data == nullptr ? mul(gradient, gate)
                                     : fma(gradient, gate, load_group(at.dout.group(r, g)));
        if (at.dpre_gate.data != nullptr) {
          store_group(mul(gradient, load_group(at.x.group(r, g))), stream,
                      at.dpre_gate.group(r, g));
        }
      }
      store_group(dx, stream, at.dx.group(r, g));
    }
  }
}

template <class T>
CAUSAL_CONV1D_INLINE void store_gated(Run* run, int64_t rows, int64_t groups,
                                      const ForwardGroups<T>& at, Ahead<T> x_ahead,
                                      Ahead<T> gate_ahead, Ahead<T> residual_ahead, bool with_silu,
                                      bool stream) {
  (with_silu ? store_gated_as<T, true> : store_gated_as<T, false>)(run, rows, groups, at, x_ahead,
                                                                   gate_ahead, residual_ahead,
                                                                   stream);
}

template <class T>
CAUSAL_CONV1D_INLINE void to_gated_gradients(Run* run, int64_t rows, int64_t groups,
                                             const GradientGroups<T>& at, Ahead<T> x_ahead,
                                             Ahead<T> dout_ahead, Ahead<T> gate_ahead,
                                             bool with_silu, bool stream) {
  (with_silu ? to_gated_gradients_as<T, true>
             : to_gated_gradients_as<T, false>)(run, rows, groups, at, x_ahead, dout_ahead,
                                                gate_ahead, stream);
}

}  // namespace
}  // namespace causal_conv1d
