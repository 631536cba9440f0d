// The least that a launch can cost: cuLaunchKernel in a loop, its arguments laid out once.

#include <time.h>

typedef int (*Launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);

// Nanoseconds of a launch, the mean of `count`; below 0 what the driver refused with.
double dks_bare(void* launch, void* function, unsigned threads, unsigned shared, void* stream, void** arguments,
                int count) {
  struct timespec before, after;
  clock_gettime(CLOCK_MONOTONIC, &before);
  for (int i = 0; i < count; ++i) {
    const int code = ((Launch)launch)(function, 1, 1, 1, threads, 1, 1, shared, stream, arguments, (void**)0);
    if (code != 0) return -code;
  }
  clock_gettime(CLOCK_MONOTONIC, &after);
  return ((after.tv_sec - before.tv_sec) * 1e9 + (after.tv_nsec - before.tv_nsec)) / count;
}
