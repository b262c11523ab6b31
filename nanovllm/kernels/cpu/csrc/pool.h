// The thread pool of the kernels, one in the process, and the scratch memory of the one that runs.
#pragma once

#include <algorithm>
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

// Rows that a work item holds, so that a step of few rows does not wake the other threads.
constexpr long kRowsPerItem = 4;

// Calls `body(row)` for every row, in a session of its own.
template <class Body>
void for_each_row(long rows, Body&& body) {
  Session session;
  session.parallel((rows + kRowsPerItem - 1) / kRowsPerItem, [&](long item) {
    const long end = std::min(rows, (item + 1) * kRowsPerItem);
    for (long r = item * kRowsPerItem; r < end; r++) body(r);
  });
}

}  // namespace nanovllm
