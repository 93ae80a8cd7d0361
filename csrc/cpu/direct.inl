// Forward and backward for widths 2 to 4 without seq_idx, straight between the caller's memory and
// registers. Included by kernels.inl where there are vectors.
//
// The innermost functions (forward_*_groups, backward_*_groups) work on whole groups (simd/groups.h) in
// unit strides. Whatever is not so (other strides, the ends of rows) is copied to or from a small
// piece of memory, `stage`, so that results do not depend on strides. All compute the same chain of
// multiply-adds as the general kernels and therefore the same bits.
//
//   channel_first: a group is kGroup times of one channel. Taps are slid out of two groups.
//   channel_last:  a group is kGroup channels of one time. Some rows of a group are walked with the
//                  last width - 1 rows in registers, which wait in scratch for the next rows.
//
// backward computes dz, the gradient of the sum, from x and dout; adds dz * x to the sums of
// dweight; and combines dz with those before it to dx, one group (channel_first) or width - 1 rows
// (channel_last) earlier. Where dx needs more than that (the ends: dinitial_states, dfinal_states,
// chunks), it goes to `edge` in fp32 instead.

// ---- small helpers --------------------------------------------------------------------------

// A NaN in fp32 may have any lowest bits; groups of bfloat16 ask for zeros.
inline void plain_nans(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, p + i, sizeof(bits));
    bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits;
    __builtin_memcpy(p + i, &bits, sizeof(bits));
  }
}

// n floats, n a multiple of kGroup, from consecutive elements to the order of groups, and back.
template <class T>
void to_groups(float* p, int64_t n) {
  plain_nans(p, n);
  if (!kEvenOdd<T>) return;
  for (int64_t i = 0; i < n; i += kGroup) {
    float group[kGroup];
    for (int j = 0; j < kGroup; ++j) group[lane_of<T>(j)] = p[i + j];
    __builtin_memcpy(p + i, group, sizeof(group));
  }
}

template <class T>
void from_groups(float* p, int64_t n) {
  if (!kEvenOdd<T>) return;
  for (int64_t i = 0; i < n; i += kGroup) {
    float group[kGroup];
    for (int j = 0; j < kGroup; ++j) group[j] = p[i + lane_of<T>(j)];
    __builtin_memcpy(p + i, group, sizeof(group));
  }
}

template <class T>
void gather(const char* src, int64_t stride, int64_t n, T* dst) {
  for (int64_t i = 0; i < n; ++i) {
    __builtin_memcpy(dst + i, src + i * stride * static_cast<int64_t>(sizeof(T)), sizeof(T));
  }
}

template <class T>
void scatter(const T* src, int64_t n, char* dst, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    __builtin_memcpy(dst + i * stride * static_cast<int64_t>(sizeof(T)), src + i, sizeof(T));
  }
}

CAUSAL_CONV1D_INLINE int64_t past_line(const void* p) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % 64);
}

template <class T>
constexpr bool kShortSilu = sizeof(T) == 2;

// sum over k of taps[k] * window[k], as fused multiply-adds in this order.
template <int kWidth>
CAUSAL_CONV1D_INLINE Vec weighted(Vec start, const Vec* taps, const Vec* window) {
  for (int k = 0; k < kWidth; ++k) start = fma(taps[k], window[k], start);
  return start;
}

// The chain from a sum to its silu is longer than the CPU looks ahead, and its constants fill the
// registers. So a Run of sums is written to the L1 cache first, and what follows from them is done
// in further loops over the run, whose rounds are short and independent.
constexpr int64_t kRun = 32;  // groups
struct Run {
  // Apart by other than a multiple of 4096 bytes, where a load would wait for another's store.
  alignas(64) float sums[(kRun + 8) * kGroup], denominators[kRun * kGroup];
};

template <bool kValue>
struct Flag {
  constexpr operator bool() const { return kValue; }
};

// rows x groups that will be read soon, fetched in rounds that read no others; an address, for it
// may lie behind the end of the memory. The hardware's own reading ahead ends at pages of 4096
// bytes, does not follow as many rows as channel_last walks, and is too late for short stretches.
template <class T>
struct Ahead {
  uintptr_t address;
  int64_t stride;
  // `distance` elements behind p.
  CAUSAL_CONV1D_INLINE Ahead(const T* p, int64_t distance, int64_t row_stride)
      : address(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(distance) * sizeof(T)),
        stride(row_stride) {}
  CAUSAL_CONV1D_INLINE void fetch(int64_t r, int64_t g) const {
    constexpr int64_t kBytes = kGroup * sizeof(T);
    const uintptr_t group = address + static_cast<uintptr_t>((r * stride + g * kGroup)) * sizeof(T);
    for (int64_t i = 0; i < kBytes; i += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(group + static_cast<uintptr_t>(i)));
    }
  }
};

// What comes out of the sums of rows x groups: themselves or their silu, to rows `stride` apart.
template <class T, bool kSilu, bool kStream>
void store_sums_as(Run* run, int64_t rows, int64_t groups, T* out, int64_t stride,
                   Ahead<T> x_ahead) {
  int64_t i = 0;
  for (int64_t r = 0; kSilu && r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t g = 0; g < groups; ++g, i += kGroup) {
      x_ahead.fetch(r, g);
      begin_silu<kShortSilu<T>>(Vec::load(run->sums + i)).denominator.store(run->denominators + i);
    }
  }
  i = 0;
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t g = 0; g < groups; ++g, i += kGroup) {
      if (!kSilu) x_ahead.fetch(r, g);
      const Vec sum = Vec::load(run->sums + i);
      store_group(kSilu ? end_silu<kShortSilu<T>>({sum, Vec::load(run->denominators + i)}) : sum,
                  kStream, out + r * stride + g * kGroup);
    }
  }
}

