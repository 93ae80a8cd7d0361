// The CPU half of the selective scan's C interface: checks of values, and how each operation is cut
// into units of work for the threads. The arithmetic is in scan_*.inl.
#include <algorithm>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <new>
#include <vector>

#include "../scan_check.h"
#include "../selective_scan.h"
#include "dispatch.h"
#include "parallel.h"
#include "scan_kernels.h"

namespace causal_conv1d {
namespace {

const ScanKernels& scan_kernels() {
#if defined(__x86_64__)
  if (active_kernels == &avx512::kernels) return avx512::scan_kernels;
  if (active_kernels == &avx2::kernels) return avx2::scan_kernels;
  return baseline::scan_kernels;
#elif defined(__aarch64__)
  return neon::scan_kernels;
#else
  return baseline::scan_kernels;
#endif
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Channels of a unit at most: all of them share a tile of B and C.
constexpr int64_t kMostChannels = 64;
// Units that there should be, for many threads.
constexpr int64_t kUnits = 32;
// Values (step, n) of a tile, and of a span, for which a unit of a backward keeps sums.
constexpr int64_t kTileValues = 1024, kSpanValues = 1 << 15;
// Values of the memory for such sums, and states, of the segments that are worked on together.
constexpr int64_t kWaveValues = 1 << 23;

ScanPlan make_plan(const ScanInputs& in, int64_t segments) {
  ScanPlan plan = {};
  plan.fp64 = in.u.dtype == CAUSAL_CONV1D_FLOAT64;
  plan.constant_B = is_constant(in.B);
  plan.constant_C = is_constant(in.C);
  plan.dim = in.u.sizes[1];
  plan.dstate = in.A.sizes[1];
  plan.groups = groups_of(in);
  plan.group_dim = plan.dim / plan.groups;
  plan.lanes = plan.fp64 ? 1 : scan_kernels().lanes;
  plan.row = round_up(plan.dstate, plan.lanes);
  plan.tile = std::min<int64_t>(64, std::max<int64_t>(16, kTileValues / plan.dstate / 16 * 16));
  plan.span = std::max(plan.tile, kSpanValues / plan.dstate / plan.tile * plan.tile);
  const int64_t wanted = std::max<int64_t>(1, plan.dim * segments / kUnits);
  plan.block = std::min({round_up(wanted, plan.lanes), kMostChannels,
                         round_up(std::max<int64_t>(1, plan.group_dim), plan.lanes)});
  plan.blocks = divide_up(plan.group_dim, plan.block);
  plan.vectors = plan.block / plan.lanes;
  return plan;
}

int64_t read_index(const Tensor4& t, int64_t i) {
  const char* const data = static_cast<const char*>(t.data);
  if (t.dtype == CAUSAL_CONV1D_INT64) {
    int64_t value;
    std::memcpy(&value, data + i * t.strides[0] * 8, sizeof(value));
    return value;
  }
  int32_t value;
  std::memcpy(&value, data + i * t.strides[0] * 4, sizeof(value));
  return value;
}

std::vector<ScanSegment> segments_of(const ScanInputs& in) {
  std::vector<ScanSegment> segments;
  const int64_t count = sequences_of(in);
  segments.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    if (given(in.cu_seqlens)) {
      segments.push_back({0, read_index(in.cu_seqlens, i), read_index(in.cu_seqlens, i + 1), i});
    } else {
      segments.push_back({i, 0, in.u.sizes[2], i});
    }
  }
  return segments;
}

// Steps begin .. end - 1, the last dimension, of all of a tensor become 0.
void clear_steps(const Tensor4& t, int64_t begin, int64_t end) {
  if (!has_elements(t) || begin >= end) return;
  const size_t size = t.dtype == CAUSAL_CONV1D_FLOAT64   ? 8
                      : t.dtype == CAUSAL_CONV1D_FLOAT32 ? 4
                                                         : 2;
  const bool four = t.ndim == 4;
  const int64_t last = t.ndim - 1;
  for (int64_t i = 0; i < t.sizes[0]; ++i) {
    for (int64_t j = 0; j < t.sizes[1]; ++j) {
      for (int64_t k = 0; k < (four ? t.sizes[2] : 1); ++k) {
        for (int64_t s = begin; s < end; ++s) {
          const int64_t offset = i * t.strides[0] + j * t.strides[1] +
                                 (four ? k * t.strides[2] : 0) + s * t.strides[last];
          std::memset(static_cast<char*>(t.data) + offset * static_cast<int64_t>(size), 0, size);
        }
      }
    }
  }
}

// Steps before the first sequence and behind the last one: results are 0 there.
void clear_outside(const ScanInputs& in, std::initializer_list<const Tensor4*> outputs) {
  if (!given(in.cu_seqlens)) return;
  for (const Tensor4* t : outputs) {
    if (t->ndim < 3) continue;
    clear_steps(*t, 0, read_index(in.cu_seqlens, 0));
    clear_steps(*t, read_index(in.cu_seqlens, in.cu_seqlens.sizes[0] - 1), in.u.sizes[2]);
  }
}

// In elements of a convolution, a thousandth of which is a state and step's.
int64_t work_of(const ScanPlan& plan, const std::vector<ScanSegment>& segments, int64_t cost) {
  int64_t steps = 0;
  for (const ScanSegment& segment : segments) steps += segment.end - segment.begin + 1;
  return plan.dim * steps * (plan.dstate + 8) * cost;
}

void run_forward(const ScanForwardParams& p, int num_threads) {
  const std::vector<ScanSegment> segments = segments_of(p.inputs);
  const ScanPlan plan = make_plan(p.inputs, static_cast<int64_t>(segments.size()));
  const int64_t units = plan.groups * plan.blocks;
  clear_outside(p.inputs, {&p.out, &p.ungated});
  parallel_for(static_cast<int64_t>(segments.size()) * units, num_threads,
               work_of(plan, segments, 1), scan_kernels().forward_scratch(plan),
               [&](int64_t unit, char* scratch) {
                 scan_kernels().forward(p, plan, segments[static_cast<size_t>(unit / units)],
                                        unit % units / plan.blocks, unit % plan.blocks, scratch);
               });
}

// ------------------------------------------------------------------------------------- backward

// Memory of S values for one segment's backward.
struct Memory {
  int64_t sums, starts, partials;  // values of a block
};

// A backward, with sums in S: float or double.
template <class S>
class Backward {
 public:
  Backward(const ScanBackwardParams& p, int num_threads)
      : p_(p),
        in_(p.inputs),
        threads_(num_threads),
        segments_(segments_of(p.inputs)),
        plan_(make_plan(p.inputs, static_cast<int64_t>(segments_.size()))),
        units_(plan_.groups * plan_.blocks) {
    const int64_t vectors = plan_.vectors * plan_.lanes;
    of_block_.sums = vectors * CAUSAL_CONV1D_SCAN_SUMS(plan_.dstate);
    of_block_.starts = vectors * plan_.dstate;
    of_block_.partials = plan_.span * plan_.row;
  }

