// Forward of the selective scan. A block takes its channels of a sequence from the first chunk of
// steps to the last; states go from chunk to chunk in shared memory. With few channels, SPLIT warps
// share the states of a channel, so that there are more warps; they share the work on steps too.
#include "scan_inputs.cuh"
#include "scan_launch.cuh"
#include "scan_outside.cuh"

namespace causal_conv1d::gpu::scan {
namespace {

constexpr int kStates = 16;  // of a tile

struct ForwardArgs : Inputs {
  View out, ungated, last_states;
  int64_t batch;
};

// One choice of kernel. BYTES: of the elements of u, delta, z, B and C, 2 or 4; 0: any.
template <typename Float, int LANES, int ITEMS, int SPLIT_, bool FAST_, int BYTES_ = 0,
          int WARPS = kWarps>
struct Form {
  using F = Float;
  static constexpr int kThreads = 32 * WARPS;
  static constexpr int TL = LANES, SPLIT = SPLIT_, kChannels = WARPS / SPLIT * (32 / TL);
  static constexpr int N = ITEMS, kOwn = N / SPLIT, kRow = TL * N;
  static constexpr int kPiece = kOwn < kItems<F> ? kOwn : kItems<F>;  // in one Raw
  static constexpr bool FAST = FAST_;  // suits_vectors(), as all tensors do
  static constexpr int BYTES = BYTES_;
  // Blocks of fewer warps are for compute capability 7.5 alone, see run().
  static constexpr bool kHere = WARPS >= kWarps || kTuring;
};

template <typename K>
using Tile = TileRow<typename K::F, K::TL, K::N, K::kThreads>;

// What is needed once a chunk is kept here too, to leave the registers to the loop over states.
// Behind it lie the states, dstate * kChannels.
template <typename K>
struct Shared {
  using F = typename K::F;
  struct alignas(16) Row {
    F B[K::kRow], C[K::kRow], A[K::kChannels];  // A times log2(e)
  };
  Row rows[kStates];
  // Of SPLIT warps, in rows as of a tile: dt, dt u, and each warp's part of y.
  alignas(16) F exchange[K::SPLIT == 1 ? 4 : (2 + K::SPLIT) * K::kChannels * K::kRow];
  F bias[K::kChannels], skip[K::kChannels];
  int64_t u[K::kChannels], delta[K::kChannels], z[K::kChannels], out[K::kChannels];  // rows
  Segment segment;
  int64_t sequence;
  Channels<K::kChannels> channels;