template <class T>
CAUSAL_CONV1D_INLINE void store_sums(Run* run, int64_t rows, int64_t groups, T* out, int64_t stride,
                                     Ahead<T> x_ahead, bool with_silu, bool stream) {
  (with_silu ? stream ? store_sums_as<T, true, true> : store_sums_as<T, true, false>
   : stream ? store_sums_as<T, false, true>
             : store_sums_as<T, false, false>)(run, rows, groups, out, stride, x_ahead);
}

// The sums become dz = dout * silu'(sum).
template <class T>
void to_gradients(Run* run, int64_t rows, int64_t groups, const T* dout, int64_t stride,
                  Ahead<T> x_ahead, Ahead<T> dout_ahead) {
  int64_t i = 0;
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t g = 0; g < groups; ++g, i += kGroup) {
      x_ahead.fetch(r, g);
      begin_silu<kShortSilu<T>>(Vec::load(run->sums + i)).denominator.store(run->denominators + i);
    }
  }
  i = 0;
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t g = 0; g < groups; ++g, i += kGroup) {
      dout_ahead.fetch(r, g);
      const SiluPart part = {Vec::load(run->sums + i), Vec::load(run->denominators + i)};
      mul(load_group(dout + r * stride + g * kGroup), end_silu_derivative(part))
          .store(run->sums + i);
    }
  }
}

// ---- channel_first --------------------------------------------------------------------------

// Groups of a run: few, for stores past the caches are many in one of its loops and none in others.
constexpr int64_t kFirstRun = 16;
// How far ahead of what is read.
template <class T>
constexpr int64_t kFirstAhead = 2048 / sizeof(T);

// Elements per stage.
constexpr int64_t kStage = 16 * kGroup;

// window[k] = x of width - 1 - k earlier.
template <class T, int kWidth, int k = 0>
CAUSAL_CONV1D_INLINE void slide_back(Vec before, Vec x, Vec* window) {
  if constexpr (k + 1 == kWidth) {
    window[k] = x;
  } else {
    window[k] = slide<T, kGroup - (kWidth - 1 - k)>(before, x);
    slide_back<T, kWidth, k + 1>(before, x, window);
  }
}

// window[k] = dz of k later.
template <class T, int kWidth, int k = 0>
CAUSAL_CONV1D_INLINE void slide_forth(Vec dz, Vec after, Vec* window) {
  if constexpr (k < kWidth) {
    window[k] = slide<T, k>(dz, after);
    slide_forth<T, kWidth, k + 1>(dz, after, window);
  }
}

// history: the group before x, in the order of groups. Returns the last one of x.
template <class T, int kWidth>
CAUSAL_CONV1D_INLINE Vec sum_groups(const T* x, int64_t groups, const float* w, float bias,
                                    Vec before, float* sums) {
  Vec taps[kWidth];
  for (int k = 0; k < kWidth; ++k) taps[k] = Vec::set(w[k]);
  const Vec start = Vec::set(bias);
#pragma GCC unroll 2
  for (int64_t g = 0; g < groups; ++g) {
    const Vec current = load_group(x + g * kGroup);
    Vec window[kWidth];
    slide_back<T, kWidth>(before, current, window);
    before = current;
    weighted<kWidth>(start, taps, window).store(sums + g * kGroup);
  }
  return before;
}

// history: the group before x, in the order of groups; then the last one of x.
template <class T, int kWidth>
void forward_first_groups(const T* x, T* out, int64_t groups, const float* w, float bias,
                          float* history, bool with_silu, bool stream) {
  Run run;
  Vec before = Vec::load(history);
  for (int64_t g = 0, count; g < groups; g += count) {
    count = smaller(kFirstRun, groups - g);
    before = sum_groups<T, kWidth>(x + g * kGroup, count, w, bias, before, run.sums);
    store_sums(&run, 1, count, out + g * kGroup, 0, Ahead<T>(x + g * kGroup, kFirstAhead<T>, 0),
               with_silu, stream);
  }
  before.store(history);
}

// Of the width - 1 inputs in `halo` and the n of x that follow them, the last width - 1 to `halo`.
template <class T, int kWidth>
void advance(const T* x, int64_t n, float* halo) {
  float row[kWidth - 1 + kGroup];
  __builtin_memcpy(row, halo, (kWidth - 1) * sizeof(float));
  Vec::load(x).store(row + kWidth - 1);
  __builtin_memcpy(halo, row + n, (kWidth - 1) * sizeof(float));
}

// The group before, of which only the width - 1 last elements matter.
template <class T, int kWidth>
void history_of(float* halo, float* history) {
  plain_nans(halo, kWidth - 1);
  __builtin_memset(history, 0, kGroup * sizeof(float));
  for (int i = 0; i < kWidth - 1; ++i) history[lane_of<T>(kGroup - (kWidth - 1) + i)] = halo[i];
}

