// The operators as torch calls them, over a backend, which is a struct with
//   static bool replaced(const Signature&, Operation, StableIValue* stack)
//     whether something else has taken the call, and the stack with it;
//   static void run(const Params&, int32_t device_index)
//     the core's function, for the parameters of each operation.
#pragma once

#include <initializer_list>

#include "ops.h"

namespace causal_conv1d::torch_abi {

// In the order in which kernels are numbered, see register.h.
enum class Operation {
  kForward,
  kBackward,
  kUpdate,
  kVarlenStates,
  kScanForward,
  kScanBackward,
  kStateUpdate
};

template <class Backend>
struct Boxed {
  static void forward(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kForward, Operation::kForward, stack)) return;
    const Arguments a(schema::kForward, stack);
    Output out = a.empty_like(0);
    Backend::run(params(a, out.tensor(), {}), a.device_index());
    stack[0] = out.release();
  }

  static void forward_states(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kForwardStates, Operation::kForward, stack)) return;
    const Arguments a(schema::kForwardStates, stack);
    Output out = a.empty_like(0), final_states = empty_states(a);
    Backend::run(params(a, out.tensor(), final_states.tensor()), a.device_index());
    stack[0] = out.release();
    stack[1] = final_states.release();
  }

  static void forward_out(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kForwardOut, Operation::kForward, stack)) return;
    const Arguments a(schema::kForwardOut, stack);
    const ForwardParams p = {a.tensor(0), a.tensor(1), a.tensor(2), a.tensor(3),
                             a.tensor(4), a.tensor(5), a.tensor(6), a.value(7) != 0};
    run_in_place(a, p, {5, 6});
  }

  static void backward(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kBackward, Operation::kBackward, stack)) return;
    const Arguments a(schema::kBackward, stack);
    const int64_t none[1] = {0}, dim[1] = {a.tensor(1).sizes[0]};
    const int order[1] = {0};
    const bool need_dweight = a.value(7) != 0, need_dbias = a.value(8) != 0 && given(a.tensor(2)),
               need_dinitial = a.value(9) != 0;
    Output dx = a.empty_like(0);
    Output dweight = need_dweight ? a.empty_like(1) : a.empty(1, 1, none, order);
    Output dbias = a.empty(need_dbias ? 2 : 1, 1, need_dbias ? dim : none, order);
    Output dinitial = !need_dinitial       ? a.empty(0, 1, none, order)
                      : given(a.tensor(5)) ? a.empty_like(5)
                                           : empty_states(a);
    Backend::run(
        BackwardParams{a.tensor(0), a.tensor(1), a.tensor(2), a.tensor(3), a.tensor(4), a.tensor(5),
                       a.tensor(6), dx.tensor(), need_dweight ? dweight.tensor() : Tensor{},
                       need_dbias ? dbias.tensor() : Tensor{},
                       need_dinitial ? dinitial.tensor() : Tensor{}, a.value(10) != 0},
        a.device_index());
    stack[0] = dx.release();
    stack[1] = dweight.release();
    stack[2] = dbias.release();
    stack[3] = dinitial.release();
  }

  static void backward_out(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kBackwardOut, Operation::kBackward, stack)) return;
    const Arguments a(schema::kBackwardOut, stack);
    const BackwardParams p = {a.tensor(0), a.tensor(1), a.tensor(2),  a.tensor(3),
                              a.tensor(4), a.tensor(5), a.tensor(6),  a.tensor(7),
                              a.tensor(8), a.tensor(9), a.tensor(10), a.value(11) != 0};
    run_in_place(a, p, {7, 8, 9, 10});
  }

  static void update(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kUpdate, Operation::kUpdate, stack)) return;
    const Arguments a(schema::kUpdate, stack);
    Output out = a.empty_like(0);
    const UpdateParams p = {a.tensor(0),  a.tensor(1), a.tensor(2), a.tensor(3),
                            out.tensor(), a.tensor(5), a.tensor(6), a.value(4) != 0};
    run_in_place(a, p, {1});
    stack[0] = out.release();
  }

  static void update_out(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kUpdateOut, Operation::kUpdate, stack)) return;
    const Arguments a(schema::kUpdateOut, stack);
    const UpdateParams p = {a.tensor(0), a.tensor(1), a.tensor(2), a.tensor(3),
                            a.tensor(4), a.tensor(6), a.tensor(7), a.value(5) != 0};
    run_in_place(a, p, {1, 4});
  }

  static void varlen_states(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kVarlenStates, Operation::kVarlenStates, stack)) return;
    const Arguments a(schema::kVarlenStates, stack);
    const Tensor &x = a.tensor(0), &cu_seqlens = a.tensor(1);
    throw_if_failed(check_varlen_sizes(x, cu_seqlens, a.value(2)));
    const int64_t sizes[3] = {cu_seqlens.sizes[0] - 1, x.sizes[1], a.value(2)};
    const int order[3] = {0, 2, 1};  // dim is contiguous, as in x
    Output states = a.empty(0, 3, sizes, order);
    Backend::run(VarlenStatesParams{x, cu_seqlens, states.tensor()}, a.device_index());
    stack[0] = states.release();
  }

  static void register_all(const char* name_space, const char* dispatch_key) {
    const Kernel kernels[] = {
        {&schema::kForward, forward},          {&schema::kForwardStates, forward_states},
        {&schema::kForwardOut, forward_out},   {&schema::kBackward, backward},
        {&schema::kBackwardOut, backward_out}, {&schema::kUpdate, update},
        {&schema::kUpdateOut, update_out},     {&schema::kVarlenStates, varlen_states},
    };
    register_kernels(name_space, dispatch_key, kernels, sizeof kernels / sizeof kernels[0]);
  }

 private:
  // Torch is told of what is written when it is sure that it will be.
  template <class Params>
  static void run_in_place(const Arguments& a, const Params& p,
                           std::initializer_list<int> written) {
    throw_if_failed(check(&p));
    for (int i : written) a.bump_version(i);
    Backend::run(p, a.device_index());
  }

  // Of the functional forms.
  static ForwardParams params(const Arguments& a, const Tensor& out, const Tensor& final_states) {
    return {a.tensor(0), a.tensor(1), a.tensor(2),  a.tensor(3),
            a.tensor(4), out,         final_states, a.value(5) != 0};
  }
};

}  // namespace causal_conv1d::torch_abi
