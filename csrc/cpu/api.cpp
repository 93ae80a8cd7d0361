// The CPU half of the C API: checks, the choice of instruction set, and how each operation is cut
// into units of work for the threads. The arithmetic is in kernels.inl.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "../causal_conv1d.h"
#include "../check.h"
#include "kernels.h"
#include "parallel.h"

namespace causal_conv1d {
namespace {

const Kernels* best_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return &avx512::kernels;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return &avx2::kernels;
  }
  return &baseline::kernels;
#elif defined(__aarch64__)
  return &neon::kernels;
#else
  return &baseline::kernels;
#endif
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Outputs of more bytes are stored past the caches, which saves reading the lines first.
constexpr int64_t kStreamBytes = 16 << 20;

// Bytes of a row that the direct kernels for channel_last walk along before the next rows: with
// those of some rows the L1 cache holds them.
constexpr int64_t kDirectBytes = 2048;
// Rows of a chunk at least, so that what is done once for a chunk does not count.
constexpr int64_t kDirectRows = 512;
// Chunks of time are multiples of it: whole vectors.
constexpr int64_t kChunkStep = 64;

// Vectors run along whichever of time and channels is contiguous in x.
bool is_channel_first(const Tensor& x, int64_t dim, int64_t seqlen) {
  if (seqlen <= 1) return false;
  if (dim == 1 || x.strides[2] == 1) return true;
  return x.strides[1] != 1 && std::abs(x.strides[2]) <= std::abs(x.strides[1]);
}

Tiling make_tiling(const Tensor& x, const Tensor& weight, const Tensor& seq_idx,
                   Operation operation) {
  Tiling t = {};
  t.fp64 = x.dtype == CAUSAL_CONV1D_FLOAT64;
  t.batch = x.sizes[0];
  t.dim = x.sizes[1];
  t.seqlen = x.sizes[2];
  t.width = weight.sizes[1];
  const bool update = operation == Operation::kUpdate;
  t.channel_first = is_channel_first(x, t.dim, t.seqlen) && !(update && t.seqlen < 32);
  const int64_t total = t.batch * t.dim * t.seqlen;
  const int64_t size = t.fp64 ? 8 : x.dtype == CAUSAL_CONV1D_FLOAT32 ? 4 : 2;
  t.stream = total * size >= kStreamBytes;

  t.direct = active_kernels->has_direct && !update && !t.fp64 && !given(seq_idx) && t.width >= 2 &&
             t.width <= 4;

  // Scratch of a block fits the L1 or, with its neighbours, the L2 cache, and the width - 1 rows
  // carried from block to block stay a small part.
  const int64_t rows = t.seqlen + (operation == Operation::kBackward ? t.width - 1 : 0);
  const int64_t wide = 4 * (t.width - 1);
  if (t.channel_first) {
    t.cols = 1;
    t.block = std::max<int64_t>(2048, wide);
  } else if (t.direct) {
    t.cols = kDirectBytes / size;
    t.block = 1;
  } else {
    // Pieces of 512 bytes, 4096 elements a block: the fastest of 128 to 4096 columns on Zen 5.
    const bool narrow = size == 2 && operation == Operation::kForward;
    t.cols = t.width > 64 ? 32 : update ? 512 : narrow ? 256 : 128;
    t.block = std::max<int64_t>(4096 / t.cols, wide);
  }
  t.cols = std::min(t.cols, std::max<int64_t>(1, t.dim));
  t.block = std::max<int64_t>(1, std::min(t.block, rows));

  // Units large enough to be worth handing out, small enough to go round on many cores.
  int64_t unit = std::min<int64_t>(1 << 20, std::max<int64_t>(1 << 16, total / 512));
  if (update) unit = 1 << 14;
  const int64_t whole = std::max<int64_t>(1, t.seqlen);
  if (t.direct && !t.channel_first) unit = std::max(unit, kDirectRows * t.cols);
  t.chunk =
      update
          ? whole
          : std::min(whole, divide_up(std::max(unit / t.cols, 2 * wide), kChunkStep) * kChunkStep);
  t.chunks = divide_up(whole, t.chunk);
  t.batches_per_unit = std::max<int64_t>(1, unit / (t.chunk * t.cols));
  t.batches_per_unit = t.chunks > 1 ? 1 : std::min(t.batches_per_unit, t.batch);
  t.batches_per_unit = std::max<int64_t>(1, t.batches_per_unit);
  const int64_t tiles = unit / (t.chunk * t.cols * t.batches_per_unit);
  t.channels_per_unit = t.cols * std::max<int64_t>(1, tiles);
  t.batch_groups = divide_up(t.batch, t.batches_per_unit);
  t.channel_groups = divide_up(t.dim, t.channels_per_unit);
  return t;
}

int64_t units_of(const Tiling& t) { return t.batch_groups * t.channel_groups * t.chunks; }

// In elements of a forward, each of which takes `cost` of them.
int64_t work_of(const Tiling& t, int64_t cost) {
  return t.batch * t.dim * t.seqlen * (cost + t.width / 8);
}

int64_t read_index(const Tensor& t, int64_t i, int64_t j = 0) {
  const int64_t offset = i * t.strides[0] + (t.ndim > 1 ? j * t.strides[1] : 0);
  const char* const data = static_cast<const char*>(t.data);
  if (t.dtype == CAUSAL_CONV1D_INT64) {
    int64_t value;
    std::memcpy(&value, data + offset * 8, sizeof(value));
    return value;
  }
  int32_t value;
  std::memcpy(&value, data + offset * 4, sizeof(value));
  return value;
}

// ids of 64 bits, all of which fit 32, as a copy in `memory`: kernels read ids once a channel, for
// which the copy is made once.
Tensor with_int32_ids(Tensor seq_idx, std::vector<int32_t>* memory) {
  if (!given(seq_idx) || seq_idx.dtype != CAUSAL_CONV1D_INT64) return seq_idx;
  const int64_t batch = seq_idx.sizes[0], seqlen = seq_idx.sizes[1];
  memory->reserve(static_cast<size_t>(batch * seqlen));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < seqlen; ++t) {
      memory->push_back(static_cast<int32_t>(read_index(seq_idx, b, t)));
    }
  }
  seq_idx.data = memory->data();
  seq_idx.dtype = CAUSAL_CONV1D_INT32;
  seq_idx.strides[0] = seqlen;
  seq_idx.strides[1] = 1;
  return seq_idx;
}