  __device__ __forceinline__ F* states() { return reinterpret_cast<F*>(this + 1); }
};
template <typename K>
constexpr int kPitch = sizeof(typename Shared<K>::Row) / sizeof(typename K::F);

// A thread's channel in the block, its lane in time, and which part of the states it takes.
template <typename K>
struct Place {
  int channel, lane, part;
  __device__ __forceinline__ Place() {
    const int place = threadIdx.x / K::TL;
    channel = place % K::kChannels;
    part = place / K::kChannels;
    lane = threadIdx.x % K::TL;
  }
};

template <typename K>
__device__ __forceinline__ void begin_block(const ForwardArgs& p, Shared<K>& shared) {
  using F = typename K::F;
  constexpr int channels = K::kChannels;
  const uint32_t a_group = static_cast<uint32_t>(p.blocks_a_group(channels));
  const uint32_t row = blockIdx.x / a_group, groups = static_cast<uint32_t>(p.groups);
  const int64_t sequence = row / groups;
  const Channels<channels> own(p, row % groups, blockIdx.x % a_group);
  const Segment segment = p.sequences.segment(sequence);
  if (threadIdx.x == 0) {
    shared.segment = segment;
    shared.sequence = sequence;
    shared.channels = own;
  }
  if (threadIdx.x < channels) {
    const bool active = static_cast<int>(threadIdx.x) < own.count;
    const int64_t d = own.first + threadIdx.x;
    shared.bias[threadIdx.x] = active ? load_or(p.delta_bias, F(0), d) : F(0);
    shared.skip[threadIdx.x] = active ? load_or(p.D, F(0), d) : F(0);
    shared.u[threadIdx.x] = p.u.offset(segment.batch, d);
    shared.delta[threadIdx.x] = p.delta.offset(segment.batch, d);
    shared.z[threadIdx.x] = p.z.offset(segment.batch, d);
    shared.out[threadIdx.x] = p.out.offset(segment.batch, d);
  }
  const int dstate = static_cast<int>(p.dstate);
  for (int n0 = 0; n0 < dstate; n0 += kStates) {
    PendingChannels<F, kStates, channels, K::kThreads> states;
    states.load(dstate - n0, own.count, [&](int channel, int n, bool there) {
      return there ? load_or(p.initial_states, F(0), sequence, own.first + channel, n0 + n) : F(0);
    });
    states.store(dstate - n0, [&](int channel, int n, F x) {
      shared.states()[(n0 + n) * channels + channel] = x;
    });
  }
  __syncthreads();
}

// Tiles of the states from n0 on.
template <typename K>
__device__ __forceinline__ void fill_tiles(const ForwardArgs& p, Shared<K>& shared, int n0,
                                           int many, int64_t t0) {
  const Segment s = shared.segment;
  const int64_t group = shared.channels.group;
  if (K::FAST || !p.B_constant) {
    Tile<K>::fill_any(p.B, s, group, n0, many, t0, shared.rows[0].B, kPitch<K>);
  }
  if (K::FAST || !p.C_constant) {
    Tile<K>::fill_any(p.C, s, group, n0, many, t0, shared.rows[0].C, kPitch<K>);
  }
  PendingRates<typename K::F, kStates, K::kChannels, K::kThreads> rates;
  rates.load(p, shared.channels.first, n0, many, shared.channels.count);
  rates.store(p, many, shared.rows[0].A, kPitch<K>);
}

// What a thread reads and writes: kOwn steps from t on, of which part is there.
template <typename K>
struct Own {
  int64_t t;
  Part part;
  __device__ __forceinline__ Own(const Shared<K>& shared, const Place<K>& at, int64_t t0) {
    const int first = at.lane * K::N + at.part * K::kOwn;
    const Part chunk = Part::of(t0, shared.segment.begin, shared.segment.end);
    t = t0 + first;
    part = {chunk.first - first, at.channel < shared.channels.count ? chunk.last - first : 0};
  }
};

// What a thread knows of its lane's steps.
template <typename K>
struct Steps {
  typename K::F dt[K::N], dtu[K::N], y[K::N], sum;  // sum: of dt
};

// A thread's own steps of a tensor on their way.
template <typename K>
struct OwnLoad {
  using F = typename K::F;
  static constexpr int kPieces = K::kOwn / K::kPiece;
  Raw<F, K::kPiece> raw[kPieces];

  __device__ __forceinline__ void start(const View& v, const char* from, Part part) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int first = i * K::kPiece;
      start_load<K::FAST>(raw[i], v, from + first * v.step, part.from(first));
    }
  }
  __device__ __forceinline__ void end(const View& v, Part part, F (&x)[K::kOwn]) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      F piece[K::kPiece];
      end_load<K::FAST>(raw[i], v, part.from(i * K::kPiece), piece);
#pragma unroll
      for (int j = 0; j < K::kPiece; ++j) x[i * K::kPiece + j] = piece[j];
    }
  }
};

template <typename K>
__device__ __forceinline__ void store_own(const View& v, char* to, Part part,
                                          const typename K::F (&x)[K::kOwn]) {
#pragma unroll
  for (int i = 0; i < K::kOwn; i += K::kPiece) {
    typename K::F piece[K::kPiece];
#pragma unroll
    for (int j = 0; j < K::kPiece; ++j) piece[j] = x[i + j];
    store_part(v, to + i * v.step, part.from(i), piece);
  }
}

template <typename K>
struct Loads {
  OwnLoad<K> u, delta;

  __device__ __forceinline__ void start(const ForwardArgs& p, const Shared<K>& shared,
                                        const Place<K>& at, const Own<K>& own) {
    const char* const u_from = p.u.data + shared.u[at.channel] + own.t * p.u.step;
    const char* const delta_from = p.delta.data + shared.delta[at.channel] + own.t * p.delta.step;
    delta.start(p.delta, delta_from, own.part);
    u.start(p.u, u_from, own.part);
    if (!K::FAST) return;
    if (p.z.given()) {
      prefetch(p.z.data + shared.z[at.channel] + own.t * p.z.step, own.part.has_any(K::kOwn));
    }
    const bool next = own.part.last > K::kRow;
    prefetch(delta_from + K::kRow * p.delta.step, next);
    prefetch(u_from + K::kRow * p.u.step, next);
  }
};

