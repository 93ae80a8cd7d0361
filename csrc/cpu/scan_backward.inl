// The scan's backward over one span. States are computed up to each tile, and then, from the last
// tile to the first, once more within it, with the decays kept, for the way back. With
// g[n,t] the gradient of h[n,t], dy that of y, and a = exp(dt A):
//
//   g[n,t] = C[n,t] dy[t] + a[n,t+1] g[n,t+1]
//   dC[n,t] = dy h[n,t], dB[n,t] = g dt u, summed over the channels of a group
//   q[t] = sum over n of g B: du = q dt + D dy
//   r[t] = sum over n of a g h[n,t-1] A: ddt = r + q u
//   dA[n] = sum over t of a g h[n,t-1] dt
#pragma once

#include "scan_forward.inl"

namespace causal_conv1d {
namespace {

// States that are worked on together.
constexpr int kBackwardTogether = 4;

template <class V>
struct BackwardBuffers {
  using S = typename V::Scalar;
  static constexpr int64_t L = V::kLanes;

  S* starts;         // states before each tile of the span: [tile][vector][dstate][lane]
  S *decays, *path;  // [step][state of some][lane]; path: the states before and after each step
  S *dB, *dC;        // [step][dstate][lane], summed over vectors; constant ones are among the sums
  S *dout, *z;       // [step][lane]
  S *dy, *q, *r;

  BackwardBuffers(const ScanPlan& plan, Scratch* scratch) {
    const int64_t values = plan.dstate * L;
    const int64_t tiles = (plan.span + plan.tile - 1) / plan.tile;
    starts = scratch->take<S>(tiles * plan.vectors * values);
    decays = scratch->take<S>(plan.tile * kBackwardTogether * L);
    path = scratch->take<S>((plan.tile + 1) * kBackwardTogether * L);
    dB = scratch->take<S>(plan.constant_B ? 0 : plan.tile * values);
    dC = scratch->take<S>(plan.constant_C ? 0 : plan.tile * values);
    scratch->take(plan.tile * L, &dout, &z, &dy, &q, &r);
  }
};

// Where a vector's sums are kept: see CAUSAL_CONV1D_SCAN_SUMS.
template <class S, int64_t L>
struct Sums {
  S *g, *dA, *dB, *dC, *dD, *dbias;

