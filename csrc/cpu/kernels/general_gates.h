// The gates and the residual around the convolution, on blocks in scratch: out = a * post_gate +
// residual of the activation a, and its gradients. Where ids tell that a row is padding, nothing
// of x or of the gates reaches it.
#pragma once

#include <stdint.h>

#include "../integers.h"
#include "../simd/vec.h"
#include "piece_rows.h"
#include "scratch.h"
#include "seq_ids.h"
#include "silu.h"
#include "tile.h"

namespace causal_conv1d {
namespace {
namespace general {

// Elements of `rows` rows in scratch, with those that fill the last vector.
CAUSAL_CONV1D_INLINE int64_t elements_of(const Tile& tile, int64_t rows) {
  return rows <= 0 ? 0 : tile.channel_first ? padded(rows) : rows * tile.pitch;
}

// Rows of z whose id is padding become those of `from`, or 0 if that is null.
template <class S>
void replace_padding(const Tile& tile, Ids ids, int64_t rows, const S* from, S* z) {
  if (ids.ids == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    if (ids.ids[r + ids.center] >= 0) continue;
    const size_t bytes = static_cast<size_t>(tile.pitch) * sizeof(S);
    if (from == nullptr) {
      __builtin_memset(z + r * tile.pitch, 0, bytes);
    } else {
      __builtin_memcpy(z + r * tile.pitch, from + r * tile.pitch, bytes);
    }
  }
}

// z = z * factor + addend, of which either may be null.
template <class V, class S>
void multiply_add(const S* factor, const S* addend, int64_t n, S* z) {
  for (int64_t i = 0; i < n; i += V::kLanes) {
    const V a = V::load(z + i);
    if (factor == nullptr) {
      add(a, V::load(addend + i)).store(z + i);
    } else if (addend == nullptr) {
      mul(a, V::load(factor + i)).store(z + i);
    } else {
      fma(a, V::load(factor + i), V::load(addend + i)).store(z + i);
    }
  }
}

// Steps t to t + rows - 1 of the activation in z become those of out.
template <class V, class S>
void apply_gates(const Tile& tile, const Plane& post_gate, const Plane& residual, int64_t t,
                 int64_t rows, Ids ids, const GateScratch<S>& s, S* z) {
  if (!is_given(post_gate) && !is_given(residual)) return;
  const S* const gate = is_given(post_gate) ? s.gate : nullptr;
  const S* const addend = is_given(residual) ? s.other : nullptr;
  if (gate != nullptr) load_block(tile, post_gate, t, rows, s.gate);
  if (addend != nullptr) load_block(tile, residual, t, rows, s.other);
  multiply_add<V>(gate, addend, elements_of(tile, rows), z);
  replace_padding(tile, ids, rows, addend, z);
}

// dout * post_gate becomes dz, the gradient of the sum, and the sum becomes dpost_gate.
template <bool kSilu, bool kShort, class V, class S>
void gate_gradients_as(const S* gate, int64_t n, S* sum, S* dz) {
  for (int64_t i = 0; i < n; i += V::kLanes) {
    const V z = V::load(sum + i), dout = V::load(dz + i), da = mul(dout, V::load(gate + i));
    if (kSilu) {
      const auto silu = silu_and_derivative<kShort>(z);
      mul(dout, silu.value).store(sum + i);
      mul(da, silu.derivative).store(dz + i);
    } else {
      mul(dout, z).store(sum + i);
      da.store(dz + i);
    }
  }
}

template <class V, class S>
void gate_gradients(int32_t dtype, bool with_silu, const S* gate, int64_t n, S* sum, S* dz) {
  (!with_silu         ? gate_gradients_as<false, false, V, S>
   : is_16_bit(dtype) ? gate_gradients_as<true, true, V, S>
                      : gate_gradients_as<true, false, V, S>)(gate, n, sum, dz);
}

// What becomes of rows of gradients of x~ in dx, from step t on, where x~ is pre_gate * x or x is
// the residual too.
template <class V, class S>
__attribute__((noinline)) void gate_dx(const Tile& tile, const BackwardRow& row, int64_t t,
                                       int64_t rows, Ids ids, const GateScratch<S>& s, S* dx) {
  const bool gated = is_given(row.in.pre_gate);
  if (rows <= 0 || (!gated && !row.residual_is_x)) return;
  const int64_t n = elements_of(tile, rows);
  if (gated && is_given(row.dpre_gate)) {
    load_block(tile, row.in.x, t, rows, s.other);
    multiply_add<V, S>(dx, nullptr, n, s.other);
    replace_padding<S>(tile, ids, rows, nullptr, s.other);
    store_block(tile, s.other, false, row.dpre_gate, t, rows);
  }
  if (gated) load_block(tile, row.in.pre_gate, t, rows, s.gate);
  if (row.residual_is_x) load_block(tile, row.dout, t, rows, s.other);
  const S* const dout = row.residual_is_x ? s.other : nullptr;
  multiply_add<V>(gated ? s.gate : nullptr, dout, n, dx);
  replace_padding(tile, ids, rows, dout, dx);
}

}  // namespace general
}  // namespace
}  // namespace causal_conv1d
