// Packed sequences: kernels take them by ids, as of seq_idx, which are made of cu_seqlens.
#pragma once

#include "../check.h"
#include "gpu.h"
#include "schedule.h"

namespace causal_conv1d::gpu {

// What is made of cu_seqlens in the workspace. Sequence i has the steps bounds[i] to bounds[i+1] -
// 1, and the id i; steps of none have -1.
struct Packing {
  int32_t* ids = nullptr;     // (total,)
  int64_t* bounds = nullptr;  // (sequences + 1,) if wanted
  int64_t size = 0;           // in bytes, a multiple of 16

  Packing() = default;
  // workspace may be nullptr where only the size is asked for.
  Packing(const Tensor& cu_seqlens, int64_t total, bool with_bounds, void* workspace) {
    const int64_t id_bytes = ceil_div(total, 4) * 16;
    size = id_bytes + (with_bounds ? ceil_div(cu_seqlens.sizes[0], 2) * 16 : 0);
    if (workspace == nullptr) return;
    ids = static_cast<int32_t*>(workspace);
    if (with_bounds) bounds = reinterpret_cast<int64_t*>(static_cast<char*>(workspace) + id_bytes);
  }

  // The ids as seq_idx, (1, total).
  Tensor seq_idx(int64_t total) const {
    Tensor t{};
    t.data = ids;
    t.ndim = 2;
    t.dtype = CAUSAL_CONV1D_INT32;
    t.sizes[0] = t.strides[1] = 1;
    t.sizes[1] = t.strides[0] = total;
    return t;
  }
};

// The widest filter that edges and dilation have kernels for, of x's type: states and dilations of
// wider ones are left to the kernels for any strides, to keep the library small.
constexpr int64_t edge_width(int32_t dtype) { return dtype == CAUSAL_CONV1D_BFLOAT16 ? 8 : 4; }

// Writes ids, and bounds unless that is nullptr.
cudaError_t launch_packing(const Tensor& cu_seqlens, int64_t total, const Packing& packing,
                           cudaStream_t stream);

// Writes SeqIdx::end() of each row.
cudaError_t launch_ends(const Tensor& seq_idx, int64_t* ends, cudaStream_t stream);

}  // namespace causal_conv1d::gpu
