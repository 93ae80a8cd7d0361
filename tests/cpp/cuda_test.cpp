// The CUDA half of the C API against reference.h and, where the arithmetic is the same to the bit,
// against the CPU half. Without a GPU every test is skipped.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <stdexcept>
#include <utility>

#include "reference.h"

namespace test {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Device copies of host arrays; the outputs among them come back with fetch().
class Device {
 public:
  Device() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Device() {
    for (const auto& [array, memory] : copies_) cudaFree(memory);
    for (void* memory : others_) cudaFree(memory);
    cudaStreamDestroy(stream_);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  cudaStream_t stream() const { return stream_; }
  void* allocate(int64_t bytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, static_cast<size_t>(std::max<int64_t>(bytes, 1))));
    others_.push_back(memory);
    return memory;
  }
  causal_conv1d_tensor operator()(Array& array) {
    if (!array.given()) return {};
    void* memory = nullptr;
    check(cudaMalloc(&memory, array.memory.size()));
    copies_.emplace_back(&array, memory);
    check(cudaMemcpyAsync(memory, array.memory.data(), array.memory.size(), cudaMemcpyDefault,
                          stream_));
    return array.at(memory);
  }
  void fetch() {
    for (const auto& [array, memory] : copies_) {
      check(cudaMemcpyAsync(array->memory.data(), memory, array->memory.size(), cudaMemcpyDefault,
                            stream_));
    }
    check(cudaStreamSynchronize(stream_));
  }

 private:
  cudaStream_t stream_ = nullptr;
  std::vector<std::pair<Array*, void*>> copies_;
  std::vector<void*> others_;
};

class Cuda : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
      GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
    }
  }
};

causal_conv1d_status run_forward(Problem& p, Forward& f) {
  Device device;
  causal_conv1d_forward_params params{device(p.x),
                                      device(p.weight),
                                      device(p.bias),
                                      device(p.seq_idx),
                                      device(p.initial_states),
                                      device(f.out),
                                      device(f.final_states),
                                      p.silu};
  const causal_conv1d_status status = causal_conv1d_cuda_forward(&params, 0, device.stream());
  device.fetch();
  return status;
}

causal_conv1d_status run_backward(Problem& p, Backward& b) {
  Device device;
  causal_conv1d_backward_params params{device(p.x),
                                       device(p.weight),
                                       device(p.bias),
                                       device(p.dout),
                                       device(p.seq_idx),
                                       device(p.initial_states),
                                       device(p.dfinal_states),
                                       device(b.dx),
                                       device(b.dweight),
                                       device(b.dbias),
                                       device(b.dinitial_states),
                                       p.silu};
  const int64_t size = causal_conv1d_cuda_backward_workspace_size(&params);
  EXPECT_GE(size, 0);
  const causal_conv1d_status status =
      causal_conv1d_cuda_backward(&params, 0, device.stream(), device.allocate(size), size);
  device.fetch();
  return status;
}

causal_conv1d_status run_update(Problem& p, Update& u) {
  Device device;
  causal_conv1d_update_params params{device(u.x),       device(u.state), device(p.weight),
                                     device(p.bias),    device(u.out),   device(u.cache_seqlens),
                                     device(u.indices), p.silu};
  const causal_conv1d_status status = causal_conv1d_cuda_update(&params, 0, device.stream());
  device.fetch();
  return status;
}

TEST_F(Cuda, ForwardMatchesReference) {
  for (const Options& o : cases()) {
    SCOPED_TRACE(describe(o));
    Problem p = make_problem(o);
    Forward f(p, o.layout);
    ASSERT_OK(run_forward(p, f));
    const ForwardValues want = reference_forward(p);
    EXPECT_CLOSE(f.out, want.out, o.dtype);
    EXPECT_EQ(f.final_states.values(), want.final_states.data);
    expect_untouched_around(f.out);
    expect_untouched_around(f.final_states);
  }
}

