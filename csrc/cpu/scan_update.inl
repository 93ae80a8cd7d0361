// One token: vectors over the channels of a head, whose states are turned round on the way in and
// out of scratch memory.
#pragma once

#include "scan_tile.inl"

namespace causal_conv1d {
namespace {

// Channels of a unit at most.
constexpr int64_t kUpdateBlock = CAUSAL_CONV1D_UPDATE_BLOCK;

template <class V>
struct UpdateBuffers {
  using S = typename V::Scalar;
  static constexpr int64_t L = V::kLanes;

  S *rates, *D, *bias;  // [vector][dstate][lane], [vector][lane], [vector][lane]
  S *B, *C;             // [dstate]
  S* h;                 // [dstate][lane]
  S *x, *dt, *z, *out;  // [lane]

  UpdateBuffers(int64_t dstate, Scratch* scratch) {
    rates = scratch->take<S>(kUpdateBlock * dstate);
    scratch->take(kUpdateBlock, &D, &bias);
    scratch->take((dstate + L - 1) / L * L, &B, &C);
    h = scratch->take<S>(dstate * L);
    scratch->take(L, &x, &dt, &z, &out);
  }
};

template <class V>
struct UpdateUnit {
  using S = typename V::Scalar;
  static constexpr int64_t L = V::kLanes;

  const StateUpdateParams& p;
  const int64_t head, first, count, dstate;
  const UpdateBuffers<V> s;
  // A is the same for all n, as in Mamba-2: one exponential a channel.
  const bool one_rate;

  UpdateUnit(const StateUpdateParams& params, int64_t h, int64_t f, int64_t c, Scratch* scratch)
      : p(params),
        head(h),
        first(f),
        count(c),
        dstate(params.state.sizes[3]),
        s(dstate, scratch),
        one_rate(params.A.strides[2] == 0) {}

  int64_t channels_of(int64_t v) const { return smaller(L, count - v * L); }

  // Of a tensor (heads, dim) or (batch, heads, dim).
  Place channels(const Tensor4& t, int64_t v) const {
    const int64_t* const strides = t.strides;
    return place(t, head * strides[0] + (first + v * L) * strides[1], strides[1], 0);
  }
  Place channels(const Tensor4& t, int64_t b, int64_t v) const {
    const int64_t* const strides = t.strides + 1;
    return place(t, b * t.strides[0] + head * strides[0] + (first + v * L) * strides[1], strides[1],
                 0);
  }

  void load_parameters() const {
    const int64_t* const strides = p.A.strides;
    for (int64_t v = 0; v * L < count; ++v) {
      S* const rate = s.rates + v * dstate * L;
      const int64_t offset = head * strides[0] + (first + v * L) * strides[1];
      Tiles<V>::load(place(p.A, offset, strides[1], strides[2]), channels_of(v), dstate, rate);
      for (int64_t i = 0; i < dstate * L; ++i) rate[i] = decay_rate(rate[i]);
      V::set(0).store(s.D + v * L);
      V::set(0).store(s.bias + v * L);
      if (is_given(p.D)) Tiles<V>::load(channels(p.D, v), channels_of(v), 1, s.D + v * L);
      if (is_given(p.dt_bias)) {
        Tiles<V>::load(channels(p.dt_bias, v), channels_of(v), 1, s.bias + v * L);
      }
    }
  }

  void load_projection(const Tensor4& t, int64_t b, S* out) const {
    const int64_t group = head / (p.x.sizes[1] / t.sizes[1]), stride = t.strides[2];
    for (int64_t n = 0; n < dstate; n += L) {
      const int64_t offset = b * t.strides[0] + group * t.strides[1] + n * stride;
      Tiles<V>::load(place(t, offset, stride, 0), smaller(L, dstate - n), 1, out + n);
    }
  }

