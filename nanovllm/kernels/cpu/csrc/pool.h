// The thread pool of the kernels, one in the process, and the scratch memory of the one that runs.
#pragma once

#include <atomic>
#include <mutex>
#include <type_traits>

namespace nanovllm {

// Held by a kernel while it runs: kernels of several Python threads take turns.
class Session {
 public:
  Session();

  // Memory that is this session's until it asks again in the same slot.
  void* scratch(int slot, size_t bytes);

  // Calls `body(item)` for every item, on all threads, each thread taking the next one when free.
  template <class Body>
  void parallel(long items, Body&& body) {
    using Bare = std::remove_reference_t<Body>;
    run(items, [](void* context, long item) { (*static_cast<Bare*>(context))(item); }, &body);
  }

 private:
  void run(long items, void (*call)(void*, long), void* context);
  std::unique_lock<std::mutex> lock_;
};

int num_threads();

}  // namespace nanovllm
