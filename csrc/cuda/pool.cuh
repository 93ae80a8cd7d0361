// The convolution of sequences whose states lie in a pool: see causal_conv1d_pool_params.
//
// The thread that has a sequence's first token has its first W - 1 tokens, and with them its slot:
// it alone reads the history, and then writes the new state. All other tokens need inputs of x
// alone. Tokens before the first sequence and after the last one count as a sequence that is
// skipped.
//
// update.cuh's kernels: a token for each sequence and states of W - 1 inputs.
// pool_sequences: short sequences, or out is x; W <= 8, channels are adjacent. A thread owns C
//   channels of a sequence.
// pool_tiles: the same otherwise. A warp owns 32 C channels of a tile of all tokens. It loads the
//   tile's inputs while it looks for the sequences there; then come the tokens that need no
//   history, and then those of the sequences that begin in the tile.
// pool_walk: any strides, W <= 8. A thread owns a channel of a part of the tokens.
// pool_any: wider filters; a thread has a channel of a sequence.
#pragma once

#include "../element_size.h"
#include "../pool_check.h"
#include "args.cuh"
#include "index.cuh"
#include "taps.cuh"

namespace causal_conv1d::gpu {

// has_initial_state, by the bytes of an element.
struct Flags {
  const uint8_t* data;
  int64_t stride;
  int size;
  __device__ __forceinline__ bool at(int64_t i) const {
    if (data == nullptr) return true;
    const uint8_t* p = data + i * stride;
    if (size == 1) return *p != 0;
    if (size == 4) return *reinterpret_cast<const int32_t*>(p) != 0;
    return *reinterpret_cast<const int64_t*>(p) != 0;
  }
};

inline Flags flags_view(const Tensor& t) {
  const int64_t size = element_size(t.dtype);
  if (!given(t)) return {nullptr, 0, 0};
  return {static_cast<const uint8_t*>(t.data), t.strides[0] * size, static_cast<int>(size)};
}

// What CommonArgs takes of a pool's parameters.
struct PoolInputs {
  Tensor x, weight, bias;
  int32_t silu;
};

// How a thread's adjacent channels of a state are read: an access for each input, or one for all of
// them, which are W - 1 = 3.
enum class StateAccess { kAny, kRows, kBlock };

template <typename T>
struct PoolArgs : CommonArgs<T> {
  using F = Compute<T>;
  View<T> out;
  AnyView<F> states, windows;
  Index starts, slots, accepted, window_rows;
  Flags has_state;
  int64_t sequences, slot_count, state_len, window_count, window_tokens, pad_slot;
  StateAccess access = StateAccess::kAny;
  int64_t tile = 0;  // tokens of a part, or 0: a sequence
  Columns columns;

  explicit PoolArgs(const PoolParams& p)
      : CommonArgs<T>(PoolInputs{as_row(p.x), p.weight, p.bias, p.silu}),
        out(view<T>(as_row(p.out))),
        states(any_view<F>(p.conv_states)),
        windows(any_view<F>(p.windows_out)),
        starts(index_view(p.query_start_loc)),
        slots(index_view(p.cache_indices)),
        accepted(index_view(p.num_accepted_tokens)),
        window_rows(index_view(p.window_indices)),
        has_state(flags_view(p.has_initial_state)),
        sequences(sequences_of(p)),
        slot_count(p.conv_states.sizes[0]),
        state_len(p.conv_states.sizes[2]),
        window_count(p.windows_out.sizes[0]),
        window_tokens(p.windows_out.sizes[1]),
        pad_slot(p.pad_slot) {}

  // Where sequence i begins. -1 is the tokens before the first, `sequences` those after the last.
  __device__ __forceinline__ int64_t start(int64_t i) const {
    if (i < 0) return 0;
    if (i > sequences) return this->seqlen;
    if (starts.data == nullptr) return i;
    return min(max(starts.at(i), int64_t(0)), this->seqlen);
  }

