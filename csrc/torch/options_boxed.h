// The operators with options as torch calls them, over a backend as in boxed.h.
#pragma once

#include <initializer_list>
#include <stdexcept>

#include "boxed.h"

namespace causal_conv1d::torch_abi {

// Their kernels are those of forward and backward, whose self-tests count for them.
template <class Backend>
struct OptionsBoxed {
  static void conv_forward(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kConvForward, Operation::kForward, stack)) return;
    const ManyArguments a(schema::kConvForward, stack);
    const bool need_states = a.value(10) != 0;
    const Options options =
        options_of(a.tensor(4), a.tensor(6), a.tensor(7), a.tensor(8), a.value(9));
    Output out = a.empty_like(0);
    Output states = need_states ? empty_states(a, options) : nothing(a);
    const ForwardParams p = {a.tensor(0),
                             a.tensor(1),
                             a.tensor(2),
                             a.tensor(3),
                             a.tensor(5),
                             out.tensor(),
                             need_states ? states.tensor() : Tensor{},
                             a.value(11) != 0};
    Backend::run(p, options, a.device_index());
    stack[0] = out.release();
    stack[1] = states.release();
  }

  static void conv_forward_out(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kConvForwardOut, Operation::kForward, stack)) return;
    const ManyArguments a(schema::kConvForwardOut, stack);
    const Options options =
        options_of(a.tensor(4), a.tensor(6), a.tensor(7), a.tensor(8), a.value(11));
    const ForwardParams p = {a.tensor(0), a.tensor(1), a.tensor(2),  a.tensor(3),
                             a.tensor(5), a.tensor(9), a.tensor(10), a.value(12) != 0};
    Options own;
    throw_if_failed(check(&p, &options, &own));
    tell_torch(a, {9, 10});
    Backend::run(p, options, a.device_index());
  }

  static void conv_backward(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kConvBackward, Operation::kBackward, stack)) return;
    const ManyArguments a(schema::kConvBackward, stack);
    const Options options = options_of(a.tensor(5), a.tensor(8), a.tensor(9), {}, a.value(10));
    const auto need = [&a](int result) { return (a.value(12) >> result & 1) != 0; };
    // A result, and the argument that it is the gradient of.
    const auto make = [&](int result, int argument) {
      return need(result) && given(a.tensor(argument)) ? a.empty_like(argument) : nothing(a);
    };
    Output dx = a.empty_like(0), dweight = make(1, 1), dbias = make(2, 2);
    Output dinitial = need(3) && !given(a.tensor(6)) ? empty_states(a, options) : make(3, 6);
    Output dpre_gate = make(4, 8), dpost_gate = make(5, 9);
    const auto written = [&](int result, const Output& output, int argument) {
      return need(result) && given(a.tensor(argument)) ? output.tensor() : Tensor{};
    };
    const BackwardParams p = {a.tensor(0),
                              a.tensor(1),
                              a.tensor(2),
                              a.tensor(3),
                              a.tensor(4),
                              a.tensor(6),
                              a.tensor(7),
                              dx.tensor(),
                              written(1, dweight, 1),
                              written(2, dbias, 2),
                              need(3) ? dinitial.tensor() : Tensor{},
                              a.value(13) != 0};
    const OptionGradients gradients = {sizeof(OptionGradients), written(4, dpre_gate, 8),
                                       written(5, dpost_gate, 9), a.value(11) != 0};
    Backend::run(p, options, gradients, a.device_index());
    Output* const results[] = {&dx, &dweight, &dbias, &dinitial, &dpre_gate, &dpost_gate};
    for (Output* result : results) *stack++ = result->release();
  }

  static void conv_backward_out(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kConvBackwardOut, Operation::kBackward, stack)) return;
    const ManyArguments a(schema::kConvBackwardOut, stack);
    const Options options = options_of(a.tensor(5), a.tensor(8), a.tensor(9), {}, a.value(16));
    const BackwardParams p = {a.tensor(0),  a.tensor(1),  a.tensor(2),  a.tensor(3),
                              a.tensor(4),  a.tensor(6),  a.tensor(7),  a.tensor(10),
                              a.tensor(11), a.tensor(12), a.tensor(13), a.value(18) != 0};
    const OptionGradients gradients = {sizeof(OptionGradients), a.tensor(14), a.tensor(15),
                                       a.value(17) != 0};
    Options own;
    OptionGradients own_gradients;
    throw_if_failed(check(&p, &options, &gradients, &own, &own_gradients));
    tell_torch(a, {10, 11, 12, 13, 14, 15});
    Backend::run(p, options, gradients, a.device_index());
  }

  static void register_all(const char* name_space, const char* dispatch_key) {
    const Kernel kernels[] = {
        {&schema::kConvForward, conv_forward},
        {&schema::kConvForwardOut, conv_forward_out},
        {&schema::kConvBackward, conv_backward},
        {&schema::kConvBackwardOut, conv_backward_out},
    };
    register_kernels(name_space, dispatch_key, kernels, sizeof kernels / sizeof kernels[0]);
  }

 private:
  static Options options_of(const Tensor& cu_seqlens, const Tensor& pre_gate,
                            const Tensor& post_gate, const Tensor& residual, int64_t dilation) {
    // Of which the C interface makes 1.
    if (dilation == 0)
      throw std::runtime_error("causal_conv1d_fn: dilation must be 1..65536, got 0");
    return {sizeof(Options), dilation, cu_seqlens, pre_gate, post_gate, residual};
  }

  static Output nothing(const ManyArguments& a) {
    const int64_t sizes[1] = {0};
    const int order[1] = {0};
    return a.empty(0, 1, sizes, order);
  }

  // None if the shapes are wrong, which the check will tell.
  static Output empty_states(const ManyArguments& a, const Options& options) {
    const Tensor &x = a.tensor(0), &weight = a.tensor(1), &cu_seqlens = options.cu_seqlens;
    constexpr int64_t kMost = 1 << 16;  // of a width and of a dilation
    if (x.ndim != 3 || weight.ndim != 2 || weight.sizes[1] < 1 || weight.sizes[1] > kMost ||
        options.dilation < 1 || options.dilation > kMost ||
        (given(cu_seqlens) && cu_seqlens.sizes[0] < 1)) {
      return {};
    }
    const int64_t sizes[3] = {given(cu_seqlens) ? cu_seqlens.sizes[0] - 1 : x.sizes[0], x.sizes[1],
                              (weight.sizes[1] - 1) * options.dilation};
    const int order[3] = {0, 1, 2};
    return a.empty(0, 3, sizes, order);
  }

  // Of what is written, when it is sure that it will be.
  static void tell_torch(const ManyArguments& a, std::initializer_list<int> written) {
    for (int i : written) a.bump_version(i);
  }
};

}  // namespace causal_conv1d::torch_abi