// The time that the final states of a batch entry precede: just behind the last position that is no
// padding.
int64_t end_of_row(const Tensor& seq_idx, int64_t b) {
  int64_t end = seq_idx.sizes[1];
  while (end > 0 && read_index(seq_idx, b, end - 1) < 0) --end;
  return end;
}

bool has_padding(const Tensor& seq_idx, int64_t b, int64_t first) {
  for (int64_t t = std::max<int64_t>(0, first); t < seq_idx.sizes[1]; ++t) {
    if (read_index(seq_idx, b, t) < 0) return true;
  }
  return false;
}

// The final states when out is done, for all of a row at once: where there is padding among the
// last inputs, or everywhere.
void write_final_states(const ForwardParams& p, Tiling tiling, bool everywhere, int num_threads) {
  constexpr int64_t kChannels = 1024;
  std::vector<int64_t> ends(static_cast<size_t>(tiling.batch), everywhere ? tiling.seqlen : -1);
  int64_t rows = everywhere ? tiling.batch : 0;
  for (int64_t b = 0; given(p.seq_idx) && b < tiling.batch; ++b) {
    if (!has_padding(p.seq_idx, b, tiling.seqlen - (tiling.width - 1))) continue;
    ends[static_cast<size_t>(b)] = end_of_row(p.seq_idx, b);
    ++rows;
  }
  if (rows == 0) return;
  tiling.chunk = tiling.seqlen;
  tiling.chunks = 1;
  tiling.batches_per_unit = 1;
  tiling.batch_groups = tiling.batch;
  tiling.channels_per_unit = divide_up(kChannels, tiling.cols) * tiling.cols;
  tiling.channel_groups = divide_up(tiling.dim, tiling.channels_per_unit);
  parallel_for(units_of(tiling), num_threads, 4 * rows * tiling.dim * tiling.width,
               active_kernels->scratch_bytes(tiling, Operation::kFinalStates),
               [&](int64_t unit, char* scratch) {
                 active_kernels->final_states(p, tiling, ends.data(), unit, scratch);
               });
}

