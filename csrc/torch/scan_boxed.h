// The selective scan's operators as torch calls them, over a backend as in boxed.h.
#pragma once

#include <initializer_list>

#include "boxed.h"

namespace causal_conv1d::torch_abi {

template <class Backend>
struct ScanBoxed {
  static void scan_forward(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kScanForward, Operation::kScanForward, stack)) return;
    const Arguments4 a(schema::kScanForward, stack);
    const bool need_states = a.value(11) != 0;
    Output4 out = a.empty_like(0);
    Output4 last_states = need_states ? empty_last_states(a) : nothing(a);
    Backend::run(
        ScanForwardParams{
            inputs(a), out.tensor(), {}, need_states ? last_states.tensor() : Tensor4{}},
        a.device_index());
    stack[0] = out.release();
    stack[1] = last_states.release();
  }

  static void scan_forward_out(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kScanForwardOut, Operation::kScanForward, stack)) return;
    const Arguments4 a(schema::kScanForwardOut, stack);
    const ScanForwardParams p = {inputs(a), a.tensor(11), a.tensor(12), a.tensor(13)};
    run_in_place(a, p, {11, 12, 13});
  }

  static void scan_backward(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kScanBackward, Operation::kScanBackward, stack)) return;
    const Arguments4 a(schema::kScanBackward, stack);
    // The first inputs have the gradients, in the same order.
    const auto need = [&a](int i) { return (a.value(13) >> i & 1) != 0 && given(a.tensor(i)); };
    const auto make = [&](int i) { return need(i) ? a.empty_like(i) : nothing(a); };
    Output4 found[] = {make(0), make(1), make(2), make(3), make(4),
                       make(5), make(6), make(7), make(8)};
    const auto at = [&](int i) { return need(i) ? found[i].tensor() : Tensor4{}; };
    Backend::run(ScanBackwardParams{inputs(a), a.tensor(11), a.tensor(12), at(0), at(1), at(2),
                                    at(3), at(4), at(5), at(6), at(7), at(8), Tensor4{}},
                 a.device_index());
    for (Output4& gradient : found) *stack++ = gradient.release();
  }

  static void scan_backward_out(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kScanBackwardOut, Operation::kScanBackward, stack)) return;
    const Arguments4 a(schema::kScanBackwardOut, stack);
    const ScanBackwardParams p = {inputs(a),    a.tensor(11), a.tensor(12), a.tensor(13),
                                  a.tensor(14), a.tensor(15), a.tensor(16), a.tensor(17),
                                  a.tensor(18), a.tensor(19), a.tensor(20), a.tensor(21),
                                  a.tensor(22)};
    run_in_place(a, p, {13, 14, 15, 16, 17, 18, 19, 20, 21, 22});
  }

  static void state_update(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kStateUpdate, Operation::kStateUpdate, stack)) return;
    const Arguments4 a(schema::kStateUpdate, stack);
    Output4 out = a.empty_like(1);
    run_in_place(a, update(a, out.tensor(), a.value(10) != 0), {0});
    stack[0] = out.release();
  }

  static void state_update_out(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kStateUpdateOut, Operation::kStateUpdate, stack)) return;
    const Arguments4 a(schema::kStateUpdateOut, stack);
    run_in_place(a, update(a, a.tensor(10), a.value(11) != 0), {0, 10});
  }

  static void register_all(const char* name_space, const char* dispatch_key) {
    const Kernel kernels[] = {
        {&schema::kScanForward, scan_forward},   {&schema::kScanForwardOut, scan_forward_out},
        {&schema::kScanBackward, scan_backward}, {&schema::kScanBackwardOut, scan_backward_out},
        {&schema::kStateUpdate, state_update},   {&schema::kStateUpdateOut, state_update_out},
    };
    register_kernels(name_space, dispatch_key, kernels, sizeof kernels / sizeof kernels[0]);
  }

 private:
  static ScanInputs inputs(const Arguments4& a) {
    return {a.tensor(0), a.tensor(1), a.tensor(2), a.tensor(3), a.tensor(4),     a.tensor(5),
            a.tensor(6), a.tensor(7), a.tensor(8), a.tensor(9), a.value(10) != 0};
  }

  static StateUpdateParams update(const Arguments4& a, const Tensor4& out, bool dt_softplus) {
    return {with_heads(a.tensor(0), 4, 1), with_heads(a.tensor(1), 3, 1),
            with_heads(a.tensor(2), 3, 1), with_heads(a.tensor(3), 3, 0),
            with_heads(a.tensor(4), 3, 1), with_heads(a.tensor(5), 3, 1),
            with_heads(a.tensor(6), 2, 0), with_heads(a.tensor(7), 3, 1),
            with_heads(a.tensor(8), 2, 0), a.tensor(9),
            with_heads(out, 3, 1),         dt_softplus};
  }

  // A tensor that has ndim dimensions, one head's at place; callers without heads leave it out.
  static Tensor4 with_heads(Tensor4 t, int ndim, int place) {
    if (t.ndim != ndim - 1) return t;
    for (int i = t.ndim++; i > place; --i) {
      t.sizes[i] = t.sizes[i - 1];
      t.strides[i] = t.strides[i - 1];
    }
    t.sizes[place] = 1;
    return t;
  }

  static Output4 nothing(const Arguments4& a) {
    const int64_t sizes[1] = {0};
    const int order[1] = {0};
    return a.empty(0, 1, sizes, order);
  }

  // None if the shapes are wrong, which the check will tell.
  static Output4 empty_last_states(const Arguments4& a) {
    const Tensor4 &u = a.tensor(0), &A = a.tensor(2), &cu_seqlens = a.tensor(9);
    const int64_t sequences = given(cu_seqlens) ? cu_seqlens.sizes[0] - 1 : u.sizes[0];
    if (u.ndim != 3 || A.ndim != 2 || A.sizes[1] > kMostStates || sequences < 0) return {};
    const int64_t sizes[3] = {sequences, u.sizes[1], A.sizes[1]};
    const int order[3] = {0, 1, 2};
    return a.empty(0, 3, sizes, order, true);
  }

  // Torch is told of what is written when it is sure that it will be.
  template <class Params>
  static void run_in_place(const Arguments4& a, const Params& p,
                           std::initializer_list<int> written) {
    throw_if_failed(check(&p));
    for (int i : written) a.bump_version(i);
    Backend::run(p, a.device_index());
  }
};

}  // namespace causal_conv1d::torch_abi