// One channel, n times; halo: the width - 1 inputs before.
template <class T, int kWidth>
void forward_first_row(const char* x, int64_t x_stride, char* out, int64_t out_stride, int64_t n,
                       const float* w, float bias, float* halo, bool with_silu, bool stream) {
  constexpr int64_t kSize = sizeof(T);
  alignas(64) T stage_x[kStage];
  alignas(64) T stage_out[kStage];
  alignas(64) float history[kGroup];
  const auto staged = [&](int64_t begin, int64_t count) {
    const int64_t groups = (count + kGroup - 1) / kGroup;
    __builtin_memset(stage_x + (groups - 1) * kGroup, 0, kGroup * sizeof(T));
    gather(x + begin * x_stride * kSize, x_stride, count, stage_x);
    forward_first_groups<T, kWidth>(stage_x, stage_out, groups, w, bias, history, with_silu, false);
    scatter(stage_out, count, out + begin * out_stride * kSize, out_stride);
  };
  history_of<T, kWidth>(halo, history);
  int64_t i = 0;
  if (x_stride == 1 && out_stride == 1) {
    stream = stream && past_line(out) % kSize == 0;
    if (stream && past_line(out) != 0) {  // up to a line's start
      i = smaller(n, (64 - past_line(out)) / kSize);
      staged(0, i);
      advance<T, kWidth>(stage_x, i, halo);
      history_of<T, kWidth>(halo, history);
    }
    const int64_t groups = (n - i) / kGroup;
    forward_first_groups<T, kWidth>(reinterpret_cast<const T*>(x + i * kSize),
                                    reinterpret_cast<T*>(out + i * kSize), groups, w, bias, history,
                                    with_silu, stream);
    i += groups * kGroup;
  }
  for (int64_t count; i < n; i += count) {
    count = smaller(kStage, n - i);
    staged(i, count);
  }
}

// Groups that are summed in fp32.
constexpr int64_t kFlush = 256;

// What goes from run to run of groups of one channel.
struct FirstState {
  alignas(64) float x[kGroup], dz[kGroup];  // the group before, in the order of groups
  alignas(64) float sums[(4 + 1) * Native::kLanes];
};

// Of a group, what vectors i add to the sums. (A loop over i would keep acc out of registers.)
template <int kWidth, int i>
CAUSAL_CONV1D_INLINE void accumulate(Vec dz, const Vec* window, Native* acc) {
  static_assert(kNativesInVec == 2);
  for (int k = 0; k < kWidth; ++k) acc[k] = fma(dz.v[i], window[k].v[i], acc[k]);
  acc[kWidth] = add(acc[kWidth], dz.v[i]);
}

// Adds to state->sums; state->x is the group before x, and then the last one of x. mask (may be
// null) has all bits of a lane set where x exists. (Apart from dx: together they overflow the
// registers.)
template <class T, int kWidth>
__attribute__((noinline)) void sum_dweight(const T* x, const float* dz, const float* mask,
                                           int64_t groups, FirstState* state) {
  Vec before = Vec::load(state->x);
  // Both vectors of a group would wait for each other's sums, but 16 registers hold no more.
  Native acc[kWidth + 1], more[kWidth + 1];
  for (int k = 0; k <= kWidth; ++k) acc[k] = Native::load(state->sums + k * Native::kLanes);
  for (int k = 0; k <= kWidth; ++k) more[k] = Native::set(0.0f);
  const auto add_group = [&](int64_t g, auto masked) {
    const Vec current = load_group(x + g * kGroup);
    Vec window[kWidth];
    slide_back<T, kWidth>(before, current, window);
    before = current;
    if (masked) {
      for (int k = 0; k < kWidth; ++k) window[k] = both_bits(window[k], Vec::load(mask));
    }
    const Vec here = Vec::load(dz + g * kGroup);
    accumulate<kWidth, 0>(here, window, acc);
    accumulate<kWidth, 1>(here, window, kHas32Registers ? more : acc);
  };
  if (mask == nullptr) {
    for (int64_t g = 0; g < groups; ++g) add_group(g, Flag<false>());
  } else {
    for (int64_t g = 0; g < groups; ++g) add_group(g, Flag<true>());
  }
  before.store(state->x);
  for (int k = 0; k <= kWidth; ++k) {
    if (kHas32Registers) acc[k] = add(acc[k], more[k]);
    acc[k].store(state->sums + k * Native::kLanes);
  }
}

// dx of the groups one before those of dz; state->dz is the group before dz, and then its last one.
template <class T, int kWidth>
__attribute__((noinline)) void store_dx(const float* dz, T* dx, float* edge, int64_t groups,
                                        const float* w, FirstState* state, bool stream) {
  Vec reversed[kWidth];
  for (int k = 0; k < kWidth; ++k) reversed[kWidth - 1 - k] = Vec::set(w[k]);
  Vec before = Vec::load(state->dz);
  const auto next = [&](int64_t g) {
    const Vec current = Vec::load(dz + g * kGroup);
    Vec window[kWidth];
    slide_forth<T, kWidth>(before, current, window);
    before = current;
    return weighted<kWidth>(Vec::set(0.0f), reversed, window);
  };
  int64_t g = 0;
  if (edge != nullptr) next(g++).store(edge);
  if (stream) {
    for (; g < groups; ++g) store_group(next(g), true, dx + g * kGroup);
  } else {
    for (; g < groups; ++g) store_group(next(g), false, dx + g * kGroup);
  }
  before.store(state->dz);
}

