// Backward of the selective scan: the plan of its workspace, and its kernels one after another.
#include "scan_backward_gradients.cuh"
#include "scan_backward_states.cuh"
#include "scan_backward_sums.cuh"
#include "scan_launch.cuh"
#include "scan_outside.cuh"

namespace causal_conv1d::gpu::scan {
namespace {

// How many channels a block of `gradients` takes: as many as leave each multiprocessor this many
// blocks. The fewer parts, the less memory.
constexpr int64_t kBlocksEach = 16;

template <typename F>
class BackwardPlan {
 public:
  static constexpr int kRow = kSteps<F, kLanes>, kBlock = kLaneChannels;

  BackwardPlan(const ScanBackwardParams& params, int multiprocessors) {
    static_cast<Inputs&>(p) = make_inputs(params.inputs);
    set_views(params);
    const int64_t seqlen = p.sequences.seqlen, sequences = p.sequences.count;
    const bool packed = given(params.inputs.cu_seqlens);
    p.chunks_a_row = ceil_div(seqlen, kRow);
    p.chunks = sequences * p.chunks_a_row;
    // A sequence of n steps has at most (n + kAlign - 1 + kRow - 1) / kRow chunks.
    if (packed) p.chunks = (seqlen + sequences * (kRow + kAlign - 2)) / kRow;
    const int64_t blocks = p.blocks_a_group(kBlock);
    p.passes = p.chunks * p.groups * blocks / (kBlocksEach * multiprocessors);
    if (p.passes > blocks) p.passes = blocks;
    if (p.passes < 1) p.passes = 1;
    p.parts = ceil_div(blocks, p.passes);
  }

  // Workspace from base on; its size.
  int64_t place(char* base) {
    char* next = base;
    const auto take = [&](auto& pointer, int64_t bytes) {
      pointer = bytes > 0 ? reinterpret_cast<std::decay_t<decltype(pointer)>>(next) : nullptr;
      next += ceil_div(bytes, 16) * 16;
    };
    const int64_t size = sizeof(F), channels = p.chunks * p.dim * size;
    const int64_t states = channels * p.dstate;
    const int64_t sums = p.parts * p.chunks * p.groups * p.dstate * kRow * size;
    const bool packed = p.sequences.cu_seqlens != nullptr;
    take(p.first_chunks, packed ? 8 * (p.sequences.count + 1) : 0);
    take(p.h, states);
    take(p.g, states);
    take(p.dB_constant, p.B_constant ? states : 0);
    take(p.dC_constant, p.C_constant ? states : 0);
    take(p.sum_dt, channels);
    take(p.sum_D, channels);
    take(p.sum_bias, channels);
    take(p.part_B, p.B_constant ? 0 : sums);
    take(p.part_C, p.C_constant ? 0 : sums);
    return next - base;
  }

  cudaError_t run(cudaStream_t stream) const {
    cudaError_t e = clear_outside_steps(stream);
    if (e == cudaSuccess && p.first_chunks != nullptr) {
      e = launch(count_chunks<kRow>, 1, dim3(kThreads), 0, stream, p);
    }
    const bool fast = suits_vectors(p) && p.dout.vectors;
    const bool y = p.dz.given() || p.out.given();
    const int64_t blocks = p.groups * p.blocks_a_group(kBlock);
    const int64_t states = p.sequences.count * p.dim * p.dstate;
    if constexpr (sizeof(F) == 8) {
      then(e, chunk_ends<F, false>, p.chunks * blocks, stream);
    } else {
      then(e, fast ? chunk_ends<F, true> : chunk_ends<F, false>, p.chunks * blocks, stream);
    }
    if (e == cudaSuccess) {
      e = launch(pass_states<F>, 2 * ceil_div(states, 128), dim3(128), 0, stream, p);
    }
    const int64_t all = p.chunks * p.groups * p.parts;
    if constexpr (sizeof(F) == 8) {
      then(e, gradients<F, false, true>, all, stream);
    } else {
      then(e,
           !fast ? gradients<F, false, true>
           : y   ? gradients<F, true, true>
                 : gradients<F, true, false>,
           all, stream);
    }
    const int64_t numbers = p.chunks * p.groups * p.dstate * kRow;
    then(e, add_parts<F>, 2 * ceil_div(numbers, kThreads), stream);
    return e == cudaSuccess ? sum_chunks(stream) : e;
  }

