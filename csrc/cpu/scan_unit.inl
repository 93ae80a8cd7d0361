// What forward and backward share: a unit's channels in scratch memory, the inputs of a tile, and
// the recurrence itself.
#pragma once

#include "scan_tile.inl"

namespace causal_conv1d {
namespace {

// B or C of a tile. Either one value for all channels, [step][plan.row]; or vectors
// [step][dstate][lane], the same at each step (step 0) if it is constant in time.
template <class V, bool kVectors>
struct Projection {
  using S = typename V::Scalar;
  S* data;
  int64_t step;

  CAUSAL_CONV1D_INLINE V at(int64_t t, int64_t n) const {
    return kVectors ? V::load(data + t * step + n * V::kLanes) : V::set(data[t * step + n]);
  }
  CAUSAL_CONV1D_INLINE S* to(int64_t t, int64_t n) const { return data + t * step + n * V::kLanes; }
};

// Scratch of a unit. One without memory only counts.
template <class V>
struct Buffers {
  using S = typename V::Scalar;
  static constexpr int64_t L = V::kLanes;

  S *rates, *h;                // [vector][dstate][lane]; h: states
  S *D, *bias;                 // [vector][lane]
  S *constant_B, *constant_C;  // [vector][dstate][lane]
  S *B, *C;                    // [step][plan.row]
  S *wide_B, *wide_C;          // [step][dstate][lane], where the other one is constant
  S *u, *raw, *dt, *dtu, *y;   // [step][lane]; raw: dt before softplus

  Buffers(const ScanPlan& plan, Scratch* scratch) {
    const int64_t states = plan.vectors * plan.dstate * L;
    const bool wide = plan.constant_B || plan.constant_C;
    scratch->take(states, &rates, &h);
    scratch->take(plan.vectors * L, &D, &bias);
    constant_B = scratch->take<S>(plan.constant_B ? states : 0);
    constant_C = scratch->take<S>(plan.constant_C ? states : 0);
    B = scratch->take<S>(plan.constant_B ? 0 : plan.tile * plan.row);
    C = scratch->take<S>(plan.constant_C ? 0 : plan.tile * plan.row);
    const int64_t wide_tile = plan.tile * plan.dstate * L;
    wide_B = scratch->take<S>(wide && !plan.constant_B ? wide_tile : 0);
    wide_C = scratch->take<S>(wide && !plan.constant_C ? wide_tile : 0);
    scratch->take(plan.tile * L, &u, &raw, &dt, &dtu, &y);
  }
};

// Channels of a group in a segment.
template <class V>
struct Unit {
  using S = typename V::Scalar;
  static constexpr int64_t L = V::kLanes;

  const ScanInputs& in;
  const ScanPlan& plan;
  const ScanSegment& segment;
  const int64_t group, first, channels, vectors;
  Buffers<V> s;

  Unit(const ScanInputs& inputs, const ScanPlan& p, const ScanSegment& where, int64_t g,
       int64_t block, Scratch* scratch)
      : in(inputs),
        plan(p),
        segment(where),
        group(g),
        first(g * p.group_dim + block * p.block),
        channels(smaller(p.block, p.group_dim - block * p.block)),
        vectors((channels + L - 1) / L),
        s(p, scratch) {}

  int64_t channel_of(int64_t v) const { return first + v * L; }
  int64_t channels_of(int64_t v) const { return smaller(L, channels - v * L); }
  int64_t values() const { return plan.dstate * L; }  // of a vector's states

  void load_matrix(const Tensor4& t, int64_t v, S* out) const {
    Tiles<V>::load(matrix(t, channel_of(v)), channels_of(v), plan.dstate, out);
  }
  void load_column(const Tensor4& t, int64_t v, S* out) const {
    if (!is_given(t)) return V::set(0).store(out);
    Tiles<V>::load(column(t, channel_of(v)), channels_of(v), 1, out);
  }

  // All that does not change in time, but h.
  void load_parameters() const {
    for (int64_t v = 0; v < vectors; ++v) {
      S* const rate = s.rates + v * values();
      load_matrix(in.A, v, rate);
      for (int64_t i = 0; i < values(); ++i) rate[i] = decay_rate(rate[i]);
      load_column(in.D, v, s.D + v * L);
      load_column(in.delta_bias, v, s.bias + v * L);
      if (plan.constant_B) load_matrix(in.B, v, s.constant_B + v * values());
      if (plan.constant_C) load_matrix(in.C, v, s.constant_C + v * values());
    }
  }

  // States of the segment, 0 where the tensor is not given.
  void load_states(const Tensor4& t, int64_t v, S* out) const {
    if (is_given(t)) {
      Tiles<V>::load(states(t, segment.states, channel_of(v)), channels_of(v), plan.dstate, out);
    } else {
      for (int64_t i = 0; i < values(); ++i) out[i] = 0;
    }
  }
  void store_states(const Tensor4& t, int64_t v, const S* values_of_v) const {
    Tiles<V>::store(states(t, segment.states, channel_of(v)), channels_of(v), plan.dstate,
                    values_of_v);
  }