// A row of a channel in shared.exchange: row 0 and 1, or 2 and a warp's part.
template <typename K>
__device__ __forceinline__ typename K::F* exchange_row(Shared<K>& shared, const Place<K>& at,
                                                       int row) {
  return shared.exchange + (row * K::kChannels + at.channel) * K::kRow + at.lane * Tile<K>::kVector;
}
// Of the lane's steps there, those that are the warp's own.
template <typename K>
__device__ __forceinline__ void store_own_steps(const Place<K>& at,
                                                const typename K::F (&x)[K::kOwn],
                                                typename K::F* row) {
#pragma unroll
  for (int i = 0; i < K::kOwn; i += Tile<K>::kVector) {
    typename K::F v[Tile<K>::kVector];
#pragma unroll
    for (int j = 0; j < Tile<K>::kVector; ++j) v[j] = x[i + j];
    store_vector(row + (at.part * K::kOwn + i) * K::TL, v);
  }
}

// The steps that come with loads; after a barrier take_steps() has all of the lane's.
template <typename K>
__device__ __forceinline__ void end_loads(const ForwardArgs& p, Shared<K>& shared,
                                          const Place<K>& at, const Own<K>& own,
                                          const Loads<K>& loads, Steps<K>& steps) {
  using F = typename K::F;
  F u[K::kOwn], dt[K::kOwn];
  loads.delta.end(p.delta, own.part, dt);
  to_dt(p, shared.bias[at.channel], own.part, dt);
  loads.u.end(p.u, own.part, u);
  const F skip = shared.skip[at.channel];
#pragma unroll
  for (int i = 0; i < K::N; ++i) {
    const bool mine = K::SPLIT == 1 || i / K::kOwn == at.part;
    steps.y[i] = mine ? skip * u[i % K::kOwn] : F(0);
  }
#pragma unroll
  for (int i = 0; i < K::kOwn; ++i) u[i] *= dt[i];
  if constexpr (K::SPLIT == 1) {
#pragma unroll
    for (int i = 0; i < K::N; ++i) steps.dt[i] = dt[i], steps.dtu[i] = u[i];
  } else {
    store_own_steps(at, dt, exchange_row(shared, at, 0));
    store_own_steps(at, u, exchange_row(shared, at, 1));
  }
}

template <typename K>
__device__ __forceinline__ void take_steps(Shared<K>& shared, const Place<K>& at, Steps<K>& steps) {
  if constexpr (K::SPLIT > 1) {
    Tile<K>::read(exchange_row(shared, at, 0), steps.dt);
    Tile<K>::read(exchange_row(shared, at, 1), steps.dtu);
  }
  steps.sum = 0;
#pragma unroll
  for (int i = 0; i < K::N; ++i) steps.sum += steps.dt[i];
}

// Adds up the warps' parts of y: a warp writes all steps and takes its own.
template <typename K>
__device__ __forceinline__ void add_parts(Shared<K>& shared, const Place<K>& at,
                                          const Steps<K>& steps, typename K::F (&y)[K::kOwn]) {
  using F = typename K::F;
  F* const row = exchange_row(shared, at, 2 + at.part);
#pragma unroll
  for (int i = 0; i < K::N; i += Tile<K>::kVector) {
    F v[Tile<K>::kVector];
#pragma unroll
    for (int j = 0; j < Tile<K>::kVector; ++j) v[j] = steps.y[i + j];
    store_vector(row + i * K::TL, v);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < K::kOwn; i += Tile<K>::kVector) {
#pragma unroll
    for (int part = 0; part < K::SPLIT; ++part) {
      F v[Tile<K>::kVector];
      load_vector(exchange_row(shared, at, 2 + part) + (at.part * K::kOwn + i) * K::TL, v);
#pragma unroll
      for (int j = 0; j < Tile<K>::kVector; ++j) y[i + j] = part == 0 ? v[j] : y[i + j] + v[j];
    }
  }
}

