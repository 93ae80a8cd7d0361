// A small call of one operator whose results are compared by value. Where it runs, and what is
// right, is the caller's: a GPU's first call compares CUDA with the CPU.
#pragma once

#include <string>
#include <vector>

#include "check.h"

namespace causal_conv1d {

class SelfTest {
 public:
  enum Operator { kForward, kBackward, kUpdate, kVarlenStates };

  // dtype is that of all tensors but indices, a causal_conv1d_dtype. The width is 4 and all rows
  // are aligned, as in most calls: the kernel that runs is then the one that those need.
  SelfTest(Operator which, int dtype, bool channel_last);

  // The call's tensors are parts of one memory, aligned to 16 bytes: this is its content before the
  // call, with NaN in what the call only writes.
  std::vector<char> inputs() const;

  // f of the call's parameters, whose tensors are in that memory.
  template <typename F>
  Status call(void* memory, F&& f) const {
    const auto at = [&](Part part, int64_t size0, int64_t size1 = 0, int64_t size2 = 0) {
      return tensor(memory, part, size0, size1, size2);
    };
    const Tensor x = at(kX, kBatch, kDim, kSeqlen), weight = at(kWeight, kDim, kWidth),
                 bias = at(kBias, kDim), states = at(kStates, kBatch, kDim, kWidth - 1),
                 out = at(kOut, kBatch, kDim, kSeqlen);
    switch (which_) {
      case kForward: return f(ForwardParams{x, weight, bias, {}, states, out, {}, 1});
      case kBackward:
        return f(BackwardParams{x,
                                weight,
                                bias,
                                at(kDout, kBatch, kDim, kSeqlen),
                                {},
                                states,
                                states,
                                out,
                                at(kDweight, kDim, kWidth),
                                at(kDbias, kDim),
                                {},
                                1});
      case kUpdate:
        return f(UpdateParams{at(kX, kBatch, kDim),
                              at(kConvState, kBatch, kDim, kWidth),
                              weight,
                              bias,
                              at(kOut, kBatch, kDim),
                              {},
                              {},
                              1});
      default:
        return f(VarlenStatesParams{at(kX, kSeqlen, kDim), cu_seqlens(memory),
                                    at(kOut, kBatch, kDim, kWidth - 1)});
    }
  }

  // What is wrong with the memory after the call, in one sentence, or nothing.
  std::string problem(const char* found, const char* expected) const;

  // What the call writes, by name, each a range of bytes of the memory.
  struct Output {
    const char* name;
    int64_t begin, end;
  };
  std::vector<Output> outputs() const;

 private:
  static constexpr int64_t kBatch = 2, kDim = 16, kSeqlen = 24, kWidth = 4;
  enum Part { kX, kDout, kStates, kConvState, kWeight, kBias, kOut, kDweight, kDbias, kParts };

  Tensor tensor(void* memory, Part part, int64_t size0, int64_t size1, int64_t size2) const;
  Tensor cu_seqlens(void* memory) const;

  Operator which_;
  int dtype_;
  bool channel_last_;
  int64_t begin_[kParts + 1];  // of each part in bytes; the last is that of cu_seqlens
};

}  // namespace causal_conv1d
