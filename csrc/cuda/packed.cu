// Makes ids and bounds of cu_seqlens, and finds where the rows of seq_idx end.
#include "packed.h"

#include <climits>

#include "launch.cuh"
#include "ptx.cuh"
#include "schedule.cuh"
#include "seq_idx.cuh"

namespace causal_conv1d::gpu {
namespace {

// Where sequences begin, and where the last one ends; clamped to 0..total.
struct CuSeqlens {
  const void* data;
  int64_t stride, count, total;
  bool wide;  // int64

  CuSeqlens(const Tensor& t, int64_t total_)
      : data(t.data),
        stride(t.strides[0]),
        count(t.sizes[0]),
        total(total_),
        wide(t.dtype == CAUSAL_CONV1D_INT64) {}

  __device__ __forceinline__ int64_t at(int64_t i) const {
    const int64_t v = wide ? static_cast<const int64_t*>(data)[i * stride]
                           : static_cast<const int32_t*>(data)[i * stride];
    return v < 0 ? 0 : (v > total ? total : v);
  }
};

constexpr int kIdsPerThread = 8, kIdsPerBlock = kThreads * kIdsPerThread;

// The smallest v of the threads after this one in the block, or INT_MAX.
__device__ __forceinline__ int least_after(int v) {
  __shared__ int of_warp[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int least = v;
#pragma unroll
  for (int n = 1; n < 32; n *= 2) {
    const int other = __shfl_down_sync(0xffffffff, least, n);
    if (lane + n < 32) least = min(least, other);
  }
  if (lane == 0) of_warp[warp] = least;
  least = __shfl_down_sync(0xffffffff, least, 1);
  if (lane == 31) least = INT_MAX;
  __syncthreads();
  for (int i = warp + 1; i < kWarps; ++i) least = min(least, of_warp[i]);
  return least;
}

// A step's sequence is the one before the first that begins after it. That no bound is below the
// ones before needs no care so: the first one after the step is the same with and without.
__device__ __forceinline__ void write_ids_of(const CuSeqlens& cu, int64_t t0, int32_t* ids) {
  __shared__ int first[kIdsPerBlock];  // the first bound that is the step after this one
#pragma unroll 1
  for (int i = threadIdx.x; i < kIdsPerBlock; i += kThreads) first[i] = INT_MAX;
  __syncthreads();
  int after = INT_MAX;  // the first one after the block's steps
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < cu.count; i += kThreads) {
    const int64_t step = cu.at(i) - t0 - 1;
    if (step >= kIdsPerBlock - 1) {
      after = min(after, static_cast<int>(i));
    } else if (step >= 0) {
      atomicMin(&first[step], static_cast<int>(i));
    }
  }
  if (after != INT_MAX) atomicMin(&first[kIdsPerBlock - 1], after);
  __syncthreads();
  int id[kIdsPerThread];
  const int* own = first + threadIdx.x * kIdsPerThread;
#pragma unroll
  for (int j = kIdsPerThread - 1; j >= 0; --j) {
    id[j] = own[j];
    if (j + 1 < kIdsPerThread) id[j] = min(id[j], id[j + 1]);
  }
  const int rest = least_after(id[0]);
  const int64_t t = t0 + threadIdx.x * kIdsPerThread;
#pragma unroll
  for (int j = 0; j < kIdsPerThread; ++j) {
    id[j] = min(id[j], rest);
    id[j] = id[j] == INT_MAX ? -1 : id[j] - 1;
    if (t + j < cu.total) ids[t + j] = id[j];
  }
}

// bounds[i] is the greatest of cu[0..i].
__device__ __forceinline__ void write_bounds_of(const CuSeqlens& cu, int64_t i0, int64_t* bounds) {
  __shared__ int64_t greatest[kThreads];
  int64_t before = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < i0; i += kThreads) before = max(before, cu.at(i));
  const int64_t i = i0 + threadIdx.x;
  greatest[threadIdx.x] = before;
  __syncthreads();
  if (threadIdx.x < 32) {
#pragma unroll 1
    for (int j = threadIdx.x + 32; j < kThreads; j += 32) before = max(before, greatest[j]);
#pragma unroll
    for (int n = 16; n > 0; n /= 2) {
      before = max(before, __shfl_xor_sync(0xffffffff, before, n));
    }
  }
  __syncthreads();
  greatest[threadIdx.x] = i < cu.count ? cu.at(i) : 0;
  __shared__ int64_t before_all;
  if (threadIdx.x == 0) before_all = before;
  __syncthreads();
  int64_t own = before_all;
#pragma unroll 1
  for (int j = 0; j <= static_cast<int>(threadIdx.x); ++j) own = max(own, greatest[j]);
  if (i < cu.count) bounds[i] = own;
}

// The first id_blocks blocks write the ids of all steps, the others, if there are, bounds.
__global__ void __launch_bounds__(kThreads)
    write_packing(const CuSeqlens cu, unsigned id_blocks, int32_t* ids, int64_t* bounds) {
  pdl_wait();
  pdl_launch();
  if (blockIdx.x < id_blocks) {
    write_ids_of(cu, int64_t(blockIdx.x) * kIdsPerBlock, ids);
  } else {
    write_bounds_of(cu, int64_t(blockIdx.x - id_blocks) * kThreads, bounds);
  }
}

// A warp per row.
__global__ void __launch_bounds__(kThreads)
    write_ends(const SeqIdx seq_idx, int64_t batch, int64_t seqlen, int64_t* ends) {
  pdl_wait();
  pdl_launch();
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (b >= batch) return;
  const int64_t end = seq_idx.end(b, seqlen);
  if (threadIdx.x % 32 == 0) ends[b] = end;
}

}  // namespace

cudaError_t launch_packing(const Tensor& cu_seqlens, int64_t total, const Packing& packing,
                           cudaStream_t stream) {
  const int64_t id_blocks = ceil_div(total, kIdsPerBlock);
  const int64_t bound_blocks =
      packing.bounds == nullptr ? 0 : ceil_div(cu_seqlens.sizes[0], kThreads);
  return launch_pdl(write_packing, (id_blocks + bound_blocks) * kThreads, stream,
                    CuSeqlens(cu_seqlens, total), static_cast<unsigned>(id_blocks), packing.ids,
                    packing.bounds);
}

cudaError_t launch_ends(const Tensor& seq_idx, int64_t* ends, cudaStream_t stream) {
  const int64_t batch = seq_idx.sizes[0];
  return launch_pdl(write_ends, batch * 32, stream, seq_idx_view(seq_idx), batch, seq_idx.sizes[1],
                    ends);
}

}  // namespace causal_conv1d::gpu
