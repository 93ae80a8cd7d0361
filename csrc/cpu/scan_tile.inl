// Tiles: some channels by some steps of a tensor of any strides and type, as vectors over channels
// in scratch memory. Lanes without a channel are 0.
#pragma once

#include "scan_kernels.h"
#include "scan_math.inl"

namespace causal_conv1d {
namespace {

CAUSAL_CONV1D_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

CAUSAL_CONV1D_INLINE bool is_given(const Tensor4& t) { return t.ndim != 0; }

// Where a tile is: its first element, and the steps from channel to channel and from step to step.
struct Place {
  char* data;
  int64_t channel, step;  // in elements
  int32_t dtype;
};

CAUSAL_CONV1D_INLINE int64_t size_of(int32_t dtype) {
  return dtype == CAUSAL_CONV1D_FLOAT64 ? 8 : dtype == CAUSAL_CONV1D_FLOAT32 ? 4 : 2;
}

CAUSAL_CONV1D_INLINE Place place(const Tensor4& t, int64_t offset, int64_t channel, int64_t step) {
  return {static_cast<char*>(t.data) + offset * size_of(t.dtype), channel, step, t.dtype};
}

// Of u and the like, (batch, dim, seqlen).
CAUSAL_CONV1D_INLINE Place rows(const Tensor4& t, int64_t batch, int64_t channel, int64_t step) {
  const int64_t* s = t.strides;
  return place(t, batch * s[0] + channel * s[1] + step * s[2], s[1], s[2]);
}
// Of states (batch, dim, dstate), whose steps are n.
CAUSAL_CONV1D_INLINE Place states(const Tensor4& t, int64_t row, int64_t channel) {
  return rows(t, row, channel, 0);
}
// Of A and the like, (dim, dstate).
CAUSAL_CONV1D_INLINE Place matrix(const Tensor4& t, int64_t channel) {
  return place(t, channel * t.strides[0], t.strides[0], t.strides[1]);
}
// Of D and delta_bias, (dim,).
CAUSAL_CONV1D_INLINE Place column(const Tensor4& t, int64_t channel) {
  return place(t, channel * t.strides[0], t.strides[0], 0);
}

// One vector of a step, element by element.
template <class V, class T>
CAUSAL_CONV1D_INLINE V gather(const T* p, int64_t channel, int64_t channels) {
  T values[V::kLanes] = {};
  for (int64_t i = 0; i < channels; ++i) values[i] = p[i * channel];
  return V::load(values);
}
template <class V, class T>
CAUSAL_CONV1D_INLINE void scatter(V v, T* p, int64_t channel, int64_t channels) {
  T values[V::kLanes];
  v.store(values);
  for (int64_t i = 0; i < channels; ++i) p[i * channel] = values[i];
}

// out: vectors `row` values apart.
template <class V, class T>
void load_tile_of(const T* p, const Place& at, int64_t channels, int64_t steps,
                  typename V::Scalar* out, int64_t row) {
  constexpr int64_t L = V::kLanes;
  int64_t t = 0;
  if (at.step == 1 && L > 1) {
    for (; t + L <= steps; t += L) {
      V r[L];
      for (int64_t i = 0; i < L; ++i) {
        r[i] = i < channels ? V::load(p + i * at.channel + t) : V::set(0);
      }
      transpose(r);
      for (int64_t i = 0; i < L; ++i) r[i].store(out + (t + i) * row);
    }
  } else if (at.channel == 1 && channels == L) {
    for (; t < steps; ++t) V::load(p + t * at.step).store(out + t * row);
  }
  for (; t < steps; ++t) gather<V>(p + t * at.step, at.channel, channels).store(out + t * row);
}

template <class V, class T>
void store_tile_of(T* p, const Place& at, int64_t channels, int64_t steps,
                   const typename V::Scalar* in, int64_t row) {
  constexpr int64_t L = V::kLanes;
  int64_t t = 0;
  if (at.step == 1 && L > 1) {
    for (; t + L <= steps; t += L) {
      V r[L];
      for (int64_t i = 0; i < L; ++i) r[i] = V::load(in + (t + i) * row);
      transpose(r);
      for (int64_t i = 0; i < channels; ++i) r[i].store(p + i * at.channel + t);
    }
  } else if (at.channel == 1 && channels == L) {
    for (; t < steps; ++t) V::load(in + t * row).store(p + t * at.step);
  }
  for (; t < steps; ++t) scatter(V::load(in + t * row), p + t * at.step, at.channel, channels);
}

template <class V>
struct Tiles;

template <>
struct Tiles<Native> {
  static void load(const Place& at, int64_t channels, int64_t steps, float* out,
                   int64_t row = Native::kLanes) {
    if (at.dtype == CAUSAL_CONV1D_FLOAT32) {
      load_tile_of<Native>(reinterpret_cast<const float*>(at.data), at, channels, steps, out, row);
    } else if (at.dtype == CAUSAL_CONV1D_FLOAT16) {
      load_tile_of<Native>(reinterpret_cast<const Half*>(at.data), at, channels, steps, out, row);
    } else {
      load_tile_of<Native>(reinterpret_cast<const Bfloat16*>(at.data), at, channels, steps, out,
                           row);
    }
  }
  static void store(const Place& at, int64_t channels, int64_t steps, const float* in,
                    int64_t row = Native::kLanes) {
    if (at.dtype == CAUSAL_CONV1D_FLOAT32) {
      store_tile_of<Native>(reinterpret_cast<float*>(at.data), at, channels, steps, in, row);
    } else if (at.dtype == CAUSAL_CONV1D_FLOAT16) {
      store_tile_of<Native>(reinterpret_cast<Half*>(at.data), at, channels, steps, in, row);
    } else {
      store_tile_of<Native>(reinterpret_cast<Bfloat16*>(at.data), at, channels, steps, in, row);
    }
  }
};

template <>
struct Tiles<DoubleVec> {
  static void load(const Place& at, int64_t channels, int64_t steps, double* out, int64_t row = 1) {
    load_tile_of<DoubleVec>(reinterpret_cast<const double*>(at.data), at, channels, steps, out,
                            row);
  }
  static void store(const Place& at, int64_t channels, int64_t steps, const double* in,
                    int64_t row = 1) {
    store_tile_of<DoubleVec>(reinterpret_cast<double*>(at.data), at, channels, steps, in, row);
  }
};

// Hands out parts of the scratch memory, aligned as it is; without memory it only counts.
struct Scratch {
  char* memory;
  size_t used = 0;

  template <class T>
  CAUSAL_CONV1D_INLINE T* take(int64_t count) {
    T* const p = memory == nullptr || count == 0 ? nullptr : reinterpret_cast<T*>(memory + used);
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  // As much for each.
  template <class... Pointers>
  CAUSAL_CONV1D_INLINE void take(int64_t count, Pointers*... p) {
    (take_one(count, p), ...);
  }

 private:
  template <class T>
  CAUSAL_CONV1D_INLINE void take_one(int64_t count, T** p) {
    *p = take<T>(count);
  }
};

}  // namespace
}  // namespace causal_conv1d