// The chunk's steps and its first tile: all loads start before anything waits for one.
template <typename K>
__device__ __forceinline__ void begin_chunk(const ForwardArgs& p, Shared<K>& shared,
                                            const Place<K>& at, int64_t t0, Steps<K>& steps) {
  const int many = static_cast<int>(min(p.dstate, static_cast<int64_t>(kStates)));
  Loads<K> loads;
  Projections<typename K::F, K::TL, K::N, kStates, K::FAST, K::kThreads> projections;
  PendingRates<typename K::F, kStates, K::kChannels, K::kThreads> rates;
  loads.start(p, shared, at, Own<K>(shared, at, t0));
  projections.load(p, shared.segment, shared.channels.group, 0, many, t0);
  // Else A is there: all states are in one tile.
  const bool new_rates = p.dstate > kStates || t0 == shared.segment.first();
  if (new_rates) rates.load(p, shared.channels.first, 0, many, shared.channels.count);
  __syncthreads();
  typename Shared<K>::Row& row = shared.rows[0];
  projections.store(p, shared.segment, shared.channels.group, 0, many, t0, row.B, row.C, kPitch<K>);
  if (new_rates) rates.store(p, many, row.A, kPitch<K>);
  end_loads(p, shared, at, Own<K>(shared, at, t0), loads, steps);
  __syncthreads();
  take_steps(shared, at, steps);
}

template <typename K>
__device__ __forceinline__ void store_steps(const ForwardArgs& p, Shared<K>& shared,
                                            const Place<K>& at, int64_t t0, const Steps<K>& steps) {
  using F = typename K::F;
  F y[K::kOwn];
  if constexpr (K::SPLIT > 1) {
    add_parts(shared, at, steps, y);
  } else {
#pragma unroll
    for (int i = 0; i < K::kOwn; ++i) y[i] = steps.y[i];
  }
  const Own<K> own(shared, at, t0);
  if (p.ungated.given()) {
    const int64_t d = shared.channels.first + at.channel;
    store_own<K>(p.ungated, p.ungated.at(shared.segment.batch, d) + own.t * p.ungated.step,
                 own.part, y);
  }
  if (p.z.given()) {
    OwnLoad<K> load;
    F z[K::kOwn];
    load.start(p.z, p.z.data + shared.z[at.channel] + own.t * p.z.step, own.part);
    load.end(p.z, own.part, z);
#pragma unroll
    for (int i = 0; i < K::kOwn; ++i) y[i] *= z[i] * sigmoid(z[i]);
  }
  store_own<K>(p.out, p.out.data + shared.out[at.channel] + own.t * p.out.step, own.part, y);
}

// B or C of a lane's steps: from the tile, or the channel's number if constant in time.
template <typename K>
__device__ __forceinline__ void read_projection(const View& v, bool constant, const Shared<K>& s,
                                                int channel, int n, const typename K::F* row,
                                                typename K::F (&x)[K::N]) {
  using F = typename K::F;
  if (!K::FAST && constant) {
    const bool active = channel < s.channels.count;
    const F value = active ? load_number<F>(v.at(s.channels.first + channel, n), v.dtype) : F(0);
#pragma unroll
    for (int i = 0; i < K::N; ++i) x[i] = value;
  } else {
    Tile<K>::read(row, x);
  }
}

// Adds to y the part of states n0 + at.part, n0 + at.part + SPLIT, ...
template <typename K>
__device__ __forceinline__ void add_states(const ForwardArgs& p, Shared<K>& shared,
                                           const Place<K>& at, int n0, int many, Steps<K>& steps) {
  using F = typename K::F;
  constexpr int N = K::N;
  const bool first = at.lane == 0, last = at.lane == K::TL - 1;
  const F* row = shared.rows[at.part].B + at.lane * (16 / sizeof(F));
  const F* rate = shared.rows[at.part].A + at.channel;
  F* state = shared.states() + (n0 + at.part) * K::kChannels + at.channel;
#pragma unroll 1
  for (int n = at.part; n < many; n += K::SPLIT) {
    const F A = *rate, carry = first ? *state : F(0);
    F a[N], x[N], c[N];
    read_projection(p.B, p.B_constant, shared, at.channel, n0 + n, row, x);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      a[i] = exp2_of(steps.dt[i] * A);
      x[i] *= steps.dtu[i];
    }
    F end = x[0];
#pragma unroll
    for (int i = 1; i < N; ++i) end = fma(a[i], end, x[i]);
    F h = scan_forward<K::TL>(exp2_of(steps.sum * A), end, carry, first);
    read_projection(p.C, p.C_constant, shared, at.channel, n0 + n, row + K::kRow, c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      h = fma(a[i], h, x[i]);
      steps.y[i] = fma(c[i], h, steps.y[i]);
    }
    __syncwarp();  // the first lane has read it
    if (last) *state = end;
    row += K::SPLIT * kPitch<K>;
    rate += K::SPLIT * kPitch<K>;
    state += K::SPLIT * K::kChannels;
  }
}

