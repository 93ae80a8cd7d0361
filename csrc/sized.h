// Parameter structs that grow at their end: their first member, size, says how far the caller's
// goes.
#pragma once

#include <cstring>
#include <type_traits>

#include "checker.h"

namespace causal_conv1d {

// Copies what the caller knows of a struct into full; the rest is zero, which is "not given". What
// a caller of a later version gives beyond it has to be zero too.
template <class Params>
Status read_sized(const Checker& c, const Params& params, Params* full, const char* name = "size") {
  static_assert(std::is_trivially_copyable_v<Params>);
  if (params.size < sizeof params.size) {
    return c.fail(name, "must be the size of the parameter struct, got %llu",
                  static_cast<unsigned long long>(params.size));
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(&params);
  for (uint64_t i = sizeof(Params); i < params.size; ++i) {
    if (bytes[i] != 0) {
      return c.fail(name, "tells of parameters that this library does not know: %llu of %llu bytes",
                    static_cast<unsigned long long>(params.size),
                    static_cast<unsigned long long>(sizeof(Params)));
    }
  }
  std::memset(full, 0, sizeof *full);
  std::memcpy(full, bytes, params.size < sizeof(Params) ? params.size : sizeof(Params));
  return ok();
}

}  // namespace causal_conv1d
