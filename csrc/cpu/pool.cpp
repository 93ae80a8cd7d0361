// The pool of states on the threads: packed sequences whose initial states are slots of it.
#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "index_tensor.h"
#include "operations.h"
#include "outside.h"
#include "parallel.h"
#include "tiling.h"

namespace causal_conv1d {
namespace {

constexpr char kName[] = "causal_conv1d_pool";

// A problem's sequences, as read from the index tensors.
struct Read {
  std::vector<int64_t> bounds;
  std::vector<PoolSequence> sequences;
};

Status out_of_range(const char* name, const char* range, int64_t value, int64_t i) {
  return error(CAUSAL_CONV1D_INVALID_ARGUMENT, "%s: %s must be %s, got %lld at %lld", kName, name,
               range, static_cast<long long>(value), static_cast<long long>(i));
}

Status read_sequence(const PoolParams& p, int64_t i, PoolSequence* sequence) {
  const int64_t halo = p.weight.sizes[1] - 1;
  *sequence = {given(p.cache_indices) ? index_at(p.cache_indices, i) : i, 0, -1, true};
  if (sequence->slot == p.pad_slot) {
    sequence->slot = -1;
    return ok();
  }
  if (sequence->slot < 0 || sequence->slot >= p.conv_states.sizes[0]) {
    return out_of_range("cache_indices", "pad_slot or a slot of conv_states", sequence->slot, i);
  }
  if (given(p.has_initial_state)) sequence->has_history = flag_at(p.has_initial_state, i);
  if (given(p.num_accepted_tokens)) {
    const int64_t accepted = index_at(p.num_accepted_tokens, i);
    sequence->first_column = accepted - 1;
    if (accepted < 1 || accepted - 1 > p.conv_states.sizes[2] - halo) {
      return out_of_range("num_accepted_tokens", ">= 1 and leave width - 1 columns of conv_states",
                          accepted, i);
    }
  }
  if (!given(p.windows_out)) return ok();
  sequence->window_row = given(p.window_indices) ? index_at(p.window_indices, i) : i;
  if (sequence->window_row >= p.windows_out.sizes[0]) {
    return out_of_range("window_indices", "< the rows of windows_out", sequence->window_row, i);
  }
  return ok();
}

// Whether no two of the sequences that have tokens change one place.
Status check_distinct(const Read& read, const char* name, int64_t PoolSequence::*place) {
  std::vector<int64_t> places;
  for (size_t i = 0; i < read.sequences.size(); ++i) {
    const PoolSequence& sequence = read.sequences[i];
    if (sequence.slot < 0 || sequence.*place < 0 || read.bounds[i] == read.bounds[i + 1]) continue;
    places.push_back(sequence.*place);
  }
  std::sort(places.begin(), places.end());
  const auto twice = std::adjacent_find(places.begin(), places.end());
  if (twice == places.end()) return ok();
  return error(CAUSAL_CONV1D_INVALID_ARGUMENT, "%s: %s must differ, got %lld twice", kName, name,
               static_cast<long long>(*twice));
}

}  // namespace

Status run_pool(const PoolParams& p, int num_threads) {
  const KernelTable& kernels = *active_kernels;
  const int64_t count = sequences_of(p);
  Read read;
  const bool ragged = given(p.query_start_loc);
  for (int64_t i = 0; i <= count; ++i) {
    read.bounds.push_back(ragged ? index_at(p.query_start_loc, i) : i);
  }
  read.sequences.resize(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const size_t at = static_cast<size_t>(i);
    const bool empty = read.bounds[at] == read.bounds[at + 1];
    read.sequences[at].slot = -1;
    const Status status = empty ? ok() : read_sequence(p, i, &read.sequences[at]);
    if (status.code != CAUSAL_CONV1D_OK) return status;
  }
  Status status = check_distinct(read, "cache_indices", &PoolSequence::slot);
  if (status.code != CAUSAL_CONV1D_OK) return status;
  status = check_distinct(read, "window_indices", &PoolSequence::window_row);
  if (status.code != CAUSAL_CONV1D_OK) return status;

  ForwardProblem problem = {};
  problem.x = as_row(p.x);
  problem.out = as_row(p.out);
  problem.weight = p.weight;
  problem.bias = p.bias;
  problem.silu = p.silu;
  problem.initial_states = p.conv_states;
  problem.windows = p.windows_out;
  problem.keeps_accepted = given(p.num_accepted_tokens);
  problem.sequences = {1, read.bounds.data(), count, read.sequences.data()};
  Demand demand = {Operation::kPool, kernels.has_direct};
  demand.average_length = p.x.sizes[1] / std::max<int64_t>(1, count);
  const Tiling tiling = make_tiling(problem.x, p.weight, demand);
  parallel_for(units_of(tiling), num_threads, work_of(tiling, 4),
               kernels.scratch_bytes(tiling, Operation::kPool), [&](int64_t unit, char* scratch) {
                 kernels.forward(problem, tiling, unit, scratch);
               });
  copy_outside(problem.sequences, {}, problem.out);
  for (int64_t i = 0; i < count; ++i) {
    const size_t at = static_cast<size_t>(i);
    if (read.sequences[at].slot >= 0) continue;
    copy_times({}, problem.out, read.bounds[at], read.bounds[at + 1]);
  }
  return ok();
}

}  // namespace causal_conv1d
