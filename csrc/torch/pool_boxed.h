// The operator of the pool of states as torch calls it, over a backend as in boxed.h.
#pragma once

#include "../pool_check.h"
#include "boxed.h"

namespace causal_conv1d::torch_abi {

// It counts as an update for the self-test.
template <class Backend>
struct PoolBoxed {
  static void pool(StableIValue* stack, uint64_t, uint64_t) {
    if (Backend::replaced(schema::kPool, Operation::kUpdate, stack)) return;
    const ManyArguments a(schema::kPool, stack);
    const PoolParams p = {sizeof(PoolParams), a.tensor(0), a.tensor(1),     a.tensor(2),
                          a.tensor(3),        a.tensor(4), a.tensor(5),     a.tensor(6),
                          a.tensor(7),        a.tensor(8), a.tensor(9),     a.tensor(10),
                          a.value(11),        a.value(12), a.value(13) != 0};
    throw_if_failed(check(&p));
    // Torch is told of what is written when it is sure that it will be.
    for (int i : {1, 4, 9}) a.bump_version(i);
    Backend::run(p, a.device_index());
  }

  static void register_all(const char* name_space, const char* dispatch_key) {
    const Kernel kernel = {&schema::kPool, pool};
    register_kernels(name_space, dispatch_key, &kernel, 1);
  }
};

}  // namespace causal_conv1d::torch_abi