  void run() {
    clear_outside(in_, {&p_.du, &p_.ddelta, &p_.dz, &p_.out, &p_.dB, &p_.dC});
    totals_.assign(static_cast<size_t>(units_ * of_block_.sums), 0.0);
    for (size_t first = 0; first < segments_.size();) first = run_wave(first);
    store_totals();
  }

 private:
  bool wants(const Tensor4& gradient, bool constant) const { return given(gradient) && !constant; }
  int64_t spans_of(const ScanSegment& segment) const {
    return std::max<int64_t>(1, divide_up(segment.end - segment.begin, plan_.span));
  }

  // Works on some segments from `first` on together; returns the one after them.
  size_t run_wave(size_t first) {
    const int64_t partials = (wants(p_.dB, plan_.constant_B) + wants(p_.dC, plan_.constant_C));
    int64_t values = 0, starts = 0, spans = 0;
    size_t last = first;
    wave_.clear();
    while (last < segments_.size()) {
      const int64_t n = spans_of(segments_[last]);
      const int64_t steps = std::min(plan_.span, segments_[last].end - segments_[last].begin);
      const int64_t more =
          units_ * (of_block_.sums + (n - 1) * of_block_.starts + partials * steps * plan_.row);
      if (last > first && values + more > kWaveValues) break;
      wave_.push_back({segments_[last], n, starts, steps * plan_.row});
      values += more;
      starts += (n - 1) * units_ * of_block_.starts;
      spans = std::max(spans, n);
      ++last;
    }
    const int64_t members = static_cast<int64_t>(wave_.size());
    sums_.reset(new S[static_cast<size_t>(members * units_ * of_block_.sums)]);
    starts_.reset(new S[static_cast<size_t>(starts)]);
    place_partials(partials);
    find_starts(spans);
    for (int64_t span = spans - 1; span >= 0; --span) run_span(span);
    add_sums(members);
    return last;
  }

