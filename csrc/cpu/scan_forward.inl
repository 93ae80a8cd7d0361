// The scan's forward, and the first part of its backward: the states at the beginnings of spans.
#pragma once

#include "scan_unit.inl"

namespace causal_conv1d {
namespace {

// z before, and y z sigmoid(z) after.
template <class V>
CAUSAL_CONV1D_INLINE void gate(typename V::Scalar* z, const typename V::Scalar* y, int64_t count) {
  for (int64_t i = 0; i < count; i += V::kLanes) {
    const V x = V::load(z + i);
    mul(V::load(y + i), mul(x, sigmoid(x))).store(z + i);
  }
}

// y += D u
template <class V>
CAUSAL_CONV1D_INLINE void add_skip(const Buffers<V>& s, int64_t v, int64_t count) {
  const V D = V::load(s.D + v * V::kLanes);
  for (int64_t i = 0; i < count; i += V::kLanes) {
    madd(D, V::load(s.u + i), V::load(s.y + i)).store(s.y + i);
  }
}

template <class V>
void forward_unit(const ScanForwardParams& p, const ScanPlan& plan, const ScanSegment& segment,
                  int64_t group, int64_t block, Scratch scratch) {
  const Unit<V> unit(p.inputs, plan, segment, group, block, &scratch);
  const bool wide = plan.constant_B || plan.constant_C;
  const auto scan = wide ? scan_tile<V, true, true> : scan_tile<V, false, true>;
  unit.load_parameters();
  for (int64_t v = 0; v < unit.vectors; ++v) {
    unit.load_states(p.inputs.initial_states, v, unit.s.h + v * unit.values());
  }
  for (int64_t t = segment.begin; t < segment.end; t += plan.tile) {
    const int64_t steps = smaller(plan.tile, segment.end - t), count = steps * V::kLanes;
    unit.load_projections(t, steps);
    for (int64_t v = 0; v < unit.vectors; ++v) {
      unit.load_inputs(v, t, steps);
      scan(unit, v, unit.s.h + v * unit.values(), steps);
      if (is_given(p.inputs.D)) add_skip(unit.s, v, count);
      if (is_given(p.ungated)) unit.store(p.ungated, v, t, steps, unit.s.y);
      if (is_given(p.inputs.z)) {
        unit.load(p.inputs.z, v, t, steps, unit.s.raw);
        gate<V>(unit.s.raw, unit.s.y, count);
        unit.store(p.out, v, t, steps, unit.s.raw);
      } else {
        unit.store(p.out, v, t, steps, unit.s.y);
      }
    }
  }
  if (!is_given(p.last_states)) return;
  for (int64_t v = 0; v < unit.vectors; ++v) {
    unit.store_states(p.last_states, v, unit.s.h + v * unit.values());
  }
}

template <class V>
void span_starts_unit(const ScanInputs& in, const ScanPlan& plan, const ScanSegment& segment,
                      int64_t group, int64_t block, typename V::Scalar* starts, int64_t stride,
                      Scratch scratch) {
  using S = typename V::Scalar;
  const Unit<V> unit(in, plan, segment, group, block, &scratch);
  const bool wide = plan.constant_B || plan.constant_C;
  const auto scan = wide ? scan_tile<V, true, false> : scan_tile<V, false, false>;
  unit.load_parameters();
  for (int64_t v = 0; v < unit.vectors; ++v) {
    unit.load_states(in.initial_states, v, unit.s.h + v * unit.values());
  }
  const int64_t last = (segment.end - segment.begin - 1) / plan.span * plan.span;  // span's begin
  for (int64_t t = 0; t < last; t += plan.tile) {  // a span is a whole number of tiles
    unit.load_projection(in.B, segment.begin + t, plan.tile, unit.s.B, unit.s.wide_B);
    for (int64_t v = 0; v < unit.vectors; ++v) {
      unit.load_inputs(v, segment.begin + t, plan.tile);
      scan(unit, v, unit.s.h + v * unit.values(), plan.tile);
    }
    if ((t + plan.tile) % plan.span != 0) continue;
    S* const start = starts + t / plan.span * stride;
    for (int64_t i = 0; i < unit.vectors * unit.values(); ++i) start[i] = unit.s.h[i];
  }
}

}  // namespace
}  // namespace causal_conv1d