TEST_F(Cuda, BackwardMatchesReference) {
  for (const Options& o : cases()) {
    SCOPED_TRACE(describe(o));
    Problem p = make_problem(o);
    Backward b(p, o.layout), again(p, o.layout);
    ASSERT_OK(run_backward(p, b));
    ASSERT_OK(run_backward(p, again));
    EXPECT_EQ(b.dweight.memory, again.dweight.memory);
    EXPECT_EQ(b.dbias.memory, again.dbias.memory);
    const BackwardValues want = reference_backward(p);
    EXPECT_CLOSE(b.dx, want.dx, o.dtype);
    EXPECT_SUMS_CLOSE(b.dweight, want.dweight, o.dtype);
    if (o.bias) {
      EXPECT_SUMS_CLOSE(b.dbias, want.dbias, o.dtype);
    }
    if (o.states) {
      EXPECT_CLOSE(b.dinitial_states, want.dinitial_states, o.dtype);
    }
    expect_untouched_around(b.dx);
  }
}

// Without SiLU both halves do the same operations in the same order.
TEST_F(Cuda, EqualsTheCpuWithoutSilu) {
  for (Options o : cases()) {
    SCOPED_TRACE(describe(o));
    o.silu = false;
    Problem p = make_problem(o);
    Forward gpu(p, o.layout), cpu(p, o.layout);
    ASSERT_OK(run_forward(p, gpu));
    ASSERT_OK(causal_conv1d_cpu_forward(&cpu.params, 0));
    EXPECT_EQ(gpu.out.memory, cpu.out.memory);
    EXPECT_EQ(gpu.final_states.memory, cpu.final_states.memory);
  }
}

TEST_F(Cuda, UpdateMatchesTheCpu) {
  for (bool silu : {false, true}) {
    for (bool ring : {false, true}) {
      for (bool indexed : {false, true}) {
        for (int64_t tokens : {1, 2, 9}) {
          SCOPED_TRACE(testing::Message() << silu << ring << indexed << tokens);
          Options o;
          o.silu = silu;
          Problem p = make_problem(o);
          const int64_t rows = indexed ? 5 : o.batch;
          Update gpu(p, tokens, rows, 4, ring, indexed), cpu(p, tokens, rows, 4, ring, indexed);
          std::mt19937 random(3);
          gpu.x.fill_normal(random);
          cpu.x.memory.assign(gpu.x.memory.begin(), gpu.x.memory.end());
          cpu.params.x = cpu.x.tensor();
          if (indexed) {
            gpu.indices.set(-1, 1);
            cpu.indices.set(-1, 1);
          }
          ASSERT_OK(run_update(p, gpu));
          ASSERT_OK(causal_conv1d_cpu_update(&cpu.params, 0));
          EXPECT_EQ(gpu.state.memory, cpu.state.memory);
          EXPECT_LE(relative_error(gpu.out.values(), cpu.out.values()), silu ? 2e-6 : 0);
        }
      }
    }
  }
}

// All entries read a row as it was, and the last of them leaves it behind.
TEST_F(Cuda, UpdateSharesRows) {
  for (int32_t index : {CAUSAL_CONV1D_INT32, CAUSAL_CONV1D_INT64}) {
    for (bool ring : {false, true}) {
      for (int64_t tokens : {1, 3}) {
        SCOPED_TRACE(testing::Message() << index << ring << tokens);
        Options o;
        o.batch = 6;
        o.silu = false;
        Problem p = make_problem(o);
        // The same with a row for each entry: shared rows begin alike.
        Update shared(p, tokens, 3, 4, ring, true), apart(p, tokens, 6, 4, ring, true);
        shared.indices = Array(index, {o.batch});
        const std::array<int, 6> rows{2, 0, 2, -1, 0, 2};
        for (int64_t b = 0; b < o.batch; ++b) {
          const int row = rows[static_cast<size_t>(b)];
          shared.indices.set(row, b);
          apart.indices.set(row < 0 ? row : static_cast<double>(b), b);
          for (int64_t d = 0; row >= 0 && d < o.dim; ++d) {
            for (int64_t j = 0; j < 4; ++j) {
              apart.state.set(shared.state.get(row, d, j), b, d, j);
            }
          }
          for (int64_t d = 0; d < o.dim; ++d) {
            for (int64_t t = 0; t < tokens; ++t) {
              shared.x.set(static_cast<double>(b + 2 * d - t) / 4, b, d, t);
              apart.x.set(static_cast<double>(b + 2 * d - t) / 4, b, d, t);
            }
          }
        }
        const std::vector<double> before = shared.state.values();
        ASSERT_OK(run_update(p, shared));
        ASSERT_OK(run_update(p, apart));
        EXPECT_EQ(shared.out.values(), apart.out.values());
        for (int64_t d = 0; d < o.dim; ++d) {
          for (int64_t j = 0; j < 4; ++j) {
            EXPECT_EQ(shared.state.get(0, d, j), apart.state.get(4, d, j));
            EXPECT_EQ(shared.state.get(1, d, j), before[static_cast<size_t>((o.dim + d) * 4 + j)]);
            EXPECT_EQ(shared.state.get(2, d, j), apart.state.get(5, d, j));
          }
        }
      }
    }
  }
}