  struct Member {
    ScanSegment segment;
    int64_t spans, starts;
    int64_t partial;         // values of a block's partial sums of B or C
    int64_t dB = 0, dC = 0;  // where those begin
  };

  void place_partials(int64_t partials) {
    int64_t at = 0;
    for (Member& m : wave_) {
      m.dB = at;
      m.dC = at + (partials == 2 ? units_ * m.partial : 0);
      at += partials * units_ * m.partial;
    }
    partials_.reset(new S[static_cast<size_t>(at)]);
  }

  void find_starts(int64_t spans) {
    if (spans == 1) return;
    parallel_for(static_cast<int64_t>(wave_.size()) * units_, threads_, wave_work(1),
                 scan_kernels().forward_scratch(plan_), [&](int64_t unit, char* scratch) {
                   const Member& m = wave_[static_cast<size_t>(unit / units_)];
                   const int64_t i = unit % units_;
                   if (m.spans == 1) return;
                   scan_kernels().span_starts(in_, plan_, m.segment, i / plan_.blocks,
                                              i % plan_.blocks,
                                              starts_.get() + m.starts + i * of_block_.starts,
                                              units_ * of_block_.starts, scratch);
                 });
  }

  int64_t wave_work(int64_t cost) const {
    int64_t steps = 0;
    for (const Member& m : wave_) {
      steps += std::min(plan_.span, m.segment.end - m.segment.begin) + 1;
    }
    return plan_.dim * steps * (plan_.dstate + 8) * cost;
  }

  // The span of that number of all segments that have it.
  void run_span(int64_t number) {
    parallel_for(static_cast<int64_t>(wave_.size()) * units_, threads_, wave_work(3),
                 scan_kernels().backward_scratch(plan_), [&](int64_t unit, char* scratch) {
                   const int64_t member = unit / units_, i = unit % units_;
                   const Member& m = wave_[static_cast<size_t>(member)];
                   if (number >= m.spans) return;
                   const int64_t begin = m.segment.begin + number * plan_.span;
                   ScanSpan span{};
                   span.begin = begin;
                   span.end = std::min(m.segment.end, begin + plan_.span);
                   span.first = number == 0;
                   span.last = number == m.spans - 1;
                   if (!span.first) {
                     span.start =
                         starts_.get() + m.starts + ((number - 1) * units_ + i) * of_block_.starts;
                   }
                   span.sums = sums_.get() + (member * units_ + i) * of_block_.sums;
                   if (wants(p_.dB, plan_.constant_B)) {
                     span.partial_dB = partials_.get() + m.dB + i * m.partial;
                   }
                   if (wants(p_.dC, plan_.constant_C)) {
                     span.partial_dC = partials_.get() + m.dC + i * m.partial;
                   }
                   scan_kernels().backward(p_, plan_, m.segment, span, i / plan_.blocks,
                                           i % plan_.blocks, scratch);
                 });
    if (wants(p_.dB, plan_.constant_B)) reduce(p_.dB, number, &Member::dB);
    if (wants(p_.dC, plan_.constant_C)) reduce(p_.dC, number, &Member::dC);
  }

