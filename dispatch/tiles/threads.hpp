// Threads of a kernel: OpenMP's, through whichever OpenMP the process has. PyTorch brings one; a second one
// would start threads that compete with it. The symbols are weak, so that nothing is linked: without OpenMP
// everything runs on the caller's thread.
#pragma once

#include <pthread.h>

#include <cstdint>

extern "C" {
void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
void GOMP_barrier() __attribute__((weak));
int omp_get_thread_num() __attribute__((weak));
int omp_get_num_threads() __attribute__((weak));
int omp_get_max_threads() __attribute__((weak));
}

namespace dks {

// Whether this process is the child of one that had started threads here: they are gone, and OpenMP would wait for
// them forever. A child of a process that had not may start its own.
inline bool is_orphan() {
  static bool orphan = false;
  static const int watched = pthread_atfork(nullptr, nullptr, [] { orphan = true; });
  return orphan || watched != 0;
}

// body(thread, threads) on up to `threads` threads; a team may be smaller than asked for, so the body shares
// out its work by what it is told. Never more than the caller's OpenMP would take by itself (torch.set_num_threads
// sets that): a forked child that was told to stay on one thread has no others, and would wait for them forever.
template <class Body>
inline void parallel(int threads, const Body& body) {
  if (threads > 1 && omp_get_max_threads != nullptr && omp_get_max_threads() < threads) threads = omp_get_max_threads();
  if (threads <= 1 || GOMP_parallel == nullptr || GOMP_barrier == nullptr || omp_get_thread_num == nullptr ||
      omp_get_num_threads == nullptr || is_orphan()) {
    body(0, 1);
    return;
  }
  GOMP_parallel(
      [](void* data) { (*static_cast<const Body*>(data))(omp_get_thread_num(), omp_get_num_threads()); },
      const_cast<Body*>(&body), static_cast<unsigned>(threads), 0);
}

// Inside a body, where `threads` is what it was told.
inline void barrier(int threads) {
  if (threads > 1) GOMP_barrier();
}

struct Span {
  int64_t begin, end;
};

// The part of 0..count that a thread has, in whole multiples of `step`.
inline Span share(int64_t count, int64_t step, int thread, int threads) {
  const int64_t steps = (count + step - 1) / step;
  const int64_t begin = steps * thread / threads * step, end = steps * (thread + 1) / threads * step;
  return {begin < count ? begin : count, end < count ? end : count};
}

}  // namespace dks