  Sums(S* p, int64_t values)
      : g(p),
        dA(p + values),
        dB(p + 2 * values),
        dC(p + 3 * values),
        dD(p + 4 * values),
        dbias(p + 4 * values + L) {}
};

// What the loops over a tile read and add to; see above.
template <class V, bool kVectors>
struct Tile {
  using S = typename V::Scalar;
  const Buffers<V>& s;
  const BackwardBuffers<V>& b;
  Projection<V, kVectors> B, C;
  Projection<V, true> dB, dC;
  const S *rates, *start;  // of the vector
  S *g, *dA;
  int64_t steps;
};

template <class V, int K, bool kVectors>
CAUSAL_CONV1D_INLINE void tile_forward(const Tile<V, kVectors>& x, int64_t n) {
  constexpr int64_t L = V::kLanes;
  V rate[K], state[K];
  for (int k = 0; k < K; ++k) {
    rate[k] = V::load(x.rates + (n + k) * L);
    state[k] = V::load(x.start + (n + k) * L);
    state[k].store(x.b.path + k * L);
  }
  for (int64_t t = 0; t < x.steps; ++t) {
    const V dt = V::load(x.s.dt + t * L), dtu = V::load(x.s.dtu + t * L);
    V y = V::load(x.s.y + t * L);
    for (int k = 0; k < K; ++k) {
      const V a = decay(dt, rate[k]);
      state[k] = madd(a, state[k], mul(dtu, x.B.at(t, n + k)));
      y = madd(x.C.at(t, n + k), state[k], y);
      a.store(x.b.decays + (t * K + k) * L);
      state[k].store(x.b.path + ((t + 1) * K + k) * L);
    }
    y.store(x.s.y + t * L);
  }
}

template <class V, int K, bool kVectors>
CAUSAL_CONV1D_INLINE void tile_backward(const Tile<V, kVectors>& x, int64_t n) {
  constexpr int64_t L = V::kLanes;
  V rate[K], g[K], dA[K], state[K];
  for (int k = 0; k < K; ++k) {
    rate[k] = V::load(x.rates + (n + k) * L);
    g[k] = V::load(x.g + (n + k) * L);
    dA[k] = V::set(0);
    state[k] = V::load(x.b.path + (x.steps * K + k) * L);
  }
  for (int64_t t = x.steps - 1; t >= 0; --t) {
    const V dt = V::load(x.s.dt + t * L), dtu = V::load(x.s.dtu + t * L);
    const V dy = V::load(x.b.dy + t * L);
    V q = V::load(x.b.q + t * L), r = V::load(x.b.r + t * L);
    for (int k = 0; k < K; ++k) {
      madd(dy, state[k], x.dC.at(t, n + k)).store(x.dC.to(t, n + k));
      g[k] = madd(dy, x.C.at(t, n + k), g[k]);
      madd(g[k], dtu, x.dB.at(t, n + k)).store(x.dB.to(t, n + k));
      q = madd(g[k], x.B.at(t, n + k), q);
      g[k] = mul(g[k], V::load(x.b.decays + (t * K + k) * L));
      state[k] = V::load(x.b.path + (t * K + k) * L);
      const V e = mul(g[k], state[k]);
      dA[k] = madd(e, dt, dA[k]);
      r = madd(e, rate[k], r);
    }
    q.store(x.b.q + t * L);
    r.store(x.b.r + t * L);
  }
  for (int k = 0; k < K; ++k) {
    g[k].store(x.g + (n + k) * L);
    add(V::load(x.dA + (n + k) * L), dA[k]).store(x.dA + (n + k) * L);
  }
}

// The vector's states through a tile and back.
template <class V, bool kVectors>
void tile_there_and_back(const Tile<V, kVectors>& x, int64_t dstate) {
  constexpr int K = kBackwardTogether;
  for (int64_t i = 0; i < x.steps * V::kLanes; ++i) x.s.y[i] = x.b.q[i] = x.b.r[i] = 0;
  int64_t n = 0;
  for (; n + K <= dstate; n += K) {
    tile_forward<V, K>(x, n);
    tile_backward<V, K>(x, n);
  }
  for (; n < dstate; ++n) {
    tile_forward<V, 1>(x, n);
    tile_backward<V, 1>(x, n);
  }
}

template <class V>
struct BackwardUnit {
  using S = typename V::Scalar;
  static constexpr int64_t L = V::kLanes;

  const ScanBackwardParams& p;
  const ScanSpan& span;
  const Unit<V> unit;
  const BackwardBuffers<V> b;

  BackwardUnit(const ScanBackwardParams& params, const ScanPlan& plan, const ScanSegment& segment,
               const ScanSpan& span_, int64_t group, int64_t block, Scratch* scratch)
      : p(params),
        span(span_),
        unit(params.inputs, plan, segment, group, block, scratch),
        b(plan, scratch) {}

  Sums<S, L> sums(int64_t v) const {
    const int64_t size = CAUSAL_CONV1D_SCAN_SUMS(unit.plan.dstate) * L;
    return {static_cast<S*>(span.sums) + v * size, unit.values()};
  }

  // The states before the span into h, and those of all sums that begin with it.
  void begin() const {
    unit.load_parameters();
    const int64_t values = unit.values();
    for (int64_t v = 0; v < unit.vectors; ++v) {
      S* const h = unit.s.h + v * values;
      if (span.start == nullptr) {
        unit.load_states(unit.in.initial_states, v, h);
      } else {
        const S* const start = static_cast<const S*>(span.start) + v * values;
        for (int64_t i = 0; i < values; ++i) h[i] = start[i];
      }
      if (!span.last) continue;
      const Sums<S, L> s = sums(v);
      for (S* x = s.g; x < s.dbias + L; ++x) *x = 0;
      unit.load_states(p.dlast_states, v, s.g);
    }
  }

  // Leaves the states before each tile in starts.
  void find_starts() const {
    const bool wide = unit.plan.constant_B || unit.plan.constant_C;
    const auto scan = wide ? scan_tile<V, true, false> : scan_tile<V, false, false>;
    const int64_t tile = unit.plan.tile, all = unit.vectors * unit.values();
    S* start = b.starts;
    for (int64_t t = span.begin; t < span.end; t += tile) {
      for (int64_t i = 0; i < all; ++i) start[i] = unit.s.h[i];
      start += unit.plan.vectors * unit.values();
      if (t + tile >= span.end) break;
      unit.load_projection(unit.in.B, t, tile, unit.s.B, unit.s.wide_B);
      for (int64_t v = 0; v < unit.vectors; ++v) {
        unit.load_inputs(v, t, tile);
        scan(unit, v, unit.s.h + v * unit.values(), tile);
      }
    }
  }