  void reduce(const Tensor4& out, int64_t number, int64_t Member::*at) {
    const int64_t chunks = divide_up(plan_.span, kReducedSteps);
    const int64_t count = static_cast<int64_t>(wave_.size()) * plan_.groups * chunks;
    parallel_for(count, threads_, wave_work(1) / 16, 0, [&](int64_t unit, char*) {
      const int64_t chunk = unit % chunks, group = unit / chunks % plan_.groups;
      const Member& m = wave_[static_cast<size_t>(unit / chunks / plan_.groups)];
      if (number >= m.spans) return;
      const int64_t span = m.segment.begin + number * plan_.span;
      const int64_t end = std::min(m.segment.end, span + plan_.span);
      const int64_t begin = span + chunk * kReducedSteps;
      if (begin >= end) return;
      scan_kernels().reduce(
          out, plan_, m.segment.batch, group, begin, std::min(end, begin + kReducedSteps),
          partials_.get() + m.*at + group * plan_.blocks * m.partial + (begin - span) * plan_.row,
          m.partial);
    });
  }

  // To the totals, the segments in their order.
  void add_sums(int64_t members) {
    const int64_t size = of_block_.sums;
    parallel_for(units_, threads_, members * units_ * size / 4, 0, [&](int64_t unit, char*) {
      double* const total = totals_.data() + unit * size;
      for (int64_t member = 0; member < members; ++member) {
        const S* const sums = sums_.get() + (member * units_ + unit) * size;
        for (int64_t i = 0; i < size; ++i) total[i] += static_cast<double>(sums[i]);
      }
    });
  }

  void store_totals() {
    std::vector<S> sums(totals_.size());
    for (size_t i = 0; i < sums.size(); ++i) sums[i] = static_cast<S>(totals_[i]);
    for (int64_t i = 0; i < units_; ++i) {
      scan_kernels().store_sums(p_, plan_, i / plan_.blocks, i % plan_.blocks,
                                sums.data() + i * of_block_.sums);
    }
  }

  static constexpr int64_t kReducedSteps = 256;