// dz of at most kFirstRun groups, then what follows from it. dx is of the groups one earlier; edge,
// if not null, takes that of the first one as floats in the order of groups. mask: see sum_dweight.
template <class T, int kWidth>
void backward_first_groups(const T* x, const T* dout, T* dx, float* edge, const float* mask,
                           int64_t groups, const float* w, float bias, FirstState* state,
                           bool with_silu, bool stream) {
  Run run;
  const Ahead<T> x_ahead(x, kFirstAhead<T>, 0), dout_ahead(dout, kFirstAhead<T>, 0);
  if (with_silu) {
    sum_groups<T, kWidth>(x, groups, w, bias, Vec::load(state->x), run.sums);
    to_gradients(&run, 1, groups, dout, 0, x_ahead, dout_ahead);
  } else {
    for (int64_t g = 0; g < groups; ++g) {
      x_ahead.fetch(0, g);
      dout_ahead.fetch(0, g);
      load_group(dout + g * kGroup).store(run.sums + g * kGroup);
    }
  }
  if (mask != nullptr) {
    for (int64_t g = 0; g < groups; ++g) {
      both_bits(Vec::load(run.sums + g * kGroup), Vec::load(mask)).store(run.sums + g * kGroup);
    }
  }
  sum_dweight<T, kWidth>(x, run.sums, mask, groups, state);
  store_dx<T, kWidth>(run.sums, dx, edge, groups, w, state, stream);
}

// dx of the last group, behind which there is nothing.
template <class T, int kWidth>
void backward_first_end(const float* w, const FirstState& state, bool stream, T* dx) {
  Vec reversed[kWidth], window[kWidth];
  for (int k = 0; k < kWidth; ++k) reversed[kWidth - 1 - k] = Vec::set(w[k]);
  slide_forth<T, kWidth>(Vec::load(state.dz), Vec::set(0.0f), window);
  store_group(weighted<kWidth>(Vec::set(0.0f), reversed, window), stream, dx);
}

// One channel, times t0 to t1 of the sequence; totals[k]: dweight, and last dbias.
template <class T, int kWidth>
void backward_first_row(const BackwardParams& p, int64_t b, int64_t d, int64_t t0, int64_t t1,
                        const float* w, float bias, float* halo, bool stream, double* totals) {
  constexpr int64_t kSize = sizeof(T), kHalo = kWidth - 1, kLanes = Native::kLanes;
  const int64_t seqlen = p.x.sizes[2], n = t1 - t0;
  const int64_t present = smaller(seqlen, t1 + kHalo) - t0;  // times that have x and dout
  const int64_t groups = (n + kGroup - 1) / kGroup + 1;
  // dx before t0 and dx with dfinal_states in it are edges.
  const int64_t last_plain = is_given(p.dfinal_states) ? smaller(n, seqlen - kHalo - t0) : n;
  const char* const x = address(p.x, b, d, t0);
  const char* const dout = address(p.dout, b, d, t0);
  char* const dx = address(p.dx, b, d, t0);
  const int64_t x_stride = p.x.strides[2], dout_stride = p.dout.strides[2];
  const int64_t dx_stride = p.dx.strides[2];
  const bool direct = x_stride == 1 && dout_stride == 1 && dx_stride == 1;
  stream = stream && past_line(dx) == 0;

  alignas(64) T stage_x[kStage];
  alignas(64) T stage_dout[kStage];
  alignas(64) T stage_dx[kStage];
  alignas(64) float edge[2 * kGroup] = {}, mask[kGroup];  // whole vectors are read of edge
  FirstState state;
  history_of<T, kWidth>(halo, state.x);
  __builtin_memset(state.dz, 0, sizeof(state.dz));
  __builtin_memset(state.sums, 0, sizeof(state.sums));
  const auto flush = [&] {
    for (int k = 0; k <= kWidth; ++k) {
      totals[k] += sum_of_lanes(Native::load(state.sums + k * kLanes));
    }
    __builtin_memset(state.sums, 0, sizeof(state.sums));
  };
  for (int64_t g = 0, count; g < groups; g += count) {
    const int64_t begin = g * kGroup;
    if (begin >= n) flush();  // what is summed after that is not ours
    const bool to_edge = g == 0 || begin > last_plain;
    const int64_t here = larger(0, smaller(kGroup, present - begin));
    const bool partial = here < kGroup;
    // Up to the next edge, partial group, or end of a run.
    count = smaller(last_plain / kGroup + 1, present / kGroup) - g;
    count = smaller(count, kFirstRun - g % kFirstRun);
    if (begin < n) count = smaller(count, (n - begin + kGroup - 1) / kGroup);
    if (begin > last_plain || partial) count = 1;
    float* const to = to_edge ? edge : nullptr;
    if (direct && here == 0 && !to_edge) {
      backward_first_end<T, kWidth>(w, state, stream, reinterpret_cast<T*>(dx) + begin - kGroup);
    } else if (direct && !partial) {
      backward_first_groups<T, kWidth>(reinterpret_cast<const T*>(x + begin * kSize),
                                       reinterpret_cast<const T*>(dout + begin * kSize),
                                       reinterpret_cast<T*>(dx) + begin - kGroup, to, nullptr,
                                       count, w, bias, &state, p.silu != 0, stream);
    } else {
      count = smaller(count, kStage / kGroup);
      if (partial) {
        __builtin_memset(stage_x, 0, kGroup * sizeof(T));
        __builtin_memset(stage_dout, 0, kGroup * sizeof(T));
        for (int i = 0; i < kGroup; ++i) {
          const uint32_t bits = i < here ? 0xffffffffu : 0u;
          __builtin_memcpy(&mask[lane_of<T>(i)], &bits, sizeof(bits));
        }
      }
      const int64_t taken = partial ? here : count * kGroup;
      gather(x + begin * x_stride * kSize, x_stride, taken, stage_x);
      gather(dout + begin * dout_stride * kSize, dout_stride, taken, stage_dout);
      // Of nothing dz is 0 without the derivative.
      backward_first_groups<T, kWidth>(stage_x, stage_dout, stage_dx, to, partial ? mask : nullptr,
                                       count, w, bias, &state, p.silu != 0 && here > 0, false);
      const int64_t skipped = to_edge ? 1 : 0;
      scatter(stage_dx + skipped * kGroup, (count - skipped) * kGroup,
              dx + (begin + (skipped - 1) * kGroup) * dx_stride * kSize, dx_stride);
    }
    if (to_edge) {
      // Times first to first + kGroup - 1, of which those before t0 belong to another chunk or, for
      // t0 = 0, to the initial state.
      const int64_t first = t0 + begin - kGroup;
      const bool before = first < t0;
      if (!before || is_given(p.dinitial_states)) from_groups<T>(edge, kGroup);
      for (int64_t j = 0; is_given(p.dfinal_states) && j < kHalo; ++j) {
        const int64_t i = seqlen - kHalo + j - first;
        if (i < 0 || i >= kGroup) continue;
        float value[Vec::kLanes];
        load_row(p.dfinal_states.dtype, address(p.dfinal_states, b, d, j), 1, 1, value);
        edge[i] += value[0];
      }
      if (!before) {
        store_row(p.dx.dtype, edge, false, address(p.dx, b, d, first), dx_stride,
                  smaller(kGroup, t1 - first));
      } else if (t0 == 0 && is_given(p.dinitial_states)) {
        store_row(p.dinitial_states.dtype, edge + kGroup - kHalo, false,
                  address(p.dinitial_states, b, d), p.dinitial_states.strides[2], kHalo);
      }
    }
    if (begin < n && (g + count) % kFlush < count) flush();
  }
}