 private:
  BackwardArgs p{};

  void set_views(const ScanBackwardParams& params) {
    p.dout = view(params.dout);
    p.dlast_states = view(params.dlast_states);
    p.du = view(params.du);
    p.ddelta = view(params.ddelta);
    p.dA = view(params.dA);
    p.dB = view(params.dB);
    p.dC = view(params.dC);
    p.dD = view(params.dD);
    p.dz = view(params.dz);
    p.ddelta_bias = view(params.ddelta_bias);
    p.dinitial_states = view(params.dinitial_states);
    p.out = view(params.out);
  }

  cudaError_t clear_outside_steps(cudaStream_t stream) const {
    OutsideSteps outside{};
    outside.sequences = p.sequences;
    for (const View* v : {&p.du, &p.ddelta, &p.dz, &p.out}) outside.add(*v, p.dim, 1);
    if (!p.B_constant) outside.add(p.dB, p.groups, p.dstate);
    if (!p.C_constant) outside.add(p.dC, p.groups, p.dstate);
    return clear(outside, stream);
  }

  template <typename Kernel>
  void then(cudaError_t& e, Kernel* kernel, int64_t blocks, cudaStream_t stream) const {
    if (e == cudaSuccess) e = launch(kernel, blocks, dim3(kThreads), 0, stream, p);
  }

  cudaError_t sum_chunks(cudaStream_t stream) const {
    ColumnSums sums{};
    sums.chunks = p.chunks;
    if (p.first_chunks != nullptr) sums.known_chunks = p.first_chunks + p.sequences.count;
    sums.blocks = ceil_div(p.dim * p.dstate, 32);
    int tasks = 0;
    const auto add = [&](const void* from, const View& to, int64_t width) {
      if (to.given()) sums.tasks[tasks++] = {from, to, p.dim * width, width};
    };
    add(p.h, p.dA, p.dstate);
    if (p.B_constant) add(p.dB_constant, p.dB, p.dstate);
    if (p.C_constant) add(p.dC_constant, p.dC, p.dstate);
    add(p.sum_D, p.dD, 1);
    add(p.sum_bias, p.ddelta_bias, 1);
    return launch(add_chunks<F>, tasks * sums.blocks, dim3(kThreads), 0, stream, sums);
  }
};

cudaError_t multiprocessors_of(int device, int* count) {
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace
}  // namespace causal_conv1d::gpu::scan

int64_t causal_conv1d_cuda_scan_backward_workspace_size(
    const causal_conv1d_scan_backward_params* params, int device) {
  using namespace causal_conv1d;
  using namespace causal_conv1d::gpu::scan;
  int count = 0;
  if (check(params).code != CAUSAL_CONV1D_OK) return -1;
  if (!has_work(*params)) return 0;
  if (multiprocessors_of(device, &count) != cudaSuccess) {
    cudaGetLastError();
    return -1;
  }
  if (params->inputs.u.dtype == CAUSAL_CONV1D_FLOAT64) {
    return BackwardPlan<double>(*params, count).place(nullptr);
  }
  return BackwardPlan<float>(*params, count).place(nullptr);
}

causal_conv1d_status causal_conv1d_cuda_scan_backward(
    const causal_conv1d_scan_backward_params* params, int device, void* stream, void* workspace,
    int64_t workspace_size) {
  using namespace causal_conv1d;
  using namespace causal_conv1d::gpu::scan;
  const Status status = check(params);
  if (status.code != CAUSAL_CONV1D_OK) return status;
  return run_checked("selective_scan_bwd", params, params->inputs.u.dtype, device,
                     [&](auto zero) -> cudaError_t {
                       int count = 0;
                       const cudaError_t e = multiprocessors_of(device, &count);
                       if (e != cudaSuccess) return e;
                       BackwardPlan<decltype(zero)> plan(*params, count);
                       const int64_t size = plan.place(static_cast<char*>(workspace));
                       if (size > workspace_size || (size > 0 && workspace == nullptr)) {
                         return cudaErrorInvalidValue;
                       }
                       return plan.run(static_cast<cudaStream_t>(stream));
                     });
}