  const ScanBackwardParams& p_;
  const ScanInputs& in_;
  const int threads_;
  const std::vector<ScanSegment> segments_;
  const ScanPlan plan_;
  const int64_t units_;  // blocks of all groups
  Memory of_block_;
  std::vector<Member> wave_;
  std::unique_ptr<S[]> sums_, starts_, partials_;
  std::vector<double> totals_;
};

void run_backward(ScanBackwardParams p, int num_threads) {
  // Without elements it gives sums of 0 whatever its sizes, which need no loop over them.
  if (!has_elements(p.inputs.u)) {
    for (Tensor4* t : {&p.dB, &p.dC}) {  // they may have elements, of no channel
      if (t->ndim == 4) clear_steps(*t, 0, t->sizes[3]);
      if (t->ndim == 4) *t = {};
    }
    if (!has_elements(p.dinitial_states)) {
      for (Tensor4* t : {&p.inputs.u, &p.inputs.delta}) t->sizes[0] = t->sizes[2] = 0;
      p.inputs.cu_seqlens = {};
    }
  }
  if (p.inputs.u.dtype == CAUSAL_CONV1D_FLOAT64) {
    Backward<double>(p, num_threads).run();
  } else {
    Backward<float>(p, num_threads).run();
  }
}

// --------------------------------------------------------------------------------------- update

void run_update(const StateUpdateParams& p, int num_threads) {
  constexpr int64_t kBlock = CAUSAL_CONV1D_UPDATE_BLOCK, kUnitStates = 1 << 16;
  const int64_t batch = p.x.sizes[0], heads = p.x.sizes[1], dim = p.x.sizes[2];
  const int64_t dstate = p.state.sizes[3];
  std::vector<int64_t> rows;
  for (int64_t b = 0; given(p.state_indices) && b < batch; ++b) {
    rows.push_back(read_index(p.state_indices, b));
  }
  const int64_t entries =
      std::max<int64_t>(1, std::min(batch, kUnitStates / (std::min(kBlock, dim) * dstate)));
  const int64_t blocks = divide_up(dim, kBlock), parts = divide_up(batch, entries);
  parallel_for(parts * heads * blocks, num_threads, batch * heads * dim * (dstate + 8),
               scan_kernels().update_scratch(p), [&](int64_t unit, char* scratch) {
                 const int64_t first = unit % blocks * kBlock, head = unit / blocks % heads;
                 const int64_t begin = unit / blocks / heads * entries;
                 scan_kernels().update(p, rows.empty() ? nullptr : rows.data(), head, first,
                                       std::min(kBlock, dim - first), begin,
                                       std::min(batch, begin + entries), scratch);
               });
}

// --------------------------------------------------------------------------------------- checks

Status check_sequences(const char* op, const ScanInputs& in) {
  if (!given(in.cu_seqlens)) return ok();
  int64_t previous = 0;
  for (int64_t i = 0; i < in.cu_seqlens.sizes[0]; ++i) {
    const int64_t value = read_index(in.cu_seqlens, i);
    if (value < previous || value > in.u.sizes[2]) {
      return error(CAUSAL_CONV1D_INVALID_ARGUMENT,
                   "%s: cu_seqlens must not decrease and lie within 0..%lld (seqlen), got %lld at "
                   "%lld",
                   op, static_cast<long long>(in.u.sizes[2]), static_cast<long long>(value),
                   static_cast<long long>(i));
    }
    previous = value;
  }
  return ok();
}

Status check_values(const char* op, const ScanForwardParams& p) {
  return check_sequences(op, p.inputs);
}
Status check_values(const char* op, const ScanBackwardParams& p) {
  return check_sequences(op, p.inputs);
}

Status check_values(const char* op, const StateUpdateParams& p) {
  if (!given(p.state_indices)) return ok();
  std::vector<int64_t> rows;
  for (int64_t b = 0; b < p.state_indices.sizes[0]; ++b) {
    const int64_t row = read_index(p.state_indices, b);
    if (row >= p.state.sizes[0]) {
      return error(CAUSAL_CONV1D_INVALID_ARGUMENT,
                   "%s: state_indices must be < %lld, got %lld at %lld", op,
                   static_cast<long long>(p.state.sizes[0]), static_cast<long long>(row),
                   static_cast<long long>(b));
    }
    if (row >= 0) rows.push_back(row);
  }
  std::sort(rows.begin(), rows.end());
  const auto twice = std::adjacent_find(rows.begin(), rows.end());
  if (twice == rows.end()) return ok();
  return error(CAUSAL_CONV1D_INVALID_ARGUMENT,
               "%s: state_indices must name a row once, got %lld twice", op,
               static_cast<long long>(*twice));
}

template <class Params, class Run>
Status checked(const char* op, const Params* params, int num_threads, Run run) noexcept {
  try {
    Status status = check(params);
    if (status.code != CAUSAL_CONV1D_OK || !has_work(*params)) return status;
    if (active_kernels == nullptr) return no_kernels(op);
    status = check_values(op, *params);
    if (status.code == CAUSAL_CONV1D_OK) run(*params, num_threads);
    return status;
  } catch (const std::bad_alloc&) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s: out of memory", op);
  } catch (const std::exception& e) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s: %s", op, e.what());
  } catch (...) {
    return error(CAUSAL_CONV1D_RUNTIME_ERROR, "%s: unknown error", op);
  }
}

}  // namespace
}  // namespace causal_conv1d

using namespace causal_conv1d;

causal_conv1d_status causal_conv1d_cpu_scan_forward(const causal_conv1d_scan_forward_params* params,
                                                    int num_threads) {
  return checked("selective_scan_fwd", params, num_threads, run_forward);
}

causal_conv1d_status causal_conv1d_cpu_scan_backward(
    const causal_conv1d_scan_backward_params* params, int num_threads) {
  return checked("selective_scan_bwd", params, num_threads, run_backward);
}

causal_conv1d_status causal_conv1d_cpu_state_update(const causal_conv1d_state_update_params* params,
                                                    int num_threads) {
  return checked("selective_state_update", params, num_threads, run_update);
}