// ---- channel_last ---------------------------------------------------------------------------

// Rows that are walked at a time, and the groups of them that are worked on together.
constexpr int64_t kLastRows = 8, kStrip = kRun / kLastRows;

// Scratch of a tile of channels, in the order of groups, rows of `pitch` floats.
struct LastScratch {
  float *w, *bias, *x, *dz = nullptr, *sums = nullptr, *unused = nullptr, *edge = nullptr;
  double* totals = nullptr;

  LastScratch(Arena* arena, int64_t width, int64_t pitch, bool backward) {
    w = arena->take<float>(width * pitch);
    bias = arena->take<float>(pitch);
    x = arena->take<float>((width - 1) * pitch);
    if (!backward) return;
    dz = arena->take<float>((width - 1) * pitch);
    sums = arena->take<float>((width + 1) * pitch);
    unused = arena->take<float>((width + 1) * pitch);  // sums of rows that do not count
    edge = arena->take<float>(pitch);
    totals = arena->take<double>((width + 1) * pitch);
  }
};

// What will be read 8 groups later, with `left` of `all` columns left: further along the rows, or
// at the start of the next ones.
template <class T>
CAUSAL_CONV1D_INLINE Ahead<T> ahead_of(const T* x, int64_t stride, int64_t rows, int64_t left,
                                       int64_t all) {
  constexpr int64_t kDistance = 8 * kGroup;
  return Ahead<T>(x, kDistance < left ? kDistance : rows * stride + kDistance - all, stride);
}

// Strides of rows, in elements.
struct RowStrides {
  int64_t x, dout, out;
};

// Sums of rows x groups; s.x holds the rows before, and with kKeep then the last ones of x.
template <class T, int kWidth, bool kKeep>
void sum_rows(const T* x, int64_t stride, int64_t rows, int64_t groups, const LastScratch& s,
              int64_t pitch, int64_t offset, float* sums) {
  for (int64_t g = 0; g < groups; ++g, offset += kGroup) {
    const int64_t c = g * kGroup;
    Vec taps[kWidth], window[kWidth];
    for (int k = 0; k < kWidth; ++k) taps[k] = Vec::load(s.w + k * pitch + offset);
    for (int k = 0; k + 1 < kWidth; ++k) window[k + 1] = Vec::load(s.x + k * pitch + offset);
    const Vec start = Vec::load(s.bias + offset);
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r) {
      for (int k = 0; k + 1 < kWidth; ++k) window[k] = window[k + 1];
      window[kWidth - 1] = load_group(x + r * stride + c);
      weighted<kWidth>(start, taps, window).store(sums + r * groups * kGroup + c);
    }
    if (!kKeep) continue;
    for (int k = 0; k + 1 < kWidth; ++k) window[k + 1].store(s.x + k * pitch + offset);
  }
}

// rows x groups; s points at the first group.
template <class T, int kWidth>
void forward_last_groups(const T* x, T* out, RowStrides strides, int64_t rows, int64_t groups,
                         const LastScratch& s, int64_t pitch, int64_t offset, bool with_silu,
                         bool stream) {
  Run run;
  for (int64_t g = 0, count; g < groups; g += count) {
    count = smaller(kStrip, groups - g);
    const int64_t c = g * kGroup;
    sum_rows<T, kWidth, true>(x + c, strides.x, rows, count, s, pitch, offset + c, run.sums);
    store_sums(&run, rows, count, out + c, strides.out,
               ahead_of(x + c, strides.x, rows, (groups - g) * kGroup, groups * kGroup), with_silu,
               stream);
  }
}

// Rows that differ in nothing but time.
struct RowKind {
  bool present;  // have x and dout; dz is 0 otherwise
  bool owned;    // count for dweight and dbias
  bool to_edge;  // dx goes to edge as floats
};

