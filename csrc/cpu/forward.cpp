// The forward on the threads.
#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "index_tensor.h"
#include "operations.h"
#include "parallel.h"
#include "tiling.h"

namespace causal_conv1d {
namespace {

// The final states when out is done, for all of a row at once: where there is padding among the
// last inputs, or everywhere.
void write_final_states(const ForwardParams& p, Tiling tiling, bool everywhere, int num_threads) {
  std::vector<int64_t> ends(static_cast<size_t>(tiling.batch), everywhere ? tiling.seqlen : -1);
  int64_t rows = everywhere ? tiling.batch : 0;
  for (int64_t b = 0; given(p.seq_idx) && b < tiling.batch; ++b) {
    if (!has_padding(p.seq_idx, b, tiling.seqlen - (tiling.width - 1))) continue;
    ends[static_cast<size_t>(b)] = end_of_row(p.seq_idx, b);
    ++rows;
  }
  if (rows == 0) return;
  const KernelTable& kernels = *active_kernels;
  tiling = make_final_states_tiling(tiling);
  parallel_for(units_of(tiling), num_threads, 4 * rows * tiling.dim * tiling.width,
               kernels.scratch_bytes(tiling, Operation::kFinalStates),
               [&](int64_t unit, char* scratch) {
                 kernels.final_states(p, tiling, ends.data(), unit, scratch);
               });
}

}  // namespace

void run_forward(ForwardParams p, int num_threads) {
  const KernelTable& kernels = *active_kernels;
  std::vector<int32_t> ids;
  p.seq_idx = with_int32_ids(p.seq_idx, &ids);
  const Tiling tiling =
      make_tiling(p.x, p.weight, p.seq_idx, Operation::kForward, kernels.has_direct);
  const bool has_states = given(p.final_states_out) && tiling.width > 1;
  // The last chunk of a row may be done before the first one has read the initial state, and
  // padding is looked for when all is done.
  const bool late = has_states && p.final_states_out.data == p.initial_states.data &&
                    (tiling.chunks > 1 || given(p.seq_idx));
  ForwardParams early = p;
  if (late) early.final_states_out = {};
  parallel_for(units_of(tiling), num_threads, work_of(tiling, 1),
               kernels.scratch_bytes(tiling, Operation::kForward),
               [&](int64_t unit, char* scratch) { kernels.forward(early, tiling, unit, scratch); });
  if (late || (has_states && given(p.seq_idx))) write_final_states(p, tiling, late, num_threads);
}

}  // namespace causal_conv1d