// The arguments, with what follows from BYTES as constants.
template <int BYTES>
__device__ __forceinline__ ForwardArgs of_bytes(ForwardArgs p) {
  for (View* v : {&p.u, &p.delta, &p.z, &p.B, &p.C}) {
    const bool bfloat16 = v->dtype == CAUSAL_CONV1D_BFLOAT16;
    v->dtype = BYTES == 4 ? CAUSAL_CONV1D_FLOAT32
               : bfloat16 ? CAUSAL_CONV1D_BFLOAT16
                          : CAUSAL_CONV1D_FLOAT16;
    v->step = BYTES;
    v->vectors = true;
  }
  return p;
}

template <typename K>
__device__ __forceinline__ void forward_sequence(const ForwardArgs& p) {
  extern __shared__ __align__(16) char memory[];
  Shared<K>& shared = *reinterpret_cast<Shared<K>*>(memory);
  const Place<K> at;
  const int dstate = static_cast<int>(p.dstate);
  begin_block(p, shared);
  for (int chunk = 0;; ++chunk) {
    const int64_t t0 = shared.segment.first() + static_cast<int64_t>(chunk) * K::kRow;
    if (t0 >= shared.segment.end) break;
    Steps<K> steps;
    begin_chunk(p, shared, at, t0, steps);
    add_states(p, shared, at, 0, min(kStates, dstate), steps);
#pragma unroll 1
    for (int n0 = kStates; n0 < dstate; n0 += kStates) {
      const int many = min(kStates, dstate - n0);
      __syncthreads();
      fill_tiles(p, shared, n0, many, t0);
      __syncthreads();
      add_states(p, shared, at, n0, many, steps);
    }
    store_steps(p, shared, at, t0, steps);
  }
  if (!p.last_states.given()) return;
  __syncthreads();
  for (int i = threadIdx.x; i < shared.channels.count * dstate; i += K::kThreads) {
    const int n = i % dstate, channel = i / dstate;
    store(p.last_states.at(shared.sequence, shared.channels.first + channel, n),
          p.last_states.dtype, shared.states()[n * K::kChannels + channel]);
  }
}

template <typename K, int BLOCKS>
__global__ void __launch_bounds__(K::kThreads, BLOCKS) forward(const ForwardArgs p) {
  if (!K::kHere) return;
  if constexpr (K::BYTES == 0) {
    forward_sequence<K>(p);
  } else {
    forward_sequence<K>(of_bytes<K::BYTES>(p));
  }
}

template <typename K>
size_t shared_bytes(const ForwardArgs& p) {
  return sizeof(Shared<K>) + sizeof(typename K::F) * p.dstate * K::kChannels;
}

template <typename K, int BLOCKS>
cudaError_t run_form(const ForwardArgs& p, cudaStream_t stream) {
  const int64_t blocks = p.sequences.count * p.groups * p.blocks_a_group(K::kChannels);
  return launch(forward<K, BLOCKS>, blocks, dim3(K::kThreads), shared_bytes<K>(p), stream, p);
}