// Of one group and some rows, adds dz * x to sums; s.x holds the rows before, and then the last
// ones.
template <class T, int kWidth>
CAUSAL_CONV1D_INLINE void sum_dweight_rows(const T* x, int64_t stride, const float* dz,
                                           int64_t dz_stride, int64_t rows, float* before,
                                           float* sums, int64_t pitch) {
  Vec window[kWidth], acc[kWidth + 1];
  for (int k = 0; k + 1 < kWidth; ++k) window[k + 1] = Vec::load(before + k * pitch);
  for (int k = 0; k <= kWidth; ++k) acc[k] = Vec::load(sums + k * pitch);
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    for (int k = 0; k + 1 < kWidth; ++k) window[k] = window[k + 1];
    window[kWidth - 1] = load_group(x + r * stride);
    const Vec here = Vec::load(dz + r * dz_stride);
    for (int k = 0; k < kWidth; ++k) acc[k] = fma(here, window[k], acc[k]);
    acc[kWidth] = add(acc[kWidth], here);
  }
  for (int k = 0; k + 1 < kWidth; ++k) window[k + 1].store(before + k * pitch);
  for (int k = 0; k <= kWidth; ++k) acc[k].store(sums + k * pitch);
}

// dx of them, to `edge` if that is not null; `before` holds the rows of dz before, and then the
// last.
template <class T, int kWidth>
CAUSAL_CONV1D_INLINE void store_dx_rows(const float* dz, int64_t dz_stride, int64_t rows,
                                        const float* w, float* before, int64_t pitch, bool stream,
                                        T* dx, int64_t stride, float* edge) {
  Vec reversed[kWidth], window[kWidth];
  for (int k = 0; k < kWidth; ++k) reversed[kWidth - 1 - k] = Vec::load(w + k * pitch);
  for (int k = 0; k + 1 < kWidth; ++k) window[k + 1] = Vec::load(before + k * pitch);
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    for (int k = 0; k + 1 < kWidth; ++k) window[k] = window[k + 1];
    window[kWidth - 1] = Vec::load(dz + r * dz_stride);
    const Vec result = weighted<kWidth>(Vec::set(0.0f), reversed, window);
    if (__builtin_expect(edge != nullptr, 0)) {
      result.store(edge);
    } else {
      store_group(result, stream, dx + r * stride);
    }
  }
  for (int k = 0; k + 1 < kWidth; ++k) window[k + 1].store(before + k * pitch);
}

template <class T, int kWidth>
void backward_last_groups(const T* x, const T* dout, T* dx, RowStrides strides, RowKind kind,
                          int64_t rows, int64_t groups, const LastScratch& s, int64_t pitch,
                          int64_t offset, bool with_silu, bool stream) {
  Run run;
  float* const sums = kind.owned ? s.sums : s.unused;
  for (int64_t first = 0, count; first < groups; first += count) {
    count = smaller(kStrip, groups - first);
    const int64_t start = first * kGroup, row = count * kGroup;
    const int64_t left = (groups - first) * kGroup, all = groups * kGroup;
    const auto x_ahead = ahead_of(x + start, strides.x, rows, left, all);
    const auto dout_ahead = ahead_of(dout + start, strides.dout, rows, left, all);
    if (with_silu && kind.present) {
      sum_rows<T, kWidth, false>(x + start, strides.x, rows, count, s, pitch, offset + start,
                                 run.sums);
      to_gradients(&run, rows, count, dout + start, strides.dout, x_ahead, dout_ahead);
    } else {
      for (int64_t i = 0; i < rows * count; ++i) {
        const int64_t r = i / count, g = i % count;
        Vec dz = Vec::set(0.0f);
        if (kind.present) {
          x_ahead.fetch(r, g);
          dout_ahead.fetch(r, g);
          dz = load_group(dout + start + r * strides.dout + g * kGroup);
        }
        dz.store(run.sums + i * kGroup);
      }
    }
    for (int64_t g = 0; g < count; ++g) {
      const int64_t c = start + g * kGroup, at = offset + c;
      const float* const dz = run.sums + g * kGroup;
      if (kind.present) {
        sum_dweight_rows<T, kWidth>(x + c, strides.x, dz, row, rows, s.x + at, sums + at, pitch);
      }
      store_dx_rows<T, kWidth>(dz, row, rows, s.w + at, s.dz + at, pitch, stream, dx + c,
                               strides.out, kind.to_edge ? s.edge + at : nullptr);
    }
  }
}

// ---- units ----------------------------------------------------------------------------------

