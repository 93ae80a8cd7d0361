#include "self_test.h"

#include "self_test_values.h"

#include <cstring>
namespace causal_conv1d {
namespace {

constexpr int32_t kBounds[] = {0, 2, 24};  // cu_seqlens

}  // namespace

SelfTest::SelfTest(Operator which, int dtype, bool channel_last)
    : which_(which), dtype_(dtype), channel_last_(channel_last) {
  constexpr int64_t kElements[kParts] = {
      kBatch * kDim * kSeqlen, kBatch * kDim * kSeqlen, kBatch * kDim * (kWidth - 1),
      kBatch * kDim * kWidth,  kDim * kWidth,           kDim,
      kBatch * kDim * kSeqlen, kDim * kWidth,           kDim};
  static_assert(kDim % 8 == 0, "every part begins at a multiple of 16 bytes");
  begin_[0] = 0;
  for (int i = 0; i < kParts; ++i) {
    begin_[i + 1] = begin_[i] + kElements[i] * element_size(dtype);
  }
}

std::vector<char> SelfTest::inputs() const {
  std::vector<char> memory(static_cast<size_t>(begin_[kParts]) + sizeof kBounds);
  const int64_t size = element_size(dtype_);
  for (int64_t at = 0; at < begin_[kParts]; at += size) {
    const float number = static_cast<float>(at / size * 37 % 17 - 8) / 8;
    const bool is_input = at < begin_[kOut];
    store(&memory[static_cast<size_t>(at)], dtype_, is_input ? number : NAN);
  }
  std::memcpy(&memory[static_cast<size_t>(begin_[kParts])], kBounds, sizeof kBounds);
  return memory;
}

Tensor SelfTest::tensor(void* memory, Part part, int64_t size0, int64_t size1,
                        int64_t size2) const {
  Tensor t{};
  t.data = static_cast<char*>(memory) + begin_[part];
  t.dtype = dtype_;
  t.ndim = size1 == 0 ? 1 : size2 == 0 ? 2 : 3;
  t.sizes[0] = size0;
  t.sizes[1] = size1;
  t.sizes[2] = size2;
  const bool last = t.ndim == 3 && channel_last_;
  t.strides[0] = t.ndim == 1 ? 1 : t.ndim == 2 ? size1 : size1 * size2;
  t.strides[1] = t.ndim < 3 || last ? 1 : size2;
  t.strides[2] = last ? size1 : 1;
  return t;
}

Tensor SelfTest::cu_seqlens(void* memory) const {
  Tensor t{};
  t.data = static_cast<char*>(memory) + begin_[kParts];
  t.dtype = CAUSAL_CONV1D_INT32;
  t.ndim = 1;
  t.sizes[0] = kBatch + 1;
  t.strides[0] = 1;
  return t;
}

std::vector<SelfTest::Output> SelfTest::outputs() const {
  const auto output = [&](const char* name, Part part, int64_t elements) {
    return Output{name, begin_[part], begin_[part] + elements * element_size(dtype_)};
  };
  switch (which_) {
    case kForward: return {output("out", kOut, kBatch * kDim * kSeqlen)};
    case kBackward:
      return {output("dx", kOut, kBatch * kDim * kSeqlen),
              output("dweight", kDweight, kDim * kWidth), output("dbias", kDbias, kDim)};
    case kUpdate:
      return {output("update's out", kOut, kBatch * kDim),
              output("conv_state", kConvState, kBatch * kDim * kWidth)};
    default: return {output("varlen_states", kOut, kBatch * kDim * (kWidth - 1))};
  }
}

std::string SelfTest::problem(const char* found, const char* expected) const {
  for (const Output& output : outputs()) {
    const double worst = error_between(found, expected, output.begin, output.end, dtype_);
    if (worst > 0) {
      return describe_error(output.name, dtype_, channel_last_ ? "channel-last" : "channel-first",
                            worst);
    }
  }
  return {};
}

}  // namespace causal_conv1d
