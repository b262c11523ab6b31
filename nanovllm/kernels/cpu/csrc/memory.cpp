// Memory that the system gives before it is needed: at its first touch it would hold a step up.

#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#endif

#include "simd.h"

namespace {
constexpr int64_t kPage = 4096, kPiece = 2 << 20;
constexpr int kLowestPriority = 19;

struct Prefault {
  std::vector<char*> memory;
  int64_t bytes;  // of each
  pid_t process = getpid();
  std::atomic<bool> stopping{false};
  std::thread thread;
};

// The beginnings of all of it first. What others may be writing there meanwhile stays.
void touch(const Prefault& work) {
#if defined(__linux__)  // elsewhere a thread has no priority of its own
  setpriority(PRIO_PROCESS, id_t(syscall(SYS_gettid)), kLowestPriority);
#endif
  for (int64_t first = 0; first < work.bytes; first += kPiece) {
    const int64_t end = first + kPiece < work.bytes ? first + kPiece : work.bytes;
    for (char* memory : work.memory) {
      for (int64_t i = first; i < end; i += kPage) {
        if (work.stopping.load(std::memory_order_relaxed)) return;
        __atomic_fetch_add(memory + i, char(0), __ATOMIC_RELAXED);
      }
    }
  }
}
}  // namespace

// Touches `bytes` of each of `count` blocks of memory in a thread, which shuns Python's lock: that
// of the lowest priority would hold it longest. Returns what stops it; null if there is no thread.
NANOVLLM_API void* nanovllm_start_prefault(char* const* memory, int64_t count, int64_t bytes) {
  auto* work = new Prefault{{memory, memory + count}, bytes};
  try {
    work->thread = std::thread([work] { touch(*work); });
  } catch (const std::system_error&) {
    delete work;
    return nullptr;
  }
#if defined(__linux__)
  pthread_setname_np(work->thread.native_handle(), "prefault");
#endif
  return work;
}

// To be called once, before any of the memory goes.
NANOVLLM_API void nanovllm_stop_prefault(void* started) {
  auto* work = static_cast<Prefault*>(started);
  if (!work || work->process != getpid()) return;  // a forked child does not have the thread
  work->stopping = true;
  work->thread.join();
  delete work;
}