// With few channels a channel is more lanes, up to two warps. The bounds are what was fastest on an
// H200, which has 132 multiprocessors, as channels for each of them.
template <int BYTES>
cudaError_t run_fast(const ForwardArgs& p, int multiprocessors, int most_shared,
                     cudaStream_t stream) {
  const int64_t channels = p.sequences.count * p.dim / multiprocessors;
  const bool is_short = p.sequences.count * 512 > p.sequences.seqlen * p.batch;
  if constexpr (BYTES != 0) {
    if (channels >= 96 && !is_short) {
      return run_form<Form<float, 8, 16, 1, true, BYTES>, 2>(p, stream);
    }
    if (channels >= 64 && !is_short) {
      return run_form<Form<float, 16, 16, 1, true, BYTES>, 2>(p, stream);
    }
    if (channels < 8 && !is_short) {
      return run_form<Form<float, 32, 8, 2, true, BYTES>, 2>(p, stream);
    }
  }
  // A block of compute capability 7.5 has 64 KiB at most, too few for the forms that follow.
  const bool is_small =
      shared_bytes<Form<float, 32, 16, 1, true>>(p) > static_cast<size_t>(most_shared);
  if (channels >= 24 || is_short || is_small) {
    return run_form<Form<float, 16, 8, 1, true, BYTES>, 3>(p, stream);
  }
  if constexpr (BYTES == 2) {
    // Blocks of more warps where they leave a multiprocessor fewer of them.
    const auto most_warps = [&](int a_block) {
      const int64_t blocks = p.sequences.count * p.groups * p.blocks_a_group(a_block);
      return ceil_div(blocks, multiprocessors) * a_block;
    };
    if (most_warps(12) < most_warps(8)) {
      return run_form<Form<float, 32, 16, 1, true, BYTES, 12>, 1>(p, stream);
    }
    return run_form<Form<float, 32, 16, 1, true, BYTES>, 2>(p, stream);
  }
  // Of 4 bytes it would spill.
  return run_form<Form<float, 32, 16, 1, true>, 2>(p, stream);
}

// The size of all elements that are read in time, 0 if they differ.
int bytes_of(const ForwardArgs& p) {
  const int bytes = static_cast<int>(p.u.step);
  for (const View* v : {&p.delta, &p.z, &p.B, &p.C}) {
    if (v->given() && v->step != bytes) return 0;
  }
  return bytes;
}

template <typename F>
cudaError_t run(const ScanForwardParams& params, int device, cudaStream_t stream) {
  ForwardArgs p{};
  static_cast<Inputs&>(p) = make_inputs(params.inputs);
  p.out = view(params.out);
  p.ungated = view(params.ungated);
  p.last_states = view(params.last_states);
  p.batch = params.inputs.u.sizes[0];
  OutsideSteps outside{};
  outside.sequences = p.sequences;
  outside.add(p.out, p.dim, 1);
  outside.add(p.ungated, p.dim, 1);
  const cudaError_t cleared = clear(outside, stream);
  if (cleared != cudaSuccess) return cleared;
  int multiprocessors = 0, shared = 0;  // shared: bytes that a block may have
  cudaError_t e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (e == cudaSuccess) {
    e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (e != cudaSuccess) return e;
  if constexpr (sizeof(F) == 8) {
    // Many states take more than the 64 KiB of compute capability 7.5.
    using K = Form<F, 8, 4, 1, false>;
    const bool fits = shared_bytes<K>(p) <= static_cast<size_t>(shared);
    return fits ? run_form<K, 1>(p, stream)
                : run_form<Form<F, 8, 4, 1, false, 0, kWarps / 2>, 1>(p, stream);
  } else {
    if (!suits_vectors(p)) return run_form<Form<F, 16, 8, 1, false>, 2>(p, stream);
    switch (bytes_of(p)) {
      case 2: return run_fast<2>(p, multiprocessors, shared, stream);
      case 4: return run_fast<4>(p, multiprocessors, shared, stream);
      default: return run_fast<0>(p, multiprocessors, shared, stream);
    }
  }
}

}  // namespace
}  // namespace causal_conv1d::gpu::scan

int64_t causal_conv1d_cuda_scan_forward_workspace_size(
    const causal_conv1d_scan_forward_params* params, int) {
  return causal_conv1d::check(params).code == CAUSAL_CONV1D_OK ? 0 : -1;
}

causal_conv1d_status causal_conv1d_cuda_scan_forward(
    const causal_conv1d_scan_forward_params* params, int device, void* stream, void*, int64_t) {
  using namespace causal_conv1d;
  const Status status = check(params);
  if (status.code != CAUSAL_CONV1D_OK) return status;
  return gpu::scan::run_checked(
      "selective_scan_fwd", params, params->inputs.u.dtype, device, [&](auto zero) {
        return gpu::scan::run<decltype(zero)>(*params, device, static_cast<cudaStream_t>(stream));
      });
}
