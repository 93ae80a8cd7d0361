// The backward on the threads: partial sums of dweight and dbias by each unit, then the sums of
// those in one order.
#include <algorithm>
#include <memory>
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

void run_backward(BackwardProblem& p, int num_threads) {
  const KernelTable& kernels = *active_kernels;
  std::vector<int32_t> ids;
  p.seq_idx = with_int32_ids(p.seq_idx, &ids);
  Demand demand = {Operation::kBackward, kernels.has_direct};
  demand.seq_idx = given(p.seq_idx);
  demand.gated = given(p.pre_gate) || given(p.post_gate) || p.residual_is_x;
  demand.dilation = p.sequences.dilation;
  const bool has_states = has_elements(p.initial_states) || has_elements(p.dfinal_states) ||
                          has_elements(p.dinitial_states);
  demand.other_states = has_elements(p.initial_states) && p.initial_states.dtype != p.x.dtype;
  demand.ids_ascend = demand.seq_idx && !has_states && ids_ascend(p.seq_idx);
  Tensor x = p.x;
  // Without elements it gives sums of 0 whatever its sizes, which need no loop over them.
  if (!has_elements(x) && !has_elements(p.dinitial_states)) x.sizes[0] = x.sizes[2] = 0;
  Tiling tiling = make_tiling(x, p.weight, demand);
  if (should_walk_apart(tiling, demand)) {
    tiling.apart = p.sequences.apart = p.sequences.dilation;
    p.sequences.dilation = 1;
  }
  std::unique_ptr<double[]> partials;
  if (given(p.dweight) || given(p.dbias)) {
    const int64_t slots = tiling.batch_groups * tiling.chunks;
    partials.reset(new double[static_cast<size_t>(slots * (tiling.width + 1) * tiling.dim)]);
  }
  std::vector<int64_t> ends;
  if (given(p.seq_idx) && given(p.dfinal_states)) {
    for (int64_t b = 0; b < tiling.batch; ++b) ends.push_back(end_of_row(p.seq_idx, b));
    p.ends = ends.data();
  }
  std::optional<Joining> joining;
  const Sequences s = p.sequences;
  if (demand.seq_idx && tiling.direct) {
    joining.emplace(p.seq_idx, s.apart, p.x);
    p.seq_idx = {};
  } else if (should_join(s, tiling, has_states)) {
    joining.emplace(s, p.x);
  }
  if (joining) {
    tiling.joined = true;
    p.sequences = joining->sequences();
    p.joined = joining->joined();
  }
  parallel_for(units_of(tiling), num_threads, work_of(tiling, 3),
               kernels.scratch_bytes(tiling, Operation::kBackward),
               [&](int64_t unit, char* scratch) {
                 kernels.backward(p, tiling, unit, scratch, partials.get());
               });
  if (s.bounds != nullptr) {
    copy_outside(s, p.residual_is_x ? p.dout : Tensor{}, p.dx);
    copy_outside(s, {}, p.dpre_gate);
    copy_outside(s, {}, p.dpost_gate);
  }
  if (partials == nullptr) return;
  constexpr int64_t kChannels = 256;
  const int64_t slots = tiling.batch_groups * tiling.chunks;
  const int64_t work = slots * (tiling.width + 1) * tiling.dim;
  parallel_for((tiling.dim + kChannels - 1) / kChannels, num_threads, work, 0,
               [&](int64_t unit, char*) {
                 kernels.reduce(p, tiling, partials.get(), unit * kChannels,
                                std::min(tiling.dim, (unit + 1) * kChannels));
               });
}

}  // namespace causal_conv1d
