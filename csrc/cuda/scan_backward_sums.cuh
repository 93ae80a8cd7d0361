// The backward's last step: sums over parts of the channels, and over chunks.
#pragma once

#include "scan_backward_gradients.cuh"

namespace causal_conv1d::gpu::scan {

// dB and dC from the parts of a group's channels. A thread takes a number of a chunk.
template <typename F>
__global__ void __launch_bounds__(kThreads) add_parts(const BackwardArgs p) {
  constexpr int row = kSteps<F, kLanes>;
  const bool is_C = blockIdx.x % 2 != 0;
  const View& to = is_C ? p.dC : p.dB;
  if (!to.given() || (is_C ? p.C_constant : p.B_constant)) return;
  const int64_t a_part = p.chunks * p.groups * p.dstate * row;
  const int64_t i = static_cast<int64_t>(blockIdx.x / 2) * kThreads + threadIdx.x;
  if (i >= a_part) return;
  const int64_t n = i / row % p.dstate, group = i / row / p.dstate % p.groups;
  const Chunk chunk = find_chunk<row>(p, i / row / p.dstate / p.groups);
  const int64_t t = chunk.t0 + step_at<F>(static_cast<int>(i % row));
  if (!chunk.exists || t < chunk.segment.begin || t >= chunk.segment.end) return;
  const F* const from = static_cast<const F*>(is_C ? p.part_C : p.part_B) + i;
  F sum = 0;
  for (int64_t part = 0; part < p.parts; ++part) sum += from[part * a_part];
  store(to.at(chunk.segment.batch, group, n) + t * to.step, to.dtype, sum);
}

// Sums over chunks of (chunks, columns) to (columns / width, width). Spans add to a total, the last
// of them to be taken writes it out.
struct ColumnSums {
  struct Task {
    const void* from;
    View to;
    int64_t columns, width;
    void* total;
  };
  static constexpr int kMost = 5;
  Task tasks[kMost];
  int64_t begin, chunks, blocks;  // of the span; blocks a task
  bool first, last;               // of the spans to be taken
  const int64_t* known_chunks;    // with cu_seqlens: how many there are in all
};

template <typename F>
__global__ void __launch_bounds__(kThreads) add_chunks(const ColumnSums p) {
  __shared__ F sums[kWarps][32];
  const ColumnSums::Task& task = p.tasks[blockIdx.x / p.blocks];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = blockIdx.x % p.blocks * 32 + lane;
  int64_t chunks = p.chunks;
  if (p.known_chunks != nullptr) chunks = min(chunks, *p.known_chunks - p.begin);
  F sum = 0;
  if (column < task.columns) {
    const F* from = static_cast<const F*>(task.from) + column;
#pragma unroll 4
    for (int64_t i = warp; i < chunks; i += kWarps) sum += from[i * task.columns];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= task.columns) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  F* const total = static_cast<F*>(task.total) + column;
  if (!p.first) sum += *total;
  if (!p.last) {
    *total = sum;
    return;
  }
  store(task.to.at(column / task.width, column % task.width), task.to.dtype, sum);
}

}  // namespace causal_conv1d::gpu::scan
