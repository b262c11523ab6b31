#include "pool.h"

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "amx.h"

namespace nanovllm {
namespace {

// Long enough to bridge the Python between two kernels, short enough to leave an idle core alone.
constexpr auto kSpin = std::chrono::microseconds(300);
constexpr int kPolls = 4096;  // some 0.1 ms, more than the last item of a job takes

struct Job {
  void (*call)(void*, long) = nullptr;
  void* context = nullptr;
  long items = 0;
};

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
};

struct Pool {
  std::mutex kernels;
  std::vector<std::thread> workers;
  Job job;
  alignas(64) std::atomic<long> next{0};
  alignas(64) std::atomic<uint32_t> epoch{0};  // odd while a job is open
  alignas(64) std::atomic<int> active{0};      // workers that may touch the job
  std::atomic<bool> stopping{false};
  Buffer buffers[4];
};

// Never destroyed: workers may still wait in it when the process exits.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void take_items(Pool& p) {
  const Job job = p.job;
  for (long item; (item = p.next.fetch_add(1, std::memory_order_relaxed)) < job.items;) {
    job.call(job.context, item);
  }
}

uint32_t wait_for_change(std::atomic<uint32_t>& epoch, uint32_t seen) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; i++) {
      const uint32_t now = epoch.load(std::memory_order_acquire);
      if (now != seen) return now;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  epoch.wait(seen);
  return epoch.load(std::memory_order_acquire);
}

void work(Pool& p) {
  configure_tiles();
  uint32_t seen = p.epoch.load();
  while (!p.stopping.load()) {
    seen = wait_for_change(p.epoch, seen);
    if (seen % 2 == 0) continue;
    // A worker that wakes late finds the job closed, or another one open, and leaves it alone.
    p.active.fetch_add(1);
    if (p.epoch.load() == seen) take_items(p);
    p.active.fetch_sub(1);
  }
}

void pin([[maybe_unused]] std::thread& thread, [[maybe_unused]] int cpu) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread.native_handle(), sizeof(set), &set);
#endif
}

void stop_workers(Pool& p) {
  p.stopping = true;
  p.epoch.fetch_add(2);
  p.epoch.notify_all();
  for (auto& worker : p.workers) worker.join();
  p.workers.clear();
  p.stopping = false;
}

// A forked child has no workers; it goes on with one thread.
[[maybe_unused]] void forget_workers() {
  Pool& p = pool();
  for (auto& worker : p.workers) worker.detach();
  p.workers.clear();
  p.active = 0;
  p.epoch = 0;
  new (&p.kernels) std::mutex;  // who held it is not in the child
}

}  // namespace

Session::Session() : lock_(pool().kernels) { configure_tiles(); }

void* Session::scratch(int slot, size_t bytes) {
  Buffer& buffer = pool().buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, buffer.bytes);
    if (!buffer.data) {
      std::fprintf(stderr, "nanovllm: no memory for %zu bytes of scratch\n", buffer.bytes);
      std::abort();
    }
  }
  return buffer.data;
}

void Session::run(long items, void (*call)(void*, long), void* context) {
  Pool& p = pool();
  if (items <= 1 || p.workers.empty()) {
    for (long item = 0; item < items; item++) call(context, item);
    return;
  }
  p.job = {call, context, items};
  p.next.store(0, std::memory_order_relaxed);
  p.epoch.fetch_add(1);
  p.epoch.notify_all();
  take_items(p);
  p.epoch.fetch_add(1);
  // A worker with an item left may have lost its core to another process: that one shall get ours.
  for (int i = 0; p.active.load() != 0; i++) {
    if (i < kPolls) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

int num_threads() { return int(pool().workers.size()) + 1; }

}  // namespace nanovllm

using namespace nanovllm;

// Starts the pool anew with `threads` threads, the caller's one of them. Worker i is pinned to
// cpus[i]; null pins none. The caller's thread is not: threads it starts later would inherit that.
// Returns 0, with no thread but the caller's, if the system does not give as many.
NANOVLLM_API int nanovllm_start_threads(int threads, const int32_t* cpus) {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.kernels);
#if defined(__linux__)
  static const int registered = pthread_atfork(nullptr, nullptr, forget_workers);
  (void)registered;
#endif
  stop_workers(p);
  try {
    for (int i = 1; i < threads; i++) {
      p.workers.emplace_back([&p] { work(p); });
      if (cpus) pin(p.workers.back(), cpus[i]);
    }
  } catch (const std::system_error&) {
    stop_workers(p);
    return 0;
  }
  return 1;
}

NANOVLLM_API int nanovllm_num_threads() { return num_threads(); }

// Asks the kernel for the use of AMX tiles; false where it does not grant it.
NANOVLLM_API int nanovllm_enable_amx() {
#if defined(NANOVLLM_EMULATE_AMX)
  return 1;
#elif defined(NANOVLLM_AMX)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return 0;
#endif
}