void run_forward(ForwardParams p, int num_threads) {
  const Kernels& kernels = *active_kernels;
  std::vector<int32_t> ids;
  p.seq_idx = with_int32_ids(p.seq_idx, &ids);
  const Tiling tiling = make_tiling(p.x, p.weight, p.seq_idx, Operation::kForward);
  const bool has_states = given(p.final_states_out) && tiling.width > 1;
  // The last chunk of a row may be done before the first one has read the initial state, and
  // padding is looked for when all is done.
  const bool late = has_states && p.final_states_out.data == p.initial_states.data &&
                    (tiling.chunks > 1 || given(p.seq_idx));
  ForwardParams main = p;
  if (late) main.final_states_out = {};
  parallel_for(units_of(tiling), num_threads, work_of(tiling, 1),
               kernels.scratch_bytes(tiling, Operation::kForward),
               [&](int64_t unit, char* scratch) { kernels.forward(main, tiling, unit, scratch); });
  if (late || (has_states && given(p.seq_idx))) write_final_states(p, tiling, late, num_threads);
}

void run_backward(BackwardParams p, int num_threads) {
  const Kernels& kernels = *active_kernels;
  std::vector<int32_t> ids;
  p.seq_idx = with_int32_ids(p.seq_idx, &ids);
  Tensor x = p.x;
  // Without elements it gives sums of 0 whatever its sizes, which need no loop over them.
  if (!has_elements(x) && !has_elements(p.dinitial_states)) x.sizes[0] = x.sizes[2] = 0;
  const Tiling tiling = make_tiling(x, p.weight, p.seq_idx, Operation::kBackward);
  std::unique_ptr<double[]> partials;
  if (given(p.dweight) || given(p.dbias)) {
    const int64_t slots = tiling.batch_groups * tiling.chunks;
    partials.reset(new double[static_cast<size_t>(slots * (tiling.width + 1) * tiling.dim)]);
  }
  std::vector<int64_t> ends;
  if (given(p.seq_idx) && given(p.dfinal_states)) {
    for (int64_t b = 0; b < tiling.batch; ++b) ends.push_back(end_of_row(p.seq_idx, b));
  }
  parallel_for(units_of(tiling), num_threads, work_of(tiling, 3),
               kernels.scratch_bytes(tiling, Operation::kBackward),
               [&](int64_t unit, char* scratch) {
                 kernels.backward(p, tiling, ends.empty() ? nullptr : ends.data(), unit, scratch,
                                  partials.get());
               });
  if (partials == nullptr) return;
  constexpr int64_t kChannels = 256;
  const int64_t slots = tiling.batch_groups * tiling.chunks;
  const int64_t work = slots * (tiling.width + 1) * tiling.dim;
  parallel_for(divide_up(tiling.dim, kChannels), num_threads, work, 0, [&](int64_t unit, char*) {
    kernels.reduce(p, tiling, partials.get(), unit * kChannels,
                   std::min(tiling.dim, (unit + 1) * kChannels));
  });
}

// A (batch, dim) tensor as (batch, dim, 1).
Tensor with_time(Tensor t) {
  if (t.ndim == 2) {
    t.ndim = 3;
    t.sizes[2] = 1;
    t.strides[2] = 0;
  }
  return t;
}

bool ascends(const Tensor& indices) {
  int64_t last = -1;
  for (int64_t b = 0; b < indices.sizes[0]; ++b) {
    const int64_t row = read_index(indices, b);
    if (row <= last) return false;
    last = row;
  }
  return true;
}

