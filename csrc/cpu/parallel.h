// A loop over units of work on threads that live for one call: no pool, no global state.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace causal_conv1d {

using UnitFunction = void (*)(const void* context, int64_t unit, char* scratch);

// The number of threads to use where the caller allows `requested` (<= 0: one per core) and the
// work is worth at most `useful`.
int thread_count(int requested, int64_t useful);

// Calls function(context, unit, scratch) for 0 <= unit < units, each once, in any order, on up to
// num_threads threads, the caller's own among them; scratch is 64-byte aligned memory of the
// thread. Rethrows the first exception; carries on with fewer threads if some cannot be started.
void parallel_for(int64_t units, int num_threads, size_t scratch_bytes, UnitFunction function,
                  const void* context);

template <class Body>
void parallel_for(int64_t units, int num_threads, size_t scratch_bytes, const Body& body) {
  parallel_for(
      units, num_threads, scratch_bytes,
      [](const void* context, int64_t unit, char* scratch) {
        (*static_cast<const Body*>(context))(unit, scratch);
      },
      &body);
}

}  // namespace causal_conv1d