TEST_F(Cuda, VarlenStatesEqualsTheCpu) {
  std::mt19937 random(5);
  Array x(CAUSAL_CONV1D_BFLOAT16, {11, 9}), cu_seqlens(CAUSAL_CONV1D_INT32, {5});
  Array gpu(CAUSAL_CONV1D_BFLOAT16, {4, 9, 4}, Layout::kStrided);
  Array cpu(CAUSAL_CONV1D_BFLOAT16, {4, 9, 4}, Layout::kStrided);
  x.fill_normal(random);
  for (int64_t i = 0; i < 5; ++i) cu_seqlens.set(std::array<double, 5>{0, 3, 3, 10, 11}[i], i);
  {
    Device device;
    causal_conv1d_varlen_states_params params{device(x), device(cu_seqlens), device(gpu)};
    ASSERT_OK(causal_conv1d_cuda_varlen_states(&params, 0, device.stream()));
    device.fetch();
  }
  causal_conv1d_varlen_states_params params{x.tensor(), cu_seqlens.tensor(), cpu.tensor()};
  ASSERT_OK(causal_conv1d_cpu_varlen_states(&params, 0));
  EXPECT_EQ(gpu.memory, cpu.memory);
}

// A call with every option, of two rows or of packed sequences, one of them empty.
struct OptionsCall {
  Array x, weight, bias, dout, cu_seqlens, pre_gate, post_gate, residual, states, dfinal;
  Array out, final_states, dx, dweight, dbias, dstates, dpre_gate, dpost_gate;
  int64_t dilation;

  OptionsCall(int32_t dtype, Layout layout, bool packed, int64_t dilation_) : dilation(dilation_) {
    const Sizes sizes{packed ? 1 : 2, 16, 203};
    const Sizes columns{packed ? 4 : 2, 16, 3 * dilation};
    for (Array* a :
         {&x, &dout, &pre_gate, &post_gate, &residual, &out, &dx, &dpre_gate, &dpost_gate}) {
      *a = Array(dtype, sizes, layout);
    }
    for (Array* a : {&states, &dfinal, &final_states, &dstates}) *a = Array(dtype, columns, layout);
    for (Array* a : {&weight, &dweight}) *a = Array(dtype, {16, 4});
    for (Array* a : {&bias, &dbias}) *a = Array(dtype, {16});
    std::mt19937 random(7);
    for (Array* a :
         {&x, &dout, &pre_gate, &post_gate, &residual, &states, &dfinal, &weight, &bias}) {
      a->fill_normal(random);
    }
    if (!packed) return;
    cu_seqlens = Array(CAUSAL_CONV1D_INT32, {5});
    for (int64_t i = 0; i < 5; ++i) cu_seqlens.set(std::array<double, 5>{1, 6, 6, 140, 200}[i], i);
  }

  // at(array): the tensor to be given for it.
  template <class At, class ForwardWith, class BackwardWith>
  void call(At at, ForwardWith forward_with, BackwardWith backward_with) {
    causal_conv1d_options o{sizeof o,     dilation,      at(cu_seqlens),
                            at(pre_gate), at(post_gate), at(residual)};
    causal_conv1d_option_gradients g{sizeof g, at(dpre_gate), at(dpost_gate), 1};
    causal_conv1d_forward_params f{at(x),      at(weight), at(bias),         {},
                                   at(states), at(out),    at(final_states), 0};
    causal_conv1d_backward_params b{at(x),       at(weight),       at(bias),    at(dout),
                                    {},          f.initial_states, at(dfinal),  at(dx),
                                    at(dweight), at(dbias),        at(dstates), 0};
    forward_with(f, o);
    backward_with(b, o, g);
  }
};