// Whether each batch entry is the last one of its state row (or of none); empty if no row has two.
std::vector<char> last_users(const Tensor& indices) {
  std::vector<char> is_last;
  if (!given(indices) || ascends(indices)) return is_last;
  const int64_t batch = indices.sizes[0];
  // A hash table with open addressing of the rows seen so far, from the last entry on; most calls
  // need no memory for it.
  constexpr int kFewBits = 10;
  int64_t few[1 << kFewBits];
  std::unique_ptr<int64_t[]> many;
  int bits = 3;
  while ((int64_t{1} << bits) < 2 * batch) ++bits;
  if (bits > kFewBits) many.reset(new int64_t[size_t{1} << bits]);
  int64_t* const slots = many != nullptr ? many.get() : few;
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  std::fill_n(slots, size_t{1} << bits, int64_t{-1});
  for (int64_t b = batch - 1; b >= 0; --b) {
    const int64_t row = read_index(indices, b);
    if (row < 0) continue;
    uint64_t slot = (static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15u) >> (64 - bits);
    while (slots[slot] >= 0 && slots[slot] != row) slot = (slot + 1) & mask;
    if (slots[slot] == row) {
      if (is_last.empty()) is_last.assign(static_cast<size_t>(batch), 1);
      is_last[static_cast<size_t>(b)] = 0;
    }
    slots[slot] = row;
  }
  return is_last;
}

void run_update(UpdateParams p, int num_threads) {
  p.x = with_time(p.x);
  p.out = with_time(p.out);
  if (p.x.sizes[2] == 0) return;
  const Kernels& kernels = *active_kernels;
  const Tiling tiling = make_tiling(p.x, p.weight, {}, Operation::kUpdate);
  const std::vector<char> is_last = last_users(p.conv_state_indices);
  const auto take = [&](Turn turn) {
    parallel_for(
        units_of(tiling), num_threads, work_of(tiling, 8),
        kernels.scratch_bytes(tiling, Operation::kUpdate),
        [&](int64_t unit, char* scratch) { kernels.update(p, tiling, turn, unit, scratch); });
  };
  if (is_last.empty()) return take({nullptr, false});
  take({is_last.data(), false});
  take({is_last.data(), true});
}

// Element is an unsigned integer of the tensors' element size: values are only moved.
template <class Element>
void varlen_states_of(const VarlenStatesParams& p, int64_t sequence) {
  constexpr int64_t kSize = sizeof(Element);
  const int64_t begin = read_index(p.cu_seqlens, sequence);
  const int64_t end = read_index(p.cu_seqlens, sequence + 1);
  const Tensor& states = p.states;
  const int64_t length = states.sizes[2];
  for (int64_t j = 0; j < length; ++j) {
    const int64_t t = end - length + j;
    char* const row = static_cast<char*>(states.data) +
                      (sequence * states.strides[0] + j * states.strides[2]) * kSize;
    const char* const token = static_cast<const char*>(p.x.data) + t * p.x.strides[0] * kSize;
    for (int64_t d = 0; d < states.sizes[1]; ++d) {
      Element value = 0;
      if (t >= begin) std::memcpy(&value, token + d * p.x.strides[1] * kSize, sizeof(value));
      std::memcpy(row + d * states.strides[1] * kSize, &value, sizeof(value));
    }
  }
}

void run_varlen_states(const VarlenStatesParams& p, int num_threads) {
  const int64_t batch = p.states.sizes[0];
  const int64_t elements = batch * p.states.sizes[1] * p.states.sizes[2];
  const auto function = p.x.dtype == CAUSAL_CONV1D_FLOAT64   ? varlen_states_of<uint64_t>
                        : p.x.dtype == CAUSAL_CONV1D_FLOAT32 ? varlen_states_of<uint32_t>
                                                             : varlen_states_of<uint16_t>;
  parallel_for(batch, num_threads, elements * 2, 0,
               [&](int64_t sequence, char*) { function(p, sequence); });
}

