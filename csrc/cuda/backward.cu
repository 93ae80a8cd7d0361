// The backward's plan, and its kernels for any width, strides and type, which compute one output a
// thread and dz anew for each; and what adds up partial sums.
#include "backward.cuh"

#include <cub/block/block_reduce.cuh>

#include "launch.cuh"

namespace causal_conv1d::gpu {
namespace {

template <typename T>
__device__ Compute<T> dz_at(const BackwardArgs<T>& p, int64_t b, int64_t d, int64_t t) {
  const int id = p.seq_idx.at(b, t);
  if (id < 0) return 0;
  Compute<T> z = p.bias.given() ? p.bias.load(d) * p.scale : Compute<T>(0);
  for (int k = 0; k < p.width; ++k) {
    const int64_t s = t - (p.width - 1) + k;
    const bool same = p.seq_idx.at(b, max(s, int64_t(0))) == id;
    z = fma(p.weight.load(d, k) * p.scale, same ? p.input(b, d, s) : Compute<T>(0), z);
  }
  return p.gradient(z, to_compute(*p.dout.at(b, d, t)));
}

// dx at s, which lies before the sequence for dinitial_states, without dfinal_states.
template <typename T>
__device__ Compute<T> dx_at(const BackwardArgs<T>& p, int64_t b, int64_t d, int64_t s) {
  Compute<T> a = 0;
  for (int j = 0; j < p.width; ++j) {
    const int64_t t = s + j;
    if (t < 0 || t >= p.seqlen) continue;
    if (p.seq_idx.at(b, t) != p.seq_idx.at(b, max(s, int64_t(0)))) continue;
    a = fma(p.weight.load(d, p.width - 1 - j) * p.scale, dz_at(p, b, d, t), a);
  }
  return a;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_any_width(const BackwardArgs<T> p, bool dim_fastest) {
  int64_t b, d, s;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (dim_fastest) {
    b = split(split(n, p.dim, &d), p.seqlen, &s);
  } else {
    b = split(split(n, p.seqlen, &s), p.dim, &d);
  }
  if (b < p.batch) *p.dx.at(b, d, s) = from_compute<T>(dx_at(p, b, d, s) + p.dfinal(b, d, s));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_initial_states(const BackwardArgs<T> p) {
  int64_t d, j;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = split(split(n, p.width - 1, &j), p.dim, &d);
  if (b >= p.batch) return;
  const int64_t s = j - (p.width - 1);
  p.dinitial_states.store(dx_at(p, b, d, s) + p.dfinal(b, d, s), b, d, j);
}

// The same where seq_idx and dfinal_states are given, and dx of rows with padding among their last
// W-1 steps: the other kernels add dfinal_states to it in the wrong places, so it is computed anew
// in these and in the right ones. A block has channels of one row, and of its steps every
// `slots`-th from `slot` on.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    backward_padded_ends(const BackwardArgs<T> p, int slots) {
  wait_for_kernel_before();
  let_next_kernel_start();
  int64_t d, slot;
  const int64_t b = split(split(blockIdx.x, slots, &slot), ceil_div(p.dim, kThreads), &d);
  d = d * kThreads + threadIdx.x;
  const int states = p.width - 1;
  bool padded = false;
  for (int64_t i = 1 + threadIdx.x % 32; i <= min(p.seqlen, int64_t(states)); i += 32) {
    padded |= p.seq_idx.at(b, p.seqlen - i) < 0;
  }
  padded = __any_sync(0xffffffff, padded);
  if (!padded && !p.dinitial_states.given()) return;
  const int64_t end = padded ? p.seq_idx.end(b, p.seqlen) : p.seqlen;
  if (d >= p.dim) return;
  // Before the row, where dfinal_states goes, and where it went.
  for (int i = static_cast<int>(slot); i < (padded ? 3 : 1) * states; i += slots) {
    asm volatile("" : "+l"(d));  // or registers would be taken for what is the same
    const int place = i / states, j = i - place * states;
    const int64_t s = j + (place == 0 ? 0 : (place == 1 ? end : p.seqlen)) - states;
    if (place == 0 ? !p.dinitial_states.given() : s < (place == 1 ? 0 : end)) continue;
    const Compute<T> sum = dx_at(p, b, d, s) + p.dfinal(b, d, s, end);
    if (place == 0) {
      p.dinitial_states.store(sum, b, d, j);
    } else {
      *p.dx.at(b, d, s) = from_compute<T>(sum);
    }
  }
}

// One block a (part, d): the sums of one chunk of one row.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_any_width_partials(const BackwardArgs<T> p) {
  using BlockReduce = cub::BlockReduce<Compute<T>, kThreads>;
  __shared__ typename BlockReduce::TempStorage storage;
  int64_t d, chunk;
  const int64_t part = split(blockIdx.x, p.dim, &d);
  const int64_t b = split(part, p.chunks, &chunk);
  const int64_t t0 = chunk * p.chunk, t1 = min(t0 + p.chunk, p.seqlen);
  for (int k = 0; k <= p.width; ++k) {
    Compute<T> sum = 0;
    for (int64_t t = t0 + threadIdx.x; t < t1; t += kThreads) {
      const int64_t s = t - (p.width - 1) + k;
      const int id = p.seq_idx.at(b, t);
      if (id < 0) continue;  // there x may be anything
      const Compute<T> dz = dz_at(p, b, d, t);
      if (k == p.width) {
        sum += dz;
      } else if (p.seq_idx.at(b, max(s, int64_t(0))) == id) {
        sum = fma(dz, p.input(b, d, s), sum);
      }
    }
    sum = BlockReduce(storage).Sum(sum);
    __syncthreads();
    if (threadIdx.x == 0) *p.partial(part, k, d) = sum;
  }
}

// Adds up the partial sums of one (k, d) in a fixed order: kLanes threads take every kLanes-th
// part.
constexpr int kLanes = 8;

template <typename T>
__global__ void __launch_bounds__(kThreads) reduce_partials(const BackwardArgs<T> p) {
  constexpr int kColumns = kThreads / kLanes;
  __shared__ Compute<T> sums[kLanes][kColumns];
  const int column = threadIdx.x % kColumns, part_lane = threadIdx.x / kColumns;
  const int64_t columns = (p.width + 1) * p.dim;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  Compute<T> sum = 0, lost = 0;  // Kahan's: there may be millions of parts
  wait_for_kernel_before();
  let_next_kernel_start();
  if (i < columns) {
#pragma unroll 4
    for (int64_t part = part_lane; part < p.parts; part += kLanes) {
      const Compute<T> v = load_once(&p.partials[part * columns + i]) - lost;
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

template <typename T>
cudaError_t run(const BackwardParams& params, BackwardPlan plan, void* workspace,
                cudaStream_t stream) {
  if (!has_every_kernel()) {
    plan.vector = 1;
    plan.access = Access::kStrided;
    plan.columns = Columns(params.x.sizes[1], plan.chunks, plan.columns.bits);
  }
  BackwardArgs<T> p{};
  p.x = view<T>(params.x);
  p.dout = view<T>(params.dout);
  p.dx = view<T>(params.dx);
  p.weight = any_view<Compute<T>>(params.weight);
  p.bias = any_view<Compute<T>>(params.bias);
  p.initial_states = any_view<Compute<T>>(params.initial_states);
  p.dfinal_states = any_view<Compute<T>>(params.dfinal_states);
  p.dweight = any_view<Compute<T>>(params.dweight);
  p.dbias = any_view<Compute<T>>(params.dbias);
  p.dinitial_states = any_view<Compute<T>>(params.dinitial_states);
  p.seq_idx = seq_idx_view(params.seq_idx);
  p.batch = params.x.sizes[0];
  p.dim = params.x.sizes[1];
  p.seqlen = params.x.sizes[2];
  p.width = static_cast<int>(params.weight.sizes[1]);
  p.silu = params.silu != 0;
  p.scale = pre_activation_scale<T>(p.silu);
  p.x_end = p.x.data + extent(params.x);
  p.dout_end = p.dout.data + extent(params.dout);
  p.x_row = p.x.time * static_cast<int64_t>(sizeof(T));
  p.dout_row = p.dout.time * static_cast<int64_t>(sizeof(T));
  p.dx_row = p.dx.time * static_cast<int64_t>(sizeof(T));
  p.chunk = plan.chunk;
  p.chunks = plan.chunks;
  p.rows = plan.rows;
  p.columns = plan.columns;
  p.wide = plan.wide;
  p.by_dim = Divisor(p.dim);
  p.by_chunks = Divisor(plan.chunks);
  p.parts = plan.parts;
  p.sums = given(params.dweight) || given(params.dbias);
  p.whole = plan.whole;
  p.part_bits = plan.part_bits;
  p.partials = plan.partials > 0 ? static_cast<Compute<T>*>(workspace) : nullptr;
  if (plan.matches_pitch > 0) {
    p.matches = static_cast<uint8_t*>(workspace) + plan.partials;
    p.mismatches = p.matches + p.batch * plan.matches_pitch;
  }
  p.matches_pitch = plan.matches_pitch;

  cudaError_t e = cudaSuccess;
  const bool padded_ends = p.dfinal_states.given() && p.seq_idx.data != nullptr && p.seqlen > 0;
  if (p.dinitial_states.given() && !padded_ends) {
    e = launch(backward_initial_states<T>, p.batch * p.dim * (p.width - 1), stream, p);
  }
  if (e == cudaSuccess && has_elements(params.x)) {
    if (plan.any_width) {
      e = launch(backward_any_width<T>, p.batch * p.dim * p.seqlen, stream, p, plan.channel_last);
      if (e == cudaSuccess && p.partials != nullptr) {
        e = launch(backward_any_width_partials<T>, p.batch * p.chunks * p.dim * kThreads, stream,
                   p);
      }
    } else if constexpr (sizeof(T) <= 4) {
      e = plan.channel_last ? launch_backward_channel_last<T>(p, plan, stream)
                            : launch_backward_channel_first<T>(p, plan, stream);
    }
  }
  if (e == cudaSuccess && p.sums && !plan.whole) {  // no positions at all: the sums are zero
    e = launch_early(reduce_partials<T>, (p.width + 1) * p.dim * kLanes, stream, p);
  }
  if (e == cudaSuccess && padded_ends) {
    const int slots = p.width - 1 < 8 ? p.width - 1 : 8;
    const int64_t row = ceil_div(p.dim, kThreads) * kThreads;
    e = launch_early(backward_padded_ends<T>, p.batch * row * slots, stream, p, slots);
  }
  return e;
}

}  // namespace

BackwardPlan::BackwardPlan(const BackwardParams& params) {
  const Tensor& x = params.x;
  const int size =
      x.dtype == CAUSAL_CONV1D_FLOAT64 ? 8 : (x.dtype == CAUSAL_CONV1D_FLOAT32 ? 4 : 2);
  const bool none = !has_elements(x);  // the other sizes may then be of any magnitude
  const int64_t batch = none ? 0 : x.sizes[0], dim = x.sizes[1], seqlen = none ? 0 : x.sizes[2];
  const int64_t width = params.weight.sizes[1];
  any_width = width > 8 || size == 8 || batch * dim * ceil_div(seqlen, 64) > kMostParts;
  channel_last = is_channel_last(x);
  vector = 1;
  if (any_width) {
    chunk = 4096;
    chunks = ceil_div(seqlen, chunk);
    parts = batch * chunks;
  } else if (channel_last) {
    const int widest = width > 4 || size == 4 ? 2 : 4;  // more would spill registers
    vector =
        common_channels(widest, size, dim, {&x, &params.dout, &params.dx}) == widest ? widest : 1;
    wide = common_channels(16 / size, size, dim, {&x, &params.dout}) == 16 / size;
    // Chunks of even length, of a multiple of U plus 1 steps, as many as `down` blocks take.
    const int64_t U = width > 4 ? 8 : 4;
    auto even_chunk = [&](int64_t down) {
      return ceil_div(ceil_div(seqlen, down * kBackwardLines) - 1, U) * U + 1;
    };
    // Long chunks repeat less work at their ends, short ones make more blocks. Those are taken
    // whose blocks need the fewest steps one after the other, so many blocks at a time as 132 SMs
    // run, with 3 steps more a block, a fifth of a chunk until the last have ended, and 0.15
    // steps to add up the sums of a block: so fitted to 21 shapes in two types. Blocks are counted
    // as if tensors were aligned, for the sums' order not to depend on that.
    const int64_t across = ceil_div(ceil_div(dim, widest), 32);
    int64_t best = 1, fewest = INT64_MAX, down_before = 0;
    for (int64_t most = 129; most >= 17 && seqlen > 0; most -= U) {
      const int64_t down = ceil_div(seqlen, most * kBackwardLines);
      if (down == down_before) continue;
      down_before = down;
      const int64_t steps = even_chunk(down);
      const int64_t blocks = batch * ceil_div(ceil_div(seqlen, steps), kBackwardLines);
      const int64_t rounds = ceil_div(blocks * across, 528);
      const int64_t cost = 20 * rounds * (steps + 3) + 4 * steps + 3 * blocks;
      if (cost >= fewest) continue;
      fewest = cost;
      best = steps;
    }
    chunk = best;
    chunks = ceil_div(seqlen, chunk);
    columns = Columns(dim / vector, chunks, 5);  // whatever vector is, kBackwardLines high
    parts = batch * ceil_div(chunks, kBackwardLines);
  } else {
    vector = width > 4 || size == 2 ? 8 : 4;
    access = common_access({&x, &params.dout, &params.dx}, size);
    const bool ragged = seqlen % (16 / size) != 0;
    const int64_t tile = 32 * vector;
    const int64_t tiles = ceil_div(seqlen + (ragged ? 16 / size - 1 : 0), tile);
    const int64_t all = batch * tiles;
    auto divide = [&](int64_t most) {  // tiles a warp
      chunks = ceil_div(tiles, most);
      chunk = chunks > 0 ? ceil_div(tiles, chunks) * tile : tile;
      rows = chunks == 1 ? min(most / tiles, batch) : 1;
      parts = rows > 0 ? ceil_div(batch, rows) * chunks : 0;
    };
    // A block takes all parts of a channel if these are few enough: one, two or four warps a
    // channel, as many as there need be for so many of them, or for blocks that are nearly a
    // multiple of the 528 that 132 SMs run at a time, if each has 8 tiles or more.
    const int64_t warps = size == 2 ? 4096 : 8192;
    auto idle = [&](int bits) {  // of 100 places for blocks, until the last have ended
      const int64_t blocks = ceil_div(dim << bits, kThreads / 32), rounds = ceil_div(blocks, 528);
      return 100 - 100 * blocks / (rounds * 528);
    };
    for (int bits = 0; bits <= 2 && !whole && all > 0; ++bits) {
      const int64_t most = ceil_div(all, 1 << bits);
      const bool few = dim << bits < warps || (!ragged && idle(bits) > idle(bits + 1) + 10);
      const bool more = bits < 2 && most >= 16 && few;
      if (more || most > (dim >= 1024 ? 64 : 8)) continue;
      divide(most);
      whole = parts <= 1 << bits;
      part_bits = bits;
    }
    // Else warps take what makes 16k of them.
    const int64_t fair = ceil_div(dim * all, 16384);
    if (!whole) divide(fair < 8 ? 8 : (fair > 16 ? 16 : fair));
    using Row = Matches<8, 7>;  // which needs most
    if (given(params.seq_idx)) matches_pitch = Row::kBefore + tiles * tile + Row::kAfter;
  }
  const bool sums = given(params.dweight) || given(params.dbias);
  partials = sums && !whole ? parts * (width + 1) * dim * (size == 8 ? 8 : 4) : 0;
  workspace = partials + batch * (matches_pitch + matches_pitch / kThreads);
}

}  // namespace causal_conv1d::gpu

int64_t causal_conv1d_cuda_backward_workspace_size(const causal_conv1d_backward_params* params) {
  using namespace causal_conv1d;
  if (check(params).code != CAUSAL_CONV1D_OK) return -1;
  return gpu::BackwardPlan(*params).workspace;
}

causal_conv1d_status causal_conv1d_cuda_backward(const causal_conv1d_backward_params* params,
                                                 int device, void* stream, void* workspace,
                                                 int64_t workspace_size) {
  using namespace causal_conv1d;
  return gpu::run_operator("causal_conv1d_bwd", params, device, [&](auto zero) {
    const gpu::BackwardPlan plan(*params);
    if (plan.workspace > workspace_size || (plan.workspace > 0 && workspace == nullptr)) {
      return cudaErrorInvalidValue;
    }
    return gpu::run<decltype(zero)>(*params, plan, workspace, static_cast<cudaStream_t>(stream));
  });
}