  // h and y of a vector, from its dt and dt x.
  V step(int64_t v, V dt, V dtx) const {
    const S* const rate = s.rates + v * dstate * L;
    V y = V::set(0), a = decay(dt, V::load(rate));
    for (int64_t n = 0; n < dstate; ++n) {
      if (!one_rate) a = decay(dt, V::load(rate + n * L));
      const V h = madd(a, V::load(s.h + n * L), mul(dtx, V::set(s.B[n])));
      h.store(s.h + n * L);
      y = madd(h, V::set(s.C[n]), y);
    }
    return y;
  }

  Place states_of(int64_t row, int64_t v) const {
    const int64_t* const strides = p.state.strides;
    return place(p.state, row * strides[0] + head * strides[1] + (first + v * L) * strides[2],
                 strides[2], strides[3]);
  }

  // The beginnings of a vector's states: 15 % faster where they are in no cache.
  void prefetch(int64_t row, int64_t v) const {
    if ((v + 1) * L > count) return;
    const Place state = states_of(row, v);
    for (int64_t i = 0; i < L; ++i) {
      __builtin_prefetch(state.data + i * state.channel * size_of(state.dtype), 1);
    }
  }

  void vector(int64_t b, int64_t row, int64_t v) const {
    const int64_t n = channels_of(v);
    const Place state = states_of(row, v);
    prefetch(row, v + 4);
    Tiles<V>::load(state, n, dstate, s.h);
    Tiles<V>::load(channels(p.x, b, v), n, 1, s.x);
    Tiles<V>::load(channels(p.dt, b, v), n, 1, s.dt);
    const V x = V::load(s.x), raw = add(V::load(s.dt), V::load(s.bias + v * L));
    const V dt = p.dt_softplus != 0 ? softplus(raw) : raw;
    V out = madd(V::load(s.D + v * L), x, step(v, dt, mul(dt, x)));
    Tiles<V>::store(state, n, dstate, s.h);
    if (is_given(p.z)) {
      Tiles<V>::load(channels(p.z, b, v), n, 1, s.z);
      const V z = V::load(s.z);
      out = mul(out, mul(z, sigmoid(z)));
    }
    out.store(s.out);
    Tiles<V>::store(channels(p.out, b, v), n, 1, s.out);
  }

  void padding(int64_t b) const {
    V::set(0).store(s.out);
    for (int64_t v = 0; v * L < count; ++v) {
      Tiles<V>::store(channels(p.out, b, v), channels_of(v), 1, s.out);
    }
  }

  void run(const int64_t* state_rows, int64_t begin, int64_t end) const {
    load_parameters();
    for (int64_t b = begin; b < end; ++b) {
      const int64_t row = state_rows == nullptr ? b : state_rows[b];
      if (row < 0) {
        padding(b);
        continue;
      }
      load_projection(p.B, b, s.B);
      load_projection(p.C, b, s.C);
      for (int64_t v = 0; v * L < count; ++v) vector(b, row, v);
    }
  }
};

size_t state_update_scratch(const StateUpdateParams& p) {
  Scratch scratch{nullptr};
  if (p.x.dtype == CAUSAL_CONV1D_FLOAT64) {
    const UpdateBuffers<DoubleVec> buffers(p.state.sizes[3], &scratch);
  } else {
    const UpdateBuffers<Native> buffers(p.state.sizes[3], &scratch);
  }
  return scratch.used;
}

void state_update(const StateUpdateParams& p, const int64_t* state_rows, int64_t head,
                  int64_t first, int64_t count, int64_t begin, int64_t end, char* memory) {
  Scratch scratch{memory};
  if (p.x.dtype == CAUSAL_CONV1D_FLOAT64) {
    UpdateUnit<DoubleVec>(p, head, first, count, &scratch).run(state_rows, begin, end);
  } else {
    UpdateUnit<Native>(p, head, first, count, &scratch).run(state_rows, begin, end);
  }
}

}  // namespace
}  // namespace causal_conv1d
