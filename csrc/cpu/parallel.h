// A loop over units of work on the threads of the process's OpenMP, which torch's operators run on,
// or else on threads that live for one call.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace causal_conv1d {

using UnitFunction = void (*)(const void* context, int64_t unit, char* scratch) noexcept;

// Calls function(context, unit, scratch) for 0 <= unit < units, each once, in any order, on up to
// num_threads threads (<= 0: one per core), the caller's own among them, fewer if `work`, in
// elements of a forward, is not worth them; scratch is 64-byte aligned memory of the thread.
// Throws std::bad_alloc if there is no memory for scratch; carries on with fewer threads if some
// cannot be started.
void parallel_for(int64_t units, int num_threads, int64_t work, size_t scratch_bytes,
                  UnitFunction function, const void* context);

template <class Body>
void parallel_for(int64_t units, int num_threads, int64_t work, size_t scratch_bytes,
                  const Body& body) {
  parallel_for(
      units, num_threads, work, scratch_bytes,
      [](const void* context, int64_t unit, char* scratch) noexcept {
        (*static_cast<const Body*>(context))(unit, scratch);
      },
      &body);
}

}  // namespace causal_conv1d
