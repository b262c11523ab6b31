// Memory that the system gives before it is needed.

#include <cstdint>

#include "simd.h"

namespace {
constexpr long kPage = 4096;
}

// Touches every page without changing what others may be writing there meanwhile.
NANOVLLM_API void nanovllm_touch(void* memory, int64_t num_bytes) {
  auto* bytes = static_cast<char*>(memory);
  for (int64_t i = 0; i < num_bytes; i += kPage) {
    __atomic_fetch_add(bytes + i, char(0), __ATOMIC_RELAXED);
  }
}
