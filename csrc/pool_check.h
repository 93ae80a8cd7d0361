// The argument checks of the pool of states, which both backends make before they write anything.
#pragma once

#include "check.h"

namespace causal_conv1d {

using PoolParams = causal_conv1d_pool_params;

// What the C functions do first. params may be null, and smaller or larger than the struct here;
// full is what it says, to be used in its place.
Status read(const PoolParams* params, PoolParams* full);

// The same second: of a full struct, which may hold anything. Values of index tensors are not
// looked at.
Status check(const PoolParams* params);
inline bool has_work(const PoolParams& p) { return has_elements(p.x); }

// The convolution's x of a pool's: (1, dim, total).
inline Tensor as_row(const Tensor& x) {
  Tensor t = x;
  t.ndim = 3;
  for (int i = 0; i < 2; ++i) {
    t.sizes[i + 1] = x.sizes[i];
    t.strides[i + 1] = x.strides[i];
  }
  t.sizes[0] = 1;
  t.strides[0] = 0;
  return t;
}

// The number of sequences; without query_start_loc each token is one.
inline int64_t sequences_of(const PoolParams& p) {
  return given(p.query_start_loc) ? p.query_start_loc.sizes[0] - 1 : p.x.sizes[1];
}

}  // namespace causal_conv1d