template <class T, int kWidth>
void forward_direct(const ForwardParams& p, const Tiling& tiling, int64_t unit, char* scratch) {
  constexpr int64_t kSize = sizeof(T), kHalo = kWidth - 1;
  const Range range = range_of(tiling, unit);
  const bool with_silu = p.silu != 0;
  const int64_t pitch = tiling.channel_first ? kGroup : padded(tiling.cols);
  Arena arena(scratch);
  const LastScratch s(&arena, kWidth, pitch, false);
  for (int64_t d = range.d0; d < range.d1; d += tiling.cols) {
    Tile tile = tile_at(tiling, d, range.d1);
    if (!tile.channel_first) tile.pitch = pitch;
    load_weights(tile, p.weight, p.bias, s.w, s.bias);
    const int64_t used = tiling.channel_first ? kGroup : padded(tile.cols);
    plain_nans(s.bias, 1);
    if (tiling.channel_first) {
      plain_nans(s.w, kWidth);
    } else {
      to_groups<T>(s.bias, used);
      for (int k = 0; k < kWidth; ++k) to_groups<T>(s.w + k * pitch, used);
    }
    for (int64_t b = range.b0; b < range.b1; ++b) {
      load_halo(tile, p.x, p.initial_states, b, range.t0, s.x);
      if (tiling.channel_first) {
        forward_first_row<T, kWidth>(
            address(p.x, b, d, range.t0), p.x.strides[2], address(p.out, b, d, range.t0),
            p.out.strides[2], range.t1 - range.t0, s.w, s.bias[0], s.x, with_silu, tiling.stream);
      } else {
        for (int k = 0; k < kHalo; ++k) to_groups<T>(s.x + k * pitch, used);
        const bool direct = p.x.strides[1] == 1 && p.out.strides[1] == 1;
        const int64_t whole = direct ? tile.cols / kGroup : 0;
        const bool stream = tiling.stream && range.t0 < range.t1 && kGroup * kSize >= 64 &&
                            p.out.strides[2] * kSize % 64 == 0 &&
                            past_line(address(p.out, b, d, range.t0)) == 0;
        for (int64_t t = range.t0, rows; t < range.t1; t += rows) {
          rows = smaller(kLastRows, range.t1 - t);
          const char* const x = address(p.x, b, d, t);
          char* const out = address(p.out, b, d, t);
          forward_last_groups<T, kWidth>(reinterpret_cast<const T*>(x), reinterpret_cast<T*>(out),
                                         {p.x.strides[2], 0, p.out.strides[2]}, rows, whole, s,
                                         pitch, 0, with_silu, stream);
          for (int64_t c = whole * kGroup; c < tile.cols; c += kGroup) {
            alignas(64) T stage_x[kLastRows * kGroup] = {};
            alignas(64) T stage_out[kLastRows * kGroup];
            const int64_t count = smaller(kGroup, tile.cols - c);
            for (int64_t r = 0; r < rows; ++r) {
              gather(address(p.x, b, d + c, t + r), p.x.strides[1], count, stage_x + r * kGroup);
            }
            forward_last_groups<T, kWidth>(stage_x, stage_out, {kGroup, 0, kGroup}, rows, 1, s,
                                           pitch, c, with_silu, false);
            for (int64_t r = 0; r < rows; ++r) {
              scatter(stage_out + r * kGroup, count, address(p.out, b, d + c, t + r),
                      p.out.strides[1]);
            }
          }
        }
      }
      if (is_given(p.final_states_out) && range.t1 == tiling.seqlen) {
        load_halo(tile, p.x, p.initial_states, b, tiling.seqlen, s.x);
        store_block(tile, s.x, false, p.final_states_out, b, 0, kHalo);
      }
    }
  }
  finish_streams();
}

// Times t0 to t1 of a tile of channels of one batch entry; adds to s.totals.
template <class T, int kWidth>
void backward_last_tile(const BackwardParams& p, const Tile& tile, int64_t b, int64_t t0,
                        int64_t t1, const LastScratch& s, bool stream) {
  constexpr int64_t kSize = sizeof(T), kHalo = kWidth - 1;
  constexpr int64_t kRows = 256;  // summed in fp32
  const int64_t pitch = tile.pitch, seqlen = p.x.sizes[2], d = tile.d;
  const bool direct = p.x.strides[1] == 1 && p.dout.strides[1] == 1 && p.dx.strides[1] == 1;
  const int64_t whole = direct ? tile.cols / kGroup : 0;
  stream = stream && t0 < t1 && kGroup * kSize >= 64 && p.dx.strides[2] * kSize % 64 == 0 &&
           past_line(address(p.dx, b, d, t0)) == 0;
  const auto flush = [&] {
    for (int64_t i = 0; i < (kWidth + 1) * pitch; ++i) {
      s.totals[i] += static_cast<double>(s.sums[i]);
    }
    __builtin_memset(s.sums, 0, static_cast<size_t>((kWidth + 1) * pitch) * sizeof(float));
  };
  for (int64_t t = t0, rows; t < t1 + kHalo; t += rows) {
    // dx at t - kHalo comes out of row t.
    const bool to_edge = t < t0 + kHalo || t >= seqlen;
    const RowKind kind = {t < seqlen, t < t1, to_edge};
    int64_t end = smaller(t1 + kHalo, t + (to_edge ? 1 : kLastRows));
    if (kind.present) end = smaller(end, seqlen);
    if (kind.owned) end = smaller(end, t1);
    rows = end - t;
    const char* const x = kind.present ? address(p.x, b, d, t) : nullptr;
    const char* const dout = kind.present ? address(p.dout, b, d, t) : nullptr;
    char* const dx = to_edge ? nullptr : address(p.dx, b, d, t - kHalo);
    backward_last_groups<T, kWidth>(reinterpret_cast<const T*>(x), reinterpret_cast<const T*>(dout),
                                    reinterpret_cast<T*>(dx),
                                    {p.x.strides[2], p.dout.strides[2], p.dx.strides[2]}, kind,
                                    rows, whole, s, pitch, 0, p.silu != 0, stream);
    for (int64_t c = whole * kGroup; c < tile.cols; c += kGroup) {
      alignas(64) T stage_x[kLastRows * kGroup] = {};
      alignas(64) T stage_dout[kLastRows * kGroup] = {};
      alignas(64) T stage_dx[kLastRows * kGroup];
      const int64_t count = smaller(kGroup, tile.cols - c);
      for (int64_t r = 0; kind.present && r < rows; ++r) {
        gather(address(p.x, b, d + c, t + r), p.x.strides[1], count, stage_x + r * kGroup);
        gather(address(p.dout, b, d + c, t + r), p.dout.strides[1], count, stage_dout + r * kGroup);
      }
      backward_last_groups<T, kWidth>(stage_x, stage_dout, stage_dx, {kGroup, kGroup, kGroup}, kind,
                                      rows, 1, s, pitch, c, p.silu != 0, false);
      for (int64_t r = 0; !to_edge && r < rows; ++r) {
        scatter(stage_dx + r * kGroup, count, address(p.dx, b, d + c, t - kHalo + r),
                p.dx.strides[1]);
      }
    }
    if (to_edge) {
      const int64_t time = t - kHalo;
      from_groups<T>(s.edge, padded(tile.cols));
      if (is_given(p.dfinal_states) && time >= seqlen - kHalo) {
        float row[kGroup];
        for (int64_t c = 0; c < tile.cols; c += kGroup) {
          const int64_t count = smaller(kGroup, tile.cols - c);
          load_row(p.dfinal_states.dtype,
                   address(p.dfinal_states, b, d + c, time - (seqlen - kHalo)),
                   p.dfinal_states.strides[1], count, row);
          for (int64_t i = 0; i < count; ++i) s.edge[c + i] += row[i];
        }
      }
      if (time >= t0) {
        store_row(p.dx.dtype, s.edge, false, address(p.dx, b, d, time), p.dx.strides[1], tile.cols);
      } else if (time < 0 && is_given(p.dinitial_states)) {
        store_row(p.dinitial_states.dtype, s.edge, false,
                  address(p.dinitial_states, b, d, time + kHalo), p.dinitial_states.strides[1],
                  tile.cols);
      }
    }
    if ((t + rows - t0) % kRows < rows) flush();
  }
  flush();
}

