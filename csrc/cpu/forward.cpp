// The forward on the threads.
#include <optional>
#include <vector>

#include "dispatch.h"
#include "index_tensor.h"
#include "joined.h"
#include "operations.h"
#include "outside.h"
#include "parallel.h"
#include "tiling.h"

namespace causal_conv1d {
namespace {

// The final states when out is done, for all of a row at once: where there is padding among the
// last inputs, or everywhere.
void write_final_states(const ForwardProblem& p, const Tiling& forward, bool everywhere,
                        int num_threads) {
  const Sequences& s = p.sequences;
  const int64_t length = p.final_states_out.sizes[2];
  std::vector<int64_t> ends(static_cast<size_t>(p.final_states_out.sizes[0]), -1);
  int64_t count = 0;
  for (size_t i = 0; i < ends.size(); ++i) {
    const int64_t b = static_cast<int64_t>(i);
    if (s.bounds != nullptr) {
      if (everywhere) ends[i] = s.bounds[b + 1] - s.bounds[b];
    } else if (given(p.seq_idx)) {
      const bool special = everywhere || has_padding(p.seq_idx, b, forward.seqlen - length);
      if (special) ends[i] = end_of_row(p.seq_idx, b);
    } else if (everywhere) {
      ends[i] = forward.seqlen;
    }
    count += ends[i] >= 0 ? 1 : 0;
  }
  if (count == 0) return;
  const KernelTable& kernels = *active_kernels;
  const Tiling tiling =
      make_final_states_tiling(forward, static_cast<int64_t>(ends.size()), length);
  parallel_for(units_of(tiling), num_threads, 4 * count * tiling.dim * tiling.width,
               kernels.scratch_bytes(tiling, Operation::kFinalStates),
               [&](int64_t unit, char* scratch) {
                 kernels.final_states(p, tiling, ends.data(), unit, scratch);
               });
}

}  // namespace

void run_forward(ForwardProblem& p, int num_threads) {
  const KernelTable& kernels = *active_kernels;
  std::vector<int32_t> ids;
  p.seq_idx = with_int32_ids(p.seq_idx, &ids);
  Sequences& s = p.sequences;
  Demand demand = {Operation::kForward, kernels.has_direct};
  demand.seq_idx = given(p.seq_idx);
  demand.gated = given(p.pre_gate) || given(p.post_gate) || given(p.residual);
  demand.dilation = s.dilation;
  const bool has_initial = has_elements(p.initial_states);
  demand.other_states = has_initial && p.initial_states.dtype != p.x.dtype;
  demand.ids_ascend = demand.seq_idx && !has_initial && ids_ascend(p.seq_idx);
  Tiling tiling = make_tiling(p.x, p.weight, demand);
  if (should_walk_apart(tiling, demand)) {
    tiling.apart = s.apart = s.dilation;
    s.dilation = 1;
  }
  const bool has_states = has_elements(p.final_states_out);
  // The last chunk of a row may be done before the first one has read the initial state, and
  // phases have other columns at the end than at the start; padding is looked for when all is done.
  bool late = has_states && p.final_states_out.data == p.initial_states.data &&
              (tiling.chunks > 1 || demand.seq_idx || s.dilation > 1);
  const bool join_ids = demand.seq_idx && tiling.direct;
  const bool join = join_ids || should_join(s, tiling, has_initial);
  tiling.joined = join;
  late = late || (has_states && (join || tiling.apart > 1));
  std::optional<Joining> joining;
  std::optional<ForwardProblem> other;
  if (join || late) other = p;
  if (join_ids) {
    joining.emplace(p.seq_idx, s.apart, p.x);
    other->seq_idx = {};
  } else if (join) {
    joining.emplace(s, p.x);
  }
  if (join) {
    other->sequences = joining->sequences();
    other->joined = joining->joined();
  }
  if (late) other->final_states_out = {};
  const ForwardProblem& early = other ? *other : p;
  parallel_for(units_of(tiling), num_threads, work_of(tiling, 1),
               kernels.scratch_bytes(tiling, Operation::kForward),
               [&](int64_t unit, char* scratch) { kernels.forward(early, tiling, unit, scratch); });
  if (late || (has_states && demand.seq_idx)) write_final_states(p, tiling, late, num_threads);
  if (s.bounds != nullptr) copy_outside(s, p.residual, p.out);
}

}  // namespace causal_conv1d
