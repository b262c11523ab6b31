// A sequence of kernels in one call: what is between them in Python takes as long as a small kernel.

#include "replay.h"

namespace nanovllm {

// A call as Python wrote it down (see replay.py, which mirrors this struct).
struct Call {
  void (*again)(const int64_t*);
  int64_t words[kMaxArguments];  // pointers, integers, and the bits of a float
};
static_assert(sizeof(Call) == (1 + kMaxArguments) * 8);

}  // namespace nanovllm

using namespace nanovllm;

NANOVLLM_API void nanovllm_replay(const Call* calls, int64_t num_calls) {
  for (int64_t i = 0; i < num_calls; i++) calls[i].again(calls[i].words);
}
