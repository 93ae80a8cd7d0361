// Which time steps belong together: rows of the batch, or the sequences of cu_seqlens.
#pragma once

#include "scan_view.cuh"

namespace causal_conv1d::gpu::scan {

// Sequences may begin anywhere; a thread's first step is a multiple of this even so.
constexpr int64_t kAlign = 8;

struct Segment {
  int64_t batch, begin, end;  // steps
  __device__ __forceinline__ int64_t first() const { return begin / kAlign * kAlign; }
};

struct Sequences {
  const void* cu_seqlens;
  int64_t stride, count, seqlen;
  bool wide;

  // Offsets outside the tensor would be a fault of memory, so they are cut off.
  __device__ __forceinline__ int64_t offset(int64_t i) const {
    const int64_t v = wide ? static_cast<const int64_t*>(cu_seqlens)[i * stride]
                           : static_cast<const int32_t*>(cu_seqlens)[i * stride];
    return v < 0 ? 0 : (v > seqlen ? seqlen : v);
  }
  __device__ __forceinline__ Segment segment(int64_t i) const {
    if (cu_seqlens == nullptr) return {i, 0, seqlen};
    return {0, offset(i), offset(i + 1)};
  }
};

inline Sequences sequences(const ScanInputs& in) {
  Sequences s{};
  if (given(in.cu_seqlens)) {
    s.cu_seqlens = in.cu_seqlens.data;
    s.stride = in.cu_seqlens.strides[0];
    s.wide = in.cu_seqlens.dtype == CAUSAL_CONV1D_INT64;
  }
  s.count = sequences_of(in);
  s.seqlen = in.u.sizes[2];
  return s;
}

}  // namespace causal_conv1d::gpu::scan
