// A small call of an operation of the selective scan, whose results are compared by value, as those
// of self_test.h.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "scan_check.h"

namespace causal_conv1d {

class ScanSelfTest {
 public:
  enum Operator { kForward, kBackward, kStateUpdate };

  // dtype is that of all tensors.
  ScanSelfTest(Operator which, int dtype);

  // As SelfTest has them.
  std::vector<char> inputs() const;
  std::string problem(const char* found, const char* expected) const;
  struct Output {
    const char* name;
    int64_t begin, end;
  };
  std::vector<Output> outputs() const;

  template <typename F>
  Status call(void* memory, F&& f) const {
    const auto at = [&](Part part, std::initializer_list<int64_t> sizes) {
      return tensor(memory, part, sizes);
    };
    const auto in_time = [&](Part part) { return at(part, {1, kDim, kSeqlen}); };
    const auto projection = [&](Part part) { return at(part, {1, 1, kDstate, kSeqlen}); };
    const auto states = [&](Part part) { return at(part, {1, kDim, kDstate}); };
    const auto of_head = [&](Part part) { return at(part, {1, 1, kDim}); };
    if (which_ == kStateUpdate) {
      return f(StateUpdateParams{at(kStates, {1, 1, kDim, kDstate}), of_head(kU), of_head(kDelta),
                                 states(kA), at(kB, {1, 1, kDstate}), at(kC, {1, 1, kDstate}),
                                 at(kD, {1, kDim}), of_head(kZ), at(kBias, {1, kDim}), Tensor4{},
                                 of_head(kOut), 1});
    }
    const ScanInputs in = {in_time(kU),
                           in_time(kDelta),
                           at(kA, {kDim, kDstate}),
                           projection(kB),
                           projection(kC),
                           at(kD, {kDim}),
                           in_time(kZ),
                           at(kBias, {kDim}),
                           states(kStates),
                           Tensor4{},
                           1};
    if (which_ == kForward) {
      return f(ScanForwardParams{in, in_time(kOut), Tensor4{}, states(kLastStates)});
    }
    return f(ScanBackwardParams{in, in_time(kDout), states(kDlastStates), in_time(kDu),
                                in_time(kDdelta), at(kDA, {kDim, kDstate}), projection(kDB),
                                projection(kDC), at(kDD, {kDim}), in_time(kDz), at(kDbias, {kDim}),
                                states(kDstates), Tensor4{}});
  }

 private:
  static constexpr int64_t kDim = 16, kSeqlen = 96, kDstate = 16;
  // What is written begins with kOut.
  enum Part {
    kU,
    kDelta,
    kZ,
    kB,
    kC,
    kA,
    kStates,
    kD,
    kBias,
    kDout,
    kDlastStates,
    kOut,
    kLastStates,
    kDu,
    kDdelta,
    kDz,
    kDB,
    kDC,
    kDA,
    kDstates,
    kDD,
    kDbias,
    kParts
  };

  Tensor4 tensor(void* memory, Part part, std::initializer_list<int64_t> sizes) const;

  Operator which_;
  int dtype_;
  int64_t begin_[kParts + 1];  // of each part in bytes
};

}  // namespace causal_conv1d