  // The last sequence that begins at t or before.
  __device__ __forceinline__ int64_t sequence_of(int64_t t) const {
    int64_t below = -1, above = sequences + 1;
#pragma unroll 1
    while (above - below > 1) {
      const int64_t i = (below + above) / 2;
      (start(i) <= t ? below : above) = i;
    }
    return below;
  }

  // Its slot, or -1 if it is skipped.
  __device__ __forceinline__ int64_t slot_of(int64_t i) const {
    if (i < 0 || i >= sequences) return -1;
    const int64_t slot = slots.data == nullptr ? i : slots.at(i);
    return slot == pad_slot || slot < 0 || slot >= slot_count ? -1 : slot;
  }
};

// Sequence i, skipped if slot < 0. Its history is columns `first_column` on of its slot, or zeros,
// and its tokens begin .. end - 1 of x follow.
template <typename T>
struct Sequence {
  int64_t begin, end, slot, first_column = 0;
  bool has_state;

  // All loads first.
  __device__ __forceinline__ Sequence(const PoolArgs<T>& p, int64_t i)
      : begin(p.start(i)), end(p.start(i + 1)), slot(p.slot_of(i)), has_state(false) {
    if (i < 0 || i >= p.sequences) return;
    has_state = p.has_state.at(i);
    if (p.accepted.data == nullptr) return;
    const int64_t last = p.state_len - (p.width - 1);
    first_column = min(max(p.accepted.at(i) - 1, int64_t(0)), last);
  }

  // Input j of history ++ tokens, of channel d.
  __device__ __forceinline__ Compute<T> input(const PoolArgs<T>& p, int64_t d, int64_t j) const {
    const int64_t t = j - (p.width - 1);
    if (t >= 0) return to_compute(*p.x.at(0, d, begin + t));
    return has_state ? p.states.load(slot, d, first_column + j) : Compute<T>(0);
  }

  // The state afterwards is inputs `shift` on of history ++ tokens, so many columns.
  __device__ __forceinline__ int64_t columns(const PoolArgs<T>& p) const {
    const int64_t kept = p.width - 2 + (end - begin);
    return p.accepted.data == nullptr ? p.width - 1 : min(p.state_len, kept);
  }
  __device__ __forceinline__ int64_t shift(const PoolArgs<T>& p) const {
    return p.width - 1 + (end - begin) - columns(p);
  }
};

// The windows of tokens from .. to - 1 of a channel.
template <typename T>
__device__ __forceinline__ void write_windows(const PoolArgs<T>& p, const Sequence<T>& s, int64_t i,
                                              int64_t d, int64_t from, int64_t to) {
  const int64_t row = p.window_rows.data == nullptr ? i : p.window_rows.at(i);
  if (row < 0 || row >= p.window_count) return;
  const int H = p.width - 1;
  const int64_t last = min(to - s.begin, p.window_tokens);
#pragma unroll 1
  for (int64_t t = from - s.begin; t < last; ++t) {
#pragma unroll 1
    for (int j = 0; j < H; ++j) p.windows.store(s.input(p, d, t + 1 + j), row, t, d * H + j);
  }
}

// The state afterwards, of C channels. Columns move down, so that in ascending order none is
// written before it is read.
template <int C, typename T>
__device__ __forceinline__ void write_state(const PoolArgs<T>& p, const Sequence<T>& s,
                                            int64_t d0) {
  constexpr int N = 4;  // columns in flight
  const int64_t columns = s.columns(p), shift = s.shift(p);
#pragma unroll 1
  for (int64_t j0 = 0; j0 < columns; j0 += N) {
#pragma unroll 1
    for (int64_t d = d0; d < d0 + C; ++d) {
      Compute<T> v[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (j0 + j < columns) v[j] = s.input(p, d, j0 + j + shift);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (j0 + j < columns) p.states.store(v[j], s.slot, d, j0 + j);
      }
    }
  }
}

}  // namespace causal_conv1d::gpu
