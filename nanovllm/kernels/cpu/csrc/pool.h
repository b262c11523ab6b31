// The thread pool of the kernels, one in the process, and the scratch memory of the one that runs.
#pragma once

#include <algorithm>
#include <atomic>
#include <mutex>
#include <type_traits>

namespace nanovllm {

int num_threads();

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

  // The same for rows, which are little work each: a thread takes several that follow each other, so
  // that it reads memory in order, and that a few rows wake no other thread.
  template <class Body>
  void parallel_rows(long rows, Body&& body) {
    constexpr long kFewest = 4, kItemsPerThread = 8;
    const long each = std::max(kFewest, rows / (kItemsPerThread * num_threads()));
    parallel((rows + each - 1) / each, [&](long item) {
      const long end = std::min(rows, (item + 1) * each);
      for (long row = item * each; row < end; row++) body(row);
    });
  }

 private:
  void run(long items, void (*call)(void*, long), void* context);
  std::unique_lock<std::mutex> lock_;
};

// Calls `body(row)` for every row, in a session of its own.
template <class Body>
void for_each_row(long rows, Body&& body) {
  Session session;
  session.parallel_rows(rows, body);
}

}  // namespace nanovllm