  // dy from dout and z.
  void load_gradient(int64_t v, int64_t t, int64_t steps) const {
    S* const dy = is_given(unit.in.z) ? b.dout : b.dy;
    unit.load(p.dout, v, t, steps, dy);
    if (!is_given(unit.in.z)) return;
    unit.load(unit.in.z, v, t, steps, b.z);
    for (int64_t i = 0; i < steps * L; i += L) {
      const V z = V::load(b.z + i);
      mul(V::load(b.dout + i), mul(z, sigmoid(z))).store(b.dy + i);
    }
  }

  template <bool kVectors>
  void there_and_back(int64_t v, int64_t t, int64_t steps) const {
    const ScanPlan& plan = unit.plan;
    const int64_t values = unit.values(), tile = (t - span.begin) / plan.tile;
    const Sums<S, L> s = sums(v);
    const Tile<V, kVectors> x{unit.s,
                              b,
                              unit.template projection_B<kVectors>(v),
                              unit.template projection_C<kVectors>(v),
                              {plan.constant_B ? s.dB : b.dB, plan.constant_B ? 0 : values},
                              {plan.constant_C ? s.dC : b.dC, plan.constant_C ? 0 : values},
                              unit.s.rates + v * values,
                              b.starts + (tile * plan.vectors + v) * values,
                              s.g,
                              s.dA,
                              steps};
    tile_there_and_back(x, plan.dstate);
  }

  // The gradients of z, and out, from y. y is y + D u after it.
  void finish_gate(int64_t v, int64_t t, int64_t steps) const {
    if (is_given(unit.in.D)) add_skip(unit.s, v, steps * L);
    if (is_given(p.out) && !is_given(unit.in.z)) unit.store(p.out, v, t, steps, unit.s.y);
    if (!is_given(unit.in.z)) return;
    for (int64_t i = 0; i < steps * L; i += L) {
      const V z = V::load(b.z + i), one = V::set(1), s = sigmoid(z), y = V::load(unit.s.y + i);
      const V slope = mul(s, madd(z, sub(one, s), one));
      mul(y, mul(z, s)).store(b.z + i);
      mul(mul(V::load(b.dout + i), y), slope).store(b.dout + i);
    }
    if (is_given(p.dz)) unit.store(p.dz, v, t, steps, b.dout);
    if (is_given(p.out)) unit.store(p.out, v, t, steps, b.z);
  }

  // du and ddelta from q and r, and their sums.
  void finish_inputs(int64_t v, int64_t t, int64_t steps) const {
    const Sums<S, L> sum = sums(v);
    const V D = V::load(unit.s.D + v * L);
    V dD = V::set(0), dbias = V::set(0);
    for (int64_t i = 0; i < steps * L; i += L) {
      const V u = V::load(unit.s.u + i), dy = V::load(b.dy + i), q = V::load(b.q + i);
      madd(q, V::load(unit.s.dt + i), mul(D, dy)).store(b.q + i);
      V ddelta = madd(V::load(b.r + i), rate_scale(V()), mul(q, u));
      if (unit.in.delta_softplus != 0) ddelta = mul(ddelta, sigmoid(V::load(unit.s.raw + i)));
      ddelta.store(b.r + i);
      dD = madd(dy, u, dD);
      dbias = add(dbias, ddelta);
    }
    add(V::load(sum.dD), dD).store(sum.dD);
    add(V::load(sum.dbias), dbias).store(sum.dbias);
    if (is_given(p.du)) unit.store(p.du, v, t, steps, b.q);
    if (is_given(p.ddelta)) unit.store(p.ddelta, v, t, steps, b.r);
  }

  // Sums over lanes of dB or dC of a tile.
  void add_lanes(const S* d, void* partial, int64_t t, int64_t steps) const {
    if (partial == nullptr) return;
    const int64_t N = unit.plan.dstate, row = unit.plan.row;
    S* const out = static_cast<S*>(partial) + (t - span.begin) * row;
    for (int64_t i = 0; i < steps; ++i) {
      for (int64_t n = 0; n < N; n += L) {
        V r[L];
        for (int64_t k = 0; k < L; ++k) {
          r[k] = n + k < N ? V::load(d + (i * N + n + k) * L) : V::set(0);
        }
        transpose(r);
        for (int64_t k = 1; k < L; ++k) r[0] = add(r[0], r[k]);
        r[0].store(out + i * row + n);
      }
    }
  }

