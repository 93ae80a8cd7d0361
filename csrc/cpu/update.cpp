// The update on the threads, in two turns where entries share a row of the state.
#include <algorithm>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "index_tensor.h"
#include "operations.h"
#include "parallel.h"
#include "tiling.h"

namespace causal_conv1d {
namespace {

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
    const int64_t row = index_at(indices, b);
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
    const int64_t row = index_at(indices, b);
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

}  // namespace

void run_update(UpdateParams p, int num_threads) {
  p.x = with_time(p.x);
  p.out = with_time(p.out);
  if (p.x.sizes[2] == 0) return;
  const KernelTable& kernels = *active_kernels;
  const Tiling tiling = make_tiling(p.x, p.weight, {Operation::kUpdate, kernels.has_direct});
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

}  // namespace causal_conv1d
