// The backward's first two steps: states at the ends of chunks.
#pragma once

#include "scan_backward.cuh"

namespace causal_conv1d::gpu::scan {

// One block: first_chunks[i] from cu_seqlens.
template <int STEPS>
__global__ void __launch_bounds__(kThreads) count_chunks(const BackwardArgs p) {
  __shared__ int64_t before[kThreads];
  const int64_t all = p.sequences.count, each = (all + kThreads - 1) / kThreads;
  const int64_t first = min(all, threadIdx.x * each), last = min(all, first + each);
  const auto chunks = [&](int64_t i) -> int64_t {
    const Segment s = p.sequences.segment(i);
    return s.end > s.begin ? (s.end - s.first() + STEPS - 1) / STEPS : 0;
  };
  int64_t sum = 0;
  for (int64_t i = first; i < last; ++i) sum += chunks(i);
  before[threadIdx.x] = sum;
  __syncthreads();
  int64_t next = 0;
  for (int i = 0; i < static_cast<int>(threadIdx.x); ++i) next += before[i];
  for (int64_t i = first; i < last; ++i) {
    // No more than there is memory for, whatever cu_seqlens holds.
    p.first_chunks[i] = min(next, p.all_chunks);
    next += chunks(i);
  }
  if (threadIdx.x == kThreads - 1) p.first_chunks[all] = min(next, p.all_chunks);
}

// A lane's part of a sum over the lanes of a channel: x is added up for the even lanes and y for
// the odd ones.
template <typename F>
__device__ __forceinline__ F sum_two(F x, F y, int lane) {
  const bool odd = lane % 2 != 0;
  F sum = (odd ? y : x) + __shfl_xor_sync(~0u, odd ? x : y, 1);
#pragma unroll
  for (int mask = 2; mask < kLanes; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  return sum;
}

template <typename F>
struct EndsShared {
  static constexpr int kStates = 16;
  struct alignas(16) Row {
    F B[kSteps<F, kLanes>], C[kSteps<F, kLanes>], A[kLaneChannels];
  };
  static constexpr int kPitch = sizeof(Row) / sizeof(F);
  Row rows[kStates];
};

template <typename F, bool FAST>
__global__ void __launch_bounds__(kThreads, sizeof(F) == 8 ? 1
                                            : FAST         ? 3
                                                           : 2) chunk_ends(const BackwardArgs p) {
  using Shared = EndsShared<F>;
  constexpr int N = kItems<F>;
  __shared__ Shared shared;
  const uint32_t a_group = static_cast<uint32_t>(p.blocks_a_group(kLaneChannels));
  const uint32_t groups = static_cast<uint32_t>(p.groups), row_of_blocks = blockIdx.x / a_group;
  const int64_t index = row_of_blocks / groups;
  const Chunk chunk = find_chunk<kSteps<F, kLanes>>(p, index);
  if (!chunk.exists) return;
  const BlockChannels channels(p, row_of_blocks % groups, blockIdx.x % a_group);
  const Row at(channels, chunk, N);
  const int dstate = static_cast<int>(p.dstate);
  F dt[N], dtu[N], dy[N], sum = 0;
  TileLoads<F, Shared::kStates, FAST> tiles;
  {
    StepLoads<F, FAST> loads;
    loads.start(p, at);
    tiles.start(p, channels, chunk, 0, min(Shared::kStates, dstate));
    loads.end(p, at, dt, dtu, dy);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) sum += dt[i];
  // Of the steps before and after a lane's.
  F to = sum;
#pragma unroll
  for (int k = 1; k < kLanes; k *= 2) {
    const F other = __shfl_up_sync(~0u, to, k, kLanes);
    if (at.lane >= k) to += other;
  }
  const F total = __shfl_sync(~0u, to, kLanes - 1, kLanes), before = to - sum, after = total - to;
  const int64_t place = index * p.dim + at.d;
  if (at.active && at.lane == 0) static_cast<F*>(p.sum_dt)[place] = total;
  F* const ends = static_cast<F*>(at.lane % 2 == 0 ? p.h : p.g) + place * dstate;
  const bool writes = at.active && at.lane < 2;
  for (int n0 = 0; n0 < dstate; n0 += Shared::kStates) {
    const int many = min(Shared::kStates, dstate - n0);
    if (n0 > 0) {
      tiles.start(p, channels, chunk, n0, many);
      __syncthreads();
    }
    tiles.end(p, channels, chunk, n0, many, shared.rows[0].B, shared.rows[0].C, shared.rows[0].A,
              Shared::kPitch);
    __syncthreads();
    const F* row = shared.rows[0].B + at.lane * (16 / sizeof(F));
    const F* A = shared.rows[0].A + at.channel;
#pragma unroll 2
    for (int n = 0; n < many; ++n, row += Shared::kPitch, A += Shared::kPitch) {
      const F rate = *A;
      F a[N], x[N];
      read_projection<F, FAST>(p.B, p.B_constant, row, at, n0 + n, x);
#pragma unroll
      for (int i = 0; i < N; ++i) a[i] = exp2_of(dt[i] * rate);
      F h = x[0] * dtu[0];
#pragma unroll
      for (int i = 1; i < N; ++i) h = fma(a[i], h, x[i] * dtu[i]);
      read_projection<F, FAST>(p.C, p.C_constant, row + kSteps<F, kLanes>, at, n0 + n, x);
      F g = x[N - 1] * dy[N - 1];
#pragma unroll
      for (int i = N - 2; i >= 0; --i) g = fma(a[i + 1], g, x[i] * dy[i]);
      g *= a[0];
      const F both = sum_two(h * exp2_of(after * rate), g * exp2_of(before * rate), at.lane);
      if (writes) ends[n0 + n] = both;
    }
  }
}

struct SequenceRange {
  int64_t first, end;
};

// The sequences that have chunks in the span; each without any is in one of the spans too.
__device__ __forceinline__ SequenceRange sequences_of_span(const BackwardArgs& p) {
  const int64_t all = p.sequences.count, end = p.begin + p.chunks;
  if (p.chunks == p.all_chunks) return {0, all};
  if (p.first_chunks == nullptr) {
    return {p.begin / p.chunks_a_row, (end + p.chunks_a_row - 1) / p.chunks_a_row};
  }
  const auto first_from = [&](int64_t chunk) {  // of the sequences that begin there or later
    int64_t low = 0, high = all;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (p.first_chunks[middle] < chunk) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  const int64_t first = first_from(p.begin);
  const bool divided = first > 0 && p.first_chunks[first] > p.begin;
  return {divided ? first - 1 : first, end == p.all_chunks ? all : first_from(end)};
}

// A thread takes a state of a channel over a sequence's chunks in the span.
template <typename F>
__device__ __forceinline__ void pass_state(const BackwardArgs& p, bool reverse, int64_t sequence,
                                           int64_t d, int64_t n) {
  const bool packed = p.first_chunks != nullptr;
  const int64_t first = packed ? p.first_chunks[sequence] : sequence * p.chunks_a_row;
  const int64_t last = packed ? p.first_chunks[sequence + 1] : first + p.chunks_a_row;
  const bool begins_before = first<p.begin, ends_after = last> p.begin + p.chunks;
  const int64_t begin = begins_before ? 0 : first - p.begin;
  const int64_t end = ends_after ? p.chunks : last - p.begin;
  const F rate = load_number<F>(p.A.at(d, n), p.A.dtype) * F(kLog2e);
  F* const states = static_cast<F*>(reverse ? p.g : p.h) + d * p.dstate + n;
  const F* const sums = static_cast<const F*>(p.sum_dt) + d;
  const int64_t pitch = p.dim * p.dstate, place = d * p.dstate + n;
  F state;
  if (reverse ? ends_after : begins_before) {
    state = static_cast<const F*>(reverse ? p.g_after : p.h_before)[place];
  } else {
    state = load_or(reverse ? p.dlast_states : p.initial_states, F(0), sequence, d, n);
  }
  constexpr int ahead = sizeof(F) == 8 ? 2 : 8;
  for (int64_t done = 0; done < end - begin; done += ahead) {
    F own[ahead], decay[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (done + k >= end - begin) break;
      const int64_t i = reverse ? end - 1 - done - k : begin + done + k;
      own[k] = states[i * pitch];
      decay[k] = sums[i * p.dim];
    }
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (done + k >= end - begin) break;
      const int64_t i = reverse ? end - 1 - done - k : begin + done + k;
      states[i * pitch] = state;
      state = fma(exp2_of(decay[k] * rate), state, own[k]);
    }
  }
  if (!reverse) {
    if (ends_after && p.h_after != nullptr) static_cast<F*>(p.h_after)[place] = state;
  } else if (begins_before) {
    static_cast<F*>(p.g_before)[place] = state;
  } else if (p.dinitial_states.given()) {
    store(p.dinitial_states.at(sequence, d, n), p.dinitial_states.dtype, state);
  }
}

// Two blocks, one for each direction, take 128 states of every slots-th sequence of the span.
template <typename F>
__global__ void __launch_bounds__(128, sizeof(F) == 8 ? 1 : 7)
    pass_states(const BackwardArgs p, int64_t slots) {
  const int64_t i = static_cast<int64_t>(blockIdx.x / 2) * 128 + threadIdx.x;
  const int64_t a_sequence = p.dim * p.dstate, slot = i / a_sequence;
  const bool reverse = blockIdx.x % 2 != 0;
  if (slot >= slots || (reverse && p.h_after != nullptr)) return;
  const int64_t d = i % a_sequence / p.dstate, n = i % p.dstate;
  const SequenceRange range = sequences_of_span(p);
  for (int64_t s = range.first + slot; s < range.end; s += slots) {
    pass_state<F>(p, reverse, s, d, n);
  }
}

}  // namespace causal_conv1d::gpu::scan
