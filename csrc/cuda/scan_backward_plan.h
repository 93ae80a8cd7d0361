// How the scan's backward divides a problem, and the workspace that it needs: host C++, without
// CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

namespace causal_conv1d::gpu::scan {

// What grows with the number of chunks has this many bytes at most, if there is more than one.
constexpr int64_t kMostOfSpan = int64_t{128} << 20;

struct BackwardProblem {
  int64_t sequences, seqlen, dim, groups, dstate;
  bool packed = false, B_constant = false, C_constant = false;
  int64_t size = 4;  // of a number
  int64_t multiprocessors = 1;
  int64_t steps = 64, channels = 32, align = 8;  // of a chunk, of a block, of a chunk's beginning
};

// Chunks are numbered through all sequences, and taken in spans of consecutive ones, from the last
// span to the first. Where a sequence goes on in the next span, its state at the border is found
// by a sweep before.
struct BackwardPlan {
  enum Buffer {
    kFirstChunks,
    kH,  // these by chunk of a span
    kG,
    kConstantB,
    kConstantC,
    kSumDt,
    kSumD,
    kSumBias,
    kPartB,
    kPartC,
    kBorders,  // these once
    kTotals,
    kBuffers
  };
  int64_t chunks_a_row = 0, chunks = 0;  // with cu_seqlens there may be fewer
  int64_t span = 0, spans = 1;
  bool sweep = false;
  int64_t passes = 1, parts = 1;  // blocks of channels that a block takes; blocks of a group
  int64_t bytes[kBuffers] = {};
  int64_t workspace = 0;

  explicit BackwardPlan(const BackwardProblem& q) {
    chunks_a_row = up(q.seqlen, q.steps);
    chunks = q.sequences * chunks_a_row;
    // A sequence of n steps has at most (n + align - 1 + steps - 1) / steps chunks.
    if (q.packed) chunks = (q.seqlen + q.sequences * (q.steps + q.align - 2)) / q.steps;
    span = chunks;
    while (set_span(q) > kMostOfSpan && span > 1) span -= up(span, 16);
    const bool whole_rows = !q.packed && span >= chunks_a_row;
    if (span < chunks && whole_rows) {
      span = span / chunks_a_row * chunks_a_row;
      set_span(q);
    }
    spans = std::max<int64_t>(1, up(chunks, std::max<int64_t>(1, span)));
    sweep = spans > 1 && !whole_rows;
    set_rest(q);
  }

  // A state at each border, two of gradients, and the sums of spans that were taken before.
  int64_t once() const { return bytes[kBorders] + bytes[kTotals]; }

 private:
  static int64_t up(int64_t x, int64_t y) { return (x + y - 1) / y; }

  // What depends on span, and its bytes.
  int64_t set_span(const BackwardProblem& q) {
    // As many blocks as leave each multiprocessor this many. The fewer parts, the less memory.
    constexpr int64_t blocks_each = 16;
    const int64_t blocks = up(q.dim / q.groups, q.channels);
    passes = span * q.groups * blocks / (blocks_each * q.multiprocessors);
    passes = std::max<int64_t>(1, std::min(passes, blocks));
    parts = up(blocks, passes);
    const int64_t channels = span * q.dim * q.size, states = channels * q.dstate;
    const int64_t sums = parts * span * q.groups * q.dstate * q.steps * q.size;
    bytes[kH] = bytes[kG] = states;
    bytes[kConstantB] = q.B_constant ? states : 0;
    bytes[kConstantC] = q.C_constant ? states : 0;
    bytes[kSumDt] = bytes[kSumD] = bytes[kSumBias] = channels;
    bytes[kPartB] = q.B_constant ? 0 : sums;
    bytes[kPartC] = q.C_constant ? 0 : sums;
    int64_t all = 0;
    for (int i = kH; i <= kPartC; ++i) all += bytes[i];
    return all;
  }

  void set_rest(const BackwardProblem& q) {
    const int64_t state = q.dim * q.dstate * q.size;
    bytes[kFirstChunks] = q.packed ? 8 * (q.sequences + 1) : 0;
    bytes[kBorders] = sweep ? (spans + 1) * state : 0;
    bytes[kTotals] = spans > 1 ? 3 * state + 2 * q.dim * q.size : 0;
    for (int64_t& b : bytes) {
      b = up(b, 16) * 16;
      workspace += b;
    }
  }
};

}  // namespace causal_conv1d::gpu::scan
