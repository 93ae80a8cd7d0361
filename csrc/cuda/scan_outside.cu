#include "scan_outside.cuh"

#include "launch.cuh"

namespace causal_conv1d::gpu::scan {
namespace {

constexpr int kThreads = 256, kMostBlocks = 1024;  // a task

__global__ void __launch_bounds__(kThreads) clear_outside(const OutsideSteps p) {
  const int64_t begin = p.sequences.offset(0);
  const int64_t end = max(begin, p.sequences.offset(p.sequences.count));
  const int64_t steps = begin + p.sequences.seqlen - end;  // of a row, outside
  const OutsideSteps::Task& task = p.tasks[blockIdx.y];
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < task.rows * task.width * steps; i += stride) {
    const int64_t row = i / steps, step = i % steps;
    const int64_t t = step < begin ? step : step - begin + end;
    char* const to = task.to.at(0, row / task.width, row % task.width) + t * task.to.step;
    if (task.to.dtype == CAUSAL_CONV1D_FLOAT64) {
      store(to, task.to.dtype, 0.0);
    } else {
      store(to, task.to.dtype, 0.f);
    }
  }
}

}  // namespace

cudaError_t clear(const OutsideSteps& p, cudaStream_t stream) {
  if (p.sequences.cu_seqlens == nullptr || p.count == 0) return cudaSuccess;
  int64_t most = 0;
  for (int i = 0; i < p.count; ++i) {
    const int64_t rows = p.tasks[i].rows * p.tasks[i].width;
    most = most < rows ? rows : most;
  }
  const int64_t blocks = ceil_div(most * p.sequences.seqlen, kThreads);
  if (blocks == 0) return cudaSuccess;
  const int64_t started = blocks < kMostBlocks ? blocks : kMostBlocks;
  clear_outside<<<dim3(static_cast<unsigned>(started), static_cast<unsigned>(p.count)), kThreads, 0,
                  stream>>>(p);
  return cudaGetLastError();
}

}  // namespace causal_conv1d::gpu::scan