  void load(const Tensor4& t, int64_t v, int64_t begin, int64_t steps, S* out) const {
    Tiles<V>::load(rows(t, segment.batch, channel_of(v), begin), channels_of(v), steps, out);
  }
  void store(const Tensor4& t, int64_t v, int64_t begin, int64_t steps, const S* values_) const {
    Tiles<V>::store(rows(t, segment.batch, channel_of(v), begin), channels_of(v), steps, values_);
  }

  // B or C of a tile, for all vectors.
  void load_projection(const Tensor4& t, int64_t begin, int64_t steps, S* out, S* wide) const {
    if (out == nullptr) return;
    const int64_t* const strides = t.strides;
    for (int64_t n = 0; n < plan.dstate; n += L) {
      const int64_t offset =
          segment.batch * strides[0] + group * strides[1] + n * strides[2] + begin * strides[3];
      Tiles<V>::load(place(t, offset, strides[2], strides[3]), smaller(L, plan.dstate - n), steps,
                     out + n, plan.row);
    }
    if (wide == nullptr) return;
    for (int64_t t0 = 0; t0 < steps; ++t0) {
      for (int64_t n = 0; n < plan.dstate; ++n) {
        V::set(out[t0 * plan.row + n]).store(wide + (t0 * plan.dstate + n) * L);
      }
    }
  }
  void load_projections(int64_t begin, int64_t steps) const {
    load_projection(in.B, begin, steps, s.B, s.wide_B);
    load_projection(in.C, begin, steps, s.C, s.wide_C);
  }

  // u and dt of a tile of a vector, and their product.
  void load_inputs(int64_t v, int64_t begin, int64_t steps) const {
    load(in.u, v, begin, steps, s.u);
    load(in.delta, v, begin, steps, s.raw);
    const V bias = V::load(s.bias + v * L);
    for (int64_t i = 0; i < steps * L; i += L) {
      const V raw = add(V::load(s.raw + i), bias);
      const V dt = in.delta_softplus != 0 ? softplus(raw) : raw;
      raw.store(s.raw + i);
      dt.store(s.dt + i);
      mul(dt, V::load(s.u + i)).store(s.dtu + i);
    }
  }

  template <bool kVectors>
  Projection<V, kVectors> projection_B(int64_t v) const {
    if (!kVectors) return {s.B, plan.row};
    if (plan.constant_B) return {s.constant_B + v * values(), 0};
    return {s.wide_B, values()};
  }
  template <bool kVectors>
  Projection<V, kVectors> projection_C(int64_t v) const {
    if (!kVectors) return {s.C, plan.row};
    if (plan.constant_C) return {s.constant_C + v * values(), 0};
    return {s.wide_C, values()};
  }
};

// States n .. n + K - 1 of a vector through a tile, in registers; with kOutputs adds to y.
template <class V, int K, bool kVectors, bool kOutputs>
CAUSAL_CONV1D_INLINE void scan_states(const Buffers<V>& s, Projection<V, kVectors> B,
                                      Projection<V, kVectors> C, const typename V::Scalar* rates,
                                      typename V::Scalar* h, int64_t n, int64_t steps) {
  constexpr int64_t L = V::kLanes;
  V rate[K], state[K];
  for (int k = 0; k < K; ++k) {
    rate[k] = V::load(rates + (n + k) * L);
    state[k] = V::load(h + (n + k) * L);
  }
  for (int64_t t = 0; t < steps; ++t) {
    const V dt = V::load(s.dt + t * L), dtu = V::load(s.dtu + t * L);
    V y = dt;
    if (kOutputs) y = V::load(s.y + t * L);
    for (int k = 0; k < K; ++k) {
      state[k] = madd(decay(dt, rate[k]), state[k], mul(dtu, B.at(t, n + k)));
      if (kOutputs) y = madd(C.at(t, n + k), state[k], y);
    }
    if (kOutputs) y.store(s.y + t * L);
  }
  for (int k = 0; k < K; ++k) state[k].store(h + (n + k) * L);
}

// All states of vector v through a tile: h from before to after it, and with kOutputs y, the sum
// over n.
template <class V, bool kVectors, bool kOutputs>
void scan_tile(const Unit<V>& unit, int64_t v, typename V::Scalar* h, int64_t steps) {
  constexpr int K = 4;
  const auto B = unit.template projection_B<kVectors>(v);
  const auto C = unit.template projection_C<kVectors>(v);
  const typename V::Scalar* const rates = unit.s.rates + v * unit.values();
  for (int64_t i = 0; kOutputs && i < steps * V::kLanes; ++i) unit.s.y[i] = 0;
  int64_t n = 0;
  for (; n + K <= unit.plan.dstate; n += K) {
    scan_states<V, K, kVectors, kOutputs>(unit.s, B, C, rates, h, n, steps);
  }
  for (; n < unit.plan.dstate; ++n) {
    scan_states<V, 1, kVectors, kOutputs>(unit.s, B, C, rates, h, n, steps);
  }
}

}  // namespace
}  // namespace causal_conv1d