TEST_F(Cuda, OptionsEqualTheCpuWithoutSilu) {
  for (int32_t dtype : {CAUSAL_CONV1D_BFLOAT16, CAUSAL_CONV1D_FLOAT32, CAUSAL_CONV1D_FLOAT64}) {
    for (Layout layout : {Layout::kChannelFirst, Layout::kChannelLast, Layout::kStrided}) {
      for (int options = 0; options < 4; ++options) {
        const bool packed = options % 2 != 0;
        SCOPED_TRACE(testing::Message() << dtype << ' ' << int(layout) << ' ' << options);
        OptionsCall gpu(dtype, layout, packed, 1 + options / 2 * 2);
        OptionsCall cpu(dtype, layout, packed, 1 + options / 2 * 2);
        cpu.call([](Array& a) { return a.given() ? a.tensor() : causal_conv1d_tensor{}; },
                 [](const auto& f, const auto& o) {
                   ASSERT_OK(causal_conv1d_cpu_forward_with(&f, &o, 0));
                 },
                 [](const auto& b, const auto& o, const auto& g) {
                   ASSERT_OK(causal_conv1d_cpu_backward_with(&b, &o, &g, 0));
                 });
        {
          Device device;
          gpu.call([&](Array& a) { return device(a); },
                   [&](const auto& f, const auto& o) {
                     const int64_t n = causal_conv1d_cuda_forward_with_workspace_size(&f, &o);
                     ASSERT_OK(causal_conv1d_cuda_forward_with(&f, &o, 0, device.stream(),
                                                               device.allocate(n), n));
                   },
                   [&](const auto& b, const auto& o, const auto& g) {
                     const int64_t n = causal_conv1d_cuda_backward_with_workspace_size(&b, &o, &g);
                     ASSERT_OK(causal_conv1d_cuda_backward_with(&b, &o, &g, 0, device.stream(),
                                                                device.allocate(n), n));
                   });
          device.fetch();
        }
        EXPECT_EQ(gpu.out.memory, cpu.out.memory);
        EXPECT_EQ(gpu.final_states.memory, cpu.final_states.memory);
        EXPECT_EQ(gpu.dx.memory, cpu.dx.memory);
        EXPECT_EQ(gpu.dstates.memory, cpu.dstates.memory);
        EXPECT_EQ(gpu.dpre_gate.memory, cpu.dpre_gate.memory);
        EXPECT_EQ(gpu.dpost_gate.memory, cpu.dpost_gate.memory);
        const double rounding = dtype == CAUSAL_CONV1D_BFLOAT16 ? 8e-3 : 1e-5;
        EXPECT_LE(relative_error(gpu.dweight.values(), cpu.dweight.values()), rounding);
        EXPECT_LE(relative_error(gpu.dbias.values(), cpu.dbias.values()), rounding);
      }
    }
  }
}

TEST_F(Cuda, ZeroSizesAreNoErrors) {
  for (int i = 0; i < 3; ++i) {
    SCOPED_TRACE(i);
    Options o;
    o.states = true;
    (i == 0 ? o.batch : i == 1 ? o.dim : o.seqlen) = 0;
    Problem p = make_problem(o);
    Forward f(p);
    Backward b(p);
    ASSERT_OK(run_forward(p, f));
    ASSERT_OK(run_backward(p, b));
    EXPECT_EQ(f.final_states.values(), reference_forward(p).final_states.data);
    EXPECT_EQ(b.dweight.values(), reference_backward(p).dweight.data);
    EXPECT_EQ(b.dbias.values(), reference_backward(p).dbias.data);
  }
}

TEST_F(Cuda, ErrorsNameTheArgument) {
  Problem p = make_problem({});
  Forward f(p);
  f.params.weight.sizes[0] += 1;
  causal_conv1d_status status = causal_conv1d_cuda_forward(&f.params, 0, nullptr);
  EXPECT_EQ(status.code, CAUSAL_CONV1D_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(status.message).rfind("causal_conv1d_fn: weight ", 0), 0U)
      << status.message;
  Backward b(p);
  b.params.dx.ndim = 0;
  EXPECT_EQ(causal_conv1d_cuda_backward_workspace_size(&b.params), -1);
}

// Needs no GPU: the library tells what it contains.
TEST(CudaLibrary, EmbedsSm87AndPtx) {
  const std::string names = causal_conv1d_cuda_architectures();
  if (names == "compute_75") GTEST_SKIP() << "a build for the test of that PTX";
  EXPECT_NE(names.find("sm_87"), std::string::npos) << names;
  EXPECT_NE(names.find("compute_80"), std::string::npos) << names;
}

}  // namespace
}  // namespace test