template <class T, int kWidth>
void backward_direct(const BackwardParams& p, const Tiling& tiling, int64_t unit, char* scratch,
                     double* partials) {
  constexpr int64_t kHalo = kWidth - 1;
  const Range range = range_of(tiling, unit);
  const int64_t pitch = tiling.channel_first ? kGroup : padded(tiling.cols);
  Arena arena(scratch);
  const LastScratch s(&arena, kWidth, pitch, true);
  for (int64_t d = range.d0; d < range.d1; d += tiling.cols) {
    Tile tile = tile_at(tiling, d, range.d1);
    if (!tile.channel_first) tile.pitch = pitch;
    load_weights(tile, p.weight, p.bias, s.w, s.bias);
    const int64_t used = tiling.channel_first ? kGroup : padded(tile.cols);
    const size_t count = static_cast<size_t>((kWidth + 1) * pitch);
    __builtin_memset(s.totals, 0, count * sizeof(double));
    if (tiling.channel_first) {
      plain_nans(s.w, kWidth);
      plain_nans(s.bias, 1);
    } else {
      to_groups<T>(s.bias, used);
      for (int k = 0; k < kWidth; ++k) to_groups<T>(s.w + k * pitch, used);
      __builtin_memset(s.sums, 0, count * sizeof(float));
      __builtin_memset(s.unused, 0, count * sizeof(float));
    }
    for (int64_t b = range.b0; b < range.b1; ++b) {
      load_halo(tile, p.x, p.initial_states, b, range.t0, s.x);
      if (tiling.channel_first) {
        backward_first_row<T, kWidth>(p, b, d, range.t0, range.t1, s.w, s.bias[0], s.x,
                                      tiling.stream, s.totals);
      } else {
        for (int k = 0; k < kHalo; ++k) to_groups<T>(s.x + k * pitch, used);
        __builtin_memset(s.dz, 0, static_cast<size_t>(kHalo * pitch) * sizeof(float));
        backward_last_tile<T, kWidth>(p, tile, b, range.t0, range.t1, s, tiling.stream);
      }
    }
    if (partials == nullptr) continue;
    for (int64_t k = 0; k <= kWidth; ++k) {
      double* const out = partials + (range.slot * (kWidth + 1) + k) * tiling.dim + d;
      for (int64_t c = 0; c < tile.cols; ++c) {
        const int64_t lane = c / kGroup * kGroup + lane_of<T>(static_cast<int>(c % kGroup));
        out[c] = tiling.channel_first ? s.totals[k] : s.totals[k * pitch + lane];
      }
    }
  }
  finish_streams();
}

inline size_t direct_scratch_bytes(const Tiling& tiling, Operation operation) {
  const int64_t pitch = tiling.channel_first ? kGroup : padded(tiling.cols);
  Arena arena(nullptr);
  LastScratch(&arena, tiling.width, pitch, operation == Operation::kBackward);
  return arena.used();
}

template <class F>
CAUSAL_CONV1D_INLINE void with_type(int32_t dtype, F f) {
  if (dtype == CAUSAL_CONV1D_FLOAT32) {
    f(float());
  } else if (dtype == CAUSAL_CONV1D_FLOAT16) {
    f(Half());
  } else {
    f(Bfloat16());
  }
}

inline void forward_direct(const ForwardParams& p, const Tiling& tiling, int64_t unit,
                           char* scratch) {
  with_type(p.x.dtype, [&](auto element) {
    using T = decltype(element);
    (tiling.width == 2   ? forward_direct<T, 2>
     : tiling.width == 3 ? forward_direct<T, 3>
                         : forward_direct<T, 4>)(p, tiling, unit, scratch);
  });
}

inline void backward_direct(const BackwardParams& p, const Tiling& tiling, int64_t unit,
                            char* scratch, double* partials) {
  with_type(p.x.dtype, [&](auto element) {
    using T = decltype(element);
    (tiling.width == 2   ? backward_direct<T, 2>
     : tiling.width == 3 ? backward_direct<T, 3>
                         : backward_direct<T, 4>)(p, tiling, unit, scratch, partials);
  });
}
