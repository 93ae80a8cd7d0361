// The selective scan for one instruction set: scan_*.cpp each include this once. As in
// kernels/table.h all but the table has internal linkage, and no standard library is used.
#include "scan_backward.inl"
#include "scan_update.inl"

namespace causal_conv1d {
namespace {

template <class V>
size_t forward_scratch_of(const ScanPlan& plan) {
  Scratch scratch{nullptr};
  const Buffers<V> buffers(plan, &scratch);
  return scratch.used;
}
size_t scan_forward_scratch(const ScanPlan& plan) {
  return plan.fp64 ? forward_scratch_of<DoubleVec>(plan) : forward_scratch_of<Native>(plan);
}

template <class V>
size_t backward_scratch_of(const ScanPlan& plan) {
  Scratch scratch{nullptr};
  const Buffers<V> buffers(plan, &scratch);
  const BackwardBuffers<V> more(plan, &scratch);
  return scratch.used;
}
size_t scan_backward_scratch(const ScanPlan& plan) {
  return plan.fp64 ? backward_scratch_of<DoubleVec>(plan) : backward_scratch_of<Native>(plan);
}

void scan_forward(const ScanForwardParams& p, const ScanPlan& plan, const ScanSegment& segment,
                  int64_t group, int64_t block, char* scratch) {
  (plan.fp64 ? forward_unit<DoubleVec> : forward_unit<Native>)(p, plan, segment, group, block,
                                                               {scratch});
}

void scan_span_starts(const ScanInputs& in, const ScanPlan& plan, const ScanSegment& segment,
                      int64_t group, int64_t block, void* starts, int64_t stride, char* scratch) {
  if (plan.fp64) {
    span_starts_unit<DoubleVec>(in, plan, segment, group, block, static_cast<double*>(starts),
                                stride, {scratch});
  } else {
    span_starts_unit<Native>(in, plan, segment, group, block, static_cast<float*>(starts), stride,
                             {scratch});
  }
}

void scan_backward(const ScanBackwardParams& p, const ScanPlan& plan, const ScanSegment& segment,
                   const ScanSpan& span, int64_t group, int64_t block, char* memory) {
  Scratch scratch{memory};
  if (plan.fp64) {
    BackwardUnit<DoubleVec>(p, plan, segment, span, group, block, &scratch).run();
  } else {
    BackwardUnit<Native>(p, plan, segment, span, group, block, &scratch).run();
  }
}

void scan_reduce(const Tensor4& out, const ScanPlan& plan, int64_t batch, int64_t group,
                 int64_t begin, int64_t end, void* partials, int64_t stride) {
  if (plan.fp64) {
    reduce_partials<DoubleVec>(out, plan, batch, group, begin, end, static_cast<double*>(partials),
                               stride);
  } else {
    reduce_partials<Native>(out, plan, batch, group, begin, end, static_cast<float*>(partials),
                            stride);
  }
}

void scan_store_sums(const ScanBackwardParams& p, const ScanPlan& plan, int64_t group,
                     int64_t block, const void* sums) {
  if (plan.fp64) {
    store_sums_of<DoubleVec>(p, plan, group, block, static_cast<const double*>(sums));
  } else {
    store_sums_of<Native>(p, plan, group, block, static_cast<const float*>(sums));
  }
}

}  // namespace

namespace CAUSAL_CONV1D_ISA {

extern const ScanKernels scan_kernels;
const ScanKernels scan_kernels = {
    Native::kLanes,  scan_forward_scratch, scan_backward_scratch, state_update_scratch,
    scan_forward,    scan_span_starts,     scan_backward,         scan_reduce,
    scan_store_sums, state_update,
};

}  // namespace CAUSAL_CONV1D_ISA
}  // namespace causal_conv1d
