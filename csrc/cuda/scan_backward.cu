// Backward of the selective scan: its kernels one after another.
#include "scan_backward_gradients.cuh"
#include "scan_backward_plan.h"
#include "scan_backward_states.cuh"
#include "scan_backward_sums.cuh"
#include "scan_launch.cuh"
#include "scan_outside.cuh"

namespace causal_conv1d::gpu::scan {
namespace {

template <typename F>
BackwardProblem problem(const Inputs& p, int multiprocessors) {
  BackwardProblem q{};
  q.sequences = p.sequences.count;
  q.seqlen = p.sequences.seqlen;
  q.dim = p.dim;
  q.groups = p.groups;
  q.dstate = p.dstate;
  q.packed = p.sequences.cu_seqlens != nullptr;
  q.B_constant = p.B_constant;
  q.C_constant = p.C_constant;
  q.size = sizeof(F);
  q.multiprocessors = multiprocessors;
  q.steps = kSteps<F, kLanes>;
  q.channels = kLaneChannels;
  q.align = kAlign;
  return q;
}

BackwardArgs args_of(const ScanInputs& inputs) {
  BackwardArgs p{};
  static_cast<Inputs&>(p) = make_inputs(inputs);
  return p;
}

template <typename F>
class Backward {
 public:
  static constexpr int kRow = kSteps<F, kLanes>, kBlock = kLaneChannels;

  Backward(const ScanBackwardParams& params, int multiprocessors)
      : p(args_of(params.inputs)), plan(problem<F>(p, multiprocessors)) {
    set_views(params);
    p.chunks_a_row = plan.chunks_a_row;
    p.all_chunks = plan.chunks;
    p.passes = plan.passes;
    p.parts = plan.parts;
  }

  int64_t workspace() const { return plan.workspace; }

  void place(char* base) {
    int next = 0;
    const auto take = [&](auto& pointer) {
      const int64_t bytes = plan.bytes[next++];
      pointer = bytes > 0 ? reinterpret_cast<std::decay_t<decltype(pointer)>>(base) : nullptr;
      base += bytes;
    };
    take(p.first_chunks);
    take(p.h);
    take(p.g);
    take(p.dB_constant);
    take(p.dC_constant);
    take(p.sum_dt);
    take(p.sum_D);
    take(p.sum_bias);
    take(p.part_B);
    take(p.part_C);
    take(borders);
    take(totals);
  }

  cudaError_t run(cudaStream_t stream) {
    cudaError_t e = clear_outside_steps(stream);
    if (e == cudaSuccess && p.first_chunks != nullptr) {
      e = launch(count_chunks<kRow>, 1, dim3(kThreads), 0, stream, p);
    }
    if (plan.sweep) {
      for (int64_t i = 0; i + 1 < plan.spans && e == cudaSuccess; ++i) {
        set_span(i);
        p.h_after = border(i);
        e = find_states(stream);
      }
    }
    for (int64_t i = plan.spans; i-- > 0 && e == cudaSuccess;) {
      set_span(i);
      p.h_after = nullptr;
      e = find_states(stream);
      if (e == cudaSuccess) e = find_gradients(stream);
      if (e == cudaSuccess) e = add_up(i, stream);
    }
    return e;
  }

 private:
  BackwardArgs p;
  BackwardPlan plan;
  F *borders = nullptr, *totals = nullptr;

  // A state of all channels: of h at the end of span i, of g at the beginning of span i.
  F* border(int64_t i) const { return borders + i * p.dim * p.dstate; }
  F* border_of_g(int64_t i) const { return border(plan.spans - 1 + i % 2); }

  void set_span(int64_t i) {
    p.begin = i * plan.span;
    p.chunks = std::min(plan.span, plan.chunks - p.begin);
    if (!plan.sweep) return;
    p.h_before = i > 0 ? border(i - 1) : nullptr;
    p.g_after = border_of_g(i + 1);
    p.g_before = border_of_g(i);
  }

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

  // h before and g after each chunk of the span.
  cudaError_t find_states(cudaStream_t stream) const {
    cudaError_t e = cudaSuccess;
    const int64_t blocks = p.chunks * p.groups * p.blocks_a_group(kBlock);
    if constexpr (sizeof(F) == 8) {
      then(e, chunk_ends<F, false>, blocks, stream);
    } else {
      then(e, is_fast() ? chunk_ends<F, true> : chunk_ends<F, false>, blocks, stream);
    }
    if (e != cudaSuccess) return e;
    int64_t slots = p.sequences.count;
    if (plan.spans > 1) {
      const int64_t rows = p.first_chunks != nullptr ? p.chunks : p.chunks / p.chunks_a_row + 2;
      slots = std::min(slots, rows);
    }
    const int64_t pairs = ceil_div(slots * p.dim * p.dstate, 128);
    return launch(pass_states<F>, 2 * pairs, dim3(128), 0, stream, p, slots);
  }

  cudaError_t find_gradients(cudaStream_t stream) const {
    cudaError_t e = cudaSuccess;
    const int64_t blocks = p.chunks * p.groups * p.parts;
    if constexpr (sizeof(F) == 8) {
      then(e, gradients<F, false, true>, blocks, stream);
    } else {
      const bool y = p.dz.given() || p.out.given();
      then(e,
           !is_fast() ? gradients<F, false, true>
           : y        ? gradients<F, true, true>
                      : gradients<F, true, false>,
           blocks, stream);
    }
    const int64_t numbers = p.chunks * p.groups * p.dstate * kRow;
    then(e, add_parts<F>, 2 * ceil_div(numbers, kThreads), stream);
    return e;
  }

  bool is_fast() const { return suits_vectors(p) && p.dout.vectors; }

  cudaError_t add_up(int64_t span, cudaStream_t stream) const {
    ColumnSums sums{};
    sums.begin = p.begin;
    sums.chunks = p.chunks;
    sums.first = span == plan.spans - 1;
    sums.last = span == 0;
    if (p.first_chunks != nullptr) sums.known_chunks = p.first_chunks + p.sequences.count;
    sums.blocks = ceil_div(p.dim * p.dstate, 32);
    int tasks = 0;
    F* total = totals;
    const auto add = [&](const void* from, const View& to, int64_t width) {
      if (!to.given()) return;
      sums.tasks[tasks++] = {from, to, p.dim * width, width, total};
      if (total != nullptr) total += p.dim * width;
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
    return Backward<double>(*params, count).workspace();
  }
  return Backward<float>(*params, count).workspace();
}

causal_conv1d_status causal_conv1d_cuda_scan_backward(
    const causal_conv1d_scan_backward_params* params, int device, void* stream, void* workspace,
    int64_t workspace_size) {
  using namespace causal_conv1d;
  using namespace causal_conv1d::gpu::scan;
  const Status status = check(params);
  if (status.code != CAUSAL_CONV1D_OK) return status;
  const char* const caller = "selective_scan_bwd";
  return run_checked(caller, params, params->inputs.u.dtype, device, [&](auto zero) {
    int count = 0;
    const cudaError_t e = multiprocessors_of(device, &count);
    if (e != cudaSuccess) return gpu::to_status(caller, e);
    Backward<decltype(zero)> backward(*params, count);
    return gpu::run_in_workspace(caller, backward.workspace(), workspace, workspace_size, [&] {
      backward.place(static_cast<char*>(workspace));
      return backward.run(static_cast<cudaStream_t>(stream));
    });
  });
}