Status check_ids(const char* op, const Tensor& seq_idx) {
  if (!given(seq_idx) || seq_idx.dtype != CAUSAL_CONV1D_INT64) return ok();
  for (int64_t b = 0; b < seq_idx.sizes[0]; ++b) {
    for (int64_t t = 0; t < seq_idx.sizes[1]; ++t) {
      const int64_t id = read_index(seq_idx, b, t);
      if (id == static_cast<int32_t>(id)) continue;
      return error(
          CAUSAL_CONV1D_INVALID_ARGUMENT, "%s: seq_idx must fit int32, got %lld at (%lld, %lld)",
          op, static_cast<long long>(id), static_cast<long long>(b), static_cast<long long>(t));
    }
  }
  return ok();
}

Status check_values(const ForwardParams& p) { return check_ids("causal_conv1d_fn", p.seq_idx); }
Status check_values(const BackwardParams& p) { return check_ids("causal_conv1d_bwd", p.seq_idx); }

Status check_values(const UpdateParams& p) {
  if (!given(p.conv_state_indices)) return ok();
  const int64_t rows = p.conv_state.sizes[0];
  for (int64_t b = 0; b < p.conv_state_indices.sizes[0]; ++b) {
    const int64_t row = read_index(p.conv_state_indices, b);
    if (row >= rows) {
      return error(CAUSAL_CONV1D_INVALID_ARGUMENT,
                   "causal_conv1d_update: conv_state_indices must be < %lld, got %lld at %lld",
                   static_cast<long long>(rows), static_cast<long long>(row),
                   static_cast<long long>(b));
    }
  }
  return ok();
}

Status check_values(const VarlenStatesParams& p) {
  int64_t previous = 0;
  for (int64_t i = 0; i < p.cu_seqlens.sizes[0]; ++i) {
    const int64_t value = read_index(p.cu_seqlens, i);
    if (value < previous || value > p.x.sizes[0]) {
      return error(CAUSAL_CONV1D_INVALID_ARGUMENT,
                   "causal_conv1d_varlen_states: cu_seqlens must not decrease and lie within "
                   "0..%lld (total_tokens), got %lld at %lld",
                   static_cast<long long>(p.x.sizes[0]), static_cast<long long>(value),
                   static_cast<long long>(i));
    }
    previous = value;
  }
  return ok();
}

template <class Params, class Run>
Status checked(const char* name, const Params* params, int num_threads, Run run) noexcept {
  try {
    Status status = check(params);
    if (status.code != CAUSAL_CONV1D_OK || !has_work(*params)) return status;
    status = check_values(*params);
    if (status.code == CAUSAL_CONV1D_OK) run(*params, num_threads);
    return status;
  } catch (const std::bad_alloc&) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s: out of memory", name);
  } catch (const std::exception& e) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s: %s", name, e.what());
  } catch (...) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s: unknown error", name);
  }
}

}  // namespace

const Kernels* active_kernels = best_kernels();

}  // namespace causal_conv1d

using namespace causal_conv1d;

causal_conv1d_status causal_conv1d_cpu_forward(const causal_conv1d_forward_params* params,
                                               int num_threads) {
  return checked("causal_conv1d_fwd", params, num_threads, run_forward);
}

causal_conv1d_status causal_conv1d_cpu_backward(const causal_conv1d_backward_params* params,
                                                int num_threads) {
  return checked("causal_conv1d_bwd", params, num_threads, run_backward);
}

causal_conv1d_status causal_conv1d_cpu_update(const causal_conv1d_update_params* params,
                                              int num_threads) {
  return checked("causal_conv1d_update", params, num_threads, run_update);
}

causal_conv1d_status causal_conv1d_cpu_varlen_states(
    const causal_conv1d_varlen_states_params* params, int num_threads) {
  return checked("causal_conv1d_varlen_states", params, num_threads, run_varlen_states);
}

const char* causal_conv1d_cpu_isa(void) { return active_kernels->name; }
