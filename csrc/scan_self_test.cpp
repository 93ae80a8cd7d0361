#include "scan_self_test.h"

#include "self_test_values.h"

namespace causal_conv1d {

ScanSelfTest::ScanSelfTest(Operator which, int dtype) : which_(which), dtype_(dtype) {
  static_assert(kDim % 8 == 0, "every part begins at a multiple of 16 bytes");
  constexpr int64_t kInTime = kDim * kSeqlen, kProjection = kDstate * kSeqlen,
                    kOfStates = kDim * kDstate;
  constexpr int64_t kElements[kParts] = {
      kInTime,     kInTime,     kInTime,   kProjection, kProjection, kOfStates, kOfStates, kDim,
      kDim,        kInTime,     kOfStates, kInTime,     kOfStates,   kInTime,   kInTime,   kInTime,
      kProjection, kProjection, kOfStates, kOfStates,   kDim,        kDim};
  begin_[0] = 0;
  for (int i = 0; i < kParts; ++i) {
    begin_[i + 1] = begin_[i] + kElements[i] * element_size(dtype);
  }
}

// Numbers in -1..1, but for A in -1..0, so that states stay bounded.
std::vector<char> ScanSelfTest::inputs() const {
  std::vector<char> memory(static_cast<size_t>(begin_[kParts]));
  const int64_t size = element_size(dtype_);
  for (int64_t at = 0; at < begin_[kParts]; at += size) {
    float number = static_cast<float>(at / size * 37 % 17 - 8) / 8;
    if (at >= begin_[kA] && at < begin_[kA + 1]) number = -std::fabs(number);
    store(&memory[static_cast<size_t>(at)], dtype_, at < begin_[kOut] ? number : NAN);
  }
  return memory;
}

Tensor4 ScanSelfTest::tensor(void* memory, Part part, std::initializer_list<int64_t> sizes) const {
  Tensor4 t{};
  t.data = static_cast<char*>(memory) + begin_[part];
  t.dtype = dtype_;
  for (const int64_t size : sizes) t.sizes[t.ndim++] = size;
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.strides[i] = stride;
    stride *= t.sizes[i];
  }
  return t;
}

std::vector<ScanSelfTest::Output> ScanSelfTest::outputs() const {
  const auto whole = [this](const char* name, Part part) {
    return Output{name, begin_[part], begin_[part + 1]};
  };
  if (which_ == kForward) {
    return {whole("selective_scan_fn's out", kOut), whole("last_states", kLastStates)};
  }
  if (which_ == kStateUpdate) {
    const int64_t end = begin_[kOut] + kDim * element_size(dtype_);
    return {{"selective_state_update's out", begin_[kOut], end}, whole("state", kStates)};
  }
  return {whole("du", kDu),
          whole("ddelta", kDdelta),
          whole("dz", kDz),
          whole("dB", kDB),
          whole("dC", kDC),
          whole("dA", kDA),
          whole("dD", kDD),
          whole("ddelta_bias", kDbias),
          whole("dinitial_states", kDstates)};
}

std::string ScanSelfTest::problem(const char* found, const char* expected) const {
  for (const Output& output : outputs()) {
    const double worst = error_between(found, expected, output.begin, output.end, dtype_);
    if (worst > 0) return describe_error(output.name, dtype_, "contiguous", worst);
  }
  return {};
}

}  // namespace causal_conv1d