  // Takes lanes without a channel, which may have become NaN, out of sums over lanes.
  void clear_lanes(S* d, int64_t channels, int64_t steps) const {
    if (d == nullptr) return;
    for (int64_t i = 0; i < steps * unit.plan.dstate; ++i) {
      for (int64_t k = channels; k < L; ++k) d[i * L + k] = 0;
    }
  }

  void run() const {
    const ScanPlan& plan = unit.plan;
    const bool wide = plan.constant_B || plan.constant_C;
    begin();
    find_starts();
    const int64_t tiles = (span.end - span.begin + plan.tile - 1) / plan.tile;
    for (int64_t tile = tiles - 1; tile >= 0; --tile) {
      const int64_t t = span.begin + tile * plan.tile, steps = smaller(plan.tile, span.end - t);
      unit.load_projections(t, steps);
      for (int64_t i = 0; b.dB != nullptr && i < steps * unit.values(); ++i) b.dB[i] = 0;
      for (int64_t i = 0; b.dC != nullptr && i < steps * unit.values(); ++i) b.dC[i] = 0;
      for (int64_t v = unit.vectors - 1; v >= 0; --v) {  // the one that may be partial first
        unit.load_inputs(v, t, steps);
        load_gradient(v, t, steps);
        wide ? there_and_back<true>(v, t, steps) : there_and_back<false>(v, t, steps);
        finish_gate(v, t, steps);
        finish_inputs(v, t, steps);
        if (unit.channels_of(v) == L) continue;
        clear_lanes(b.dB, unit.channels_of(v), steps);
        clear_lanes(b.dC, unit.channels_of(v), steps);
      }
      add_lanes(b.dB, span.partial_dB, t, steps);
      add_lanes(b.dC, span.partial_dC, t, steps);
    }
    if (!span.first || !is_given(p.dinitial_states)) return;
    for (int64_t v = 0; v < unit.vectors; ++v) {
      unit.store_states(p.dinitial_states, v, sums(v).g);
    }
  }
};

template <class V>
void store_sums_of(const ScanBackwardParams& p, const ScanPlan& plan, int64_t group, int64_t block,
                   const typename V::Scalar* sums) {
  constexpr int64_t L = V::kLanes;
  const int64_t values = plan.dstate * L, N = plan.dstate;
  const int64_t first = group * plan.group_dim + block * plan.block;
  const int64_t channels = smaller(plan.block, plan.group_dim - block * plan.block);
  for (int64_t v = 0; v * L < channels; ++v) {
    const int64_t d = first + v * L, count = smaller(L, channels - v * L);
    const Sums<const typename V::Scalar, L> s(sums + v * CAUSAL_CONV1D_SCAN_SUMS(N) * L, values);
    if (is_given(p.dA)) Tiles<V>::store(matrix(p.dA, d), count, N, s.dA);
    if (is_given(p.dB) && plan.constant_B) Tiles<V>::store(matrix(p.dB, d), count, N, s.dB);
    if (is_given(p.dC) && plan.constant_C) Tiles<V>::store(matrix(p.dC, d), count, N, s.dC);
    if (is_given(p.dD)) Tiles<V>::store(column(p.dD, d), count, 1, s.dD);
    if (is_given(p.ddelta_bias)) Tiles<V>::store(column(p.ddelta_bias, d), count, 1, s.dbias);
  }
}

// partials: [block][step][row], of which the first block takes the sum.
template <class V>
void reduce_partials(const Tensor4& out, const ScanPlan& plan, int64_t batch, int64_t group,
                     int64_t begin, int64_t end, typename V::Scalar* partials, int64_t stride) {
  constexpr int64_t L = V::kLanes;
  for (int64_t i = 0; i < (end - begin) * plan.row; i += L) {
    V sum = V::load(partials + i);
    for (int64_t block = 1; block < plan.blocks; ++block) {
      sum = add(sum, V::load(partials + block * stride + i));
    }
    sum.store(partials + i);
  }
  const int64_t* const s = out.strides;
  for (int64_t n = 0; n < plan.dstate; n += L) {
    const int64_t offset = batch * s[0] + group * s[1] + n * s[2] + begin * s[3];
    Tiles<V>::store(place(out, offset, s[2], s[3]), smaller(L, plan.dstate - n), end - begin,
                    partials + n, plan.row);
  }
}

}  // namespace
}  // namespace causal_conv1d
