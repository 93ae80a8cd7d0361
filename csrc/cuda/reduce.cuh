// The sum of the partial sums of dweight and dbias.
#pragma once

#include "backward.cuh"

namespace causal_conv1d::gpu {

// kLanes threads add up the partial sums of one (k, d) in a fixed order, each every kLanes-th part.
constexpr int kLanes = 8;

template <typename T>
__global__ void __launch_bounds__(kThreads) reduce_partials(const BackwardArgs<T> p) {
  constexpr int kColumns = kThreads / kLanes;
  __shared__ Compute<T> sums[kLanes][kColumns];
  const int column = threadIdx.x % kColumns, part_lane = threadIdx.x / kColumns;
  const int64_t columns = (p.width + 1) * p.dim;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  Compute<T> sum = 0, lost = 0;  // Kahan's: there may be millions of parts
  pdl_wait();
  pdl_launch();
  if (i < columns) {
#pragma unroll 4
    for (int64_t part = part_lane; part < p.parts; part += kLanes) {
      const Compute<T> v = load_evict_first(&p.partials[part * columns + i]) - lost;
      const Compute<T> next = sum + v;
      lost = (next - sum) - v;
      sum = next;
    }
  }
  sums[part_lane][column] = sum;
  __syncthreads();
  if (part_lane > 0 || i >= columns) return;
#pragma unroll
  for (int j = 1; j < kLanes; ++j) sum += sums[j][column];
  int64_t d;
  const int64_t k = split(i, p.dim, &d);
  p.store_sum(sum, static_cast<int>(k), d);
}

}  // namespace causal_conv1d::gpu
