// Threads that launch through one driver at once: arguments are not mixed up, nothing is loaded twice, and nothing is
// allocated once all is loaded. Arguments: the fake driver's path, threads, calls of each.
#include "driver.hpp"

#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#ifdef DKS_COUNT_ALLOCATIONS
extern "C" void* __libc_malloc(std::size_t);
static std::atomic<long> allocations{0};
extern "C" void* malloc(std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_malloc(size);
}
#else
static std::atomic<long> allocations{0};
#endif

namespace {

struct Call {
  char what[12];
  char name[100];
  std::int32_t count;
  std::int64_t numbers[64];
};

constexpr int kernels = 6;
const char* const names[] = {"f0__pipp", "f1__pipp", "f2__pipp", "f3__pipp", "f4__pipp", "f5__pipp"};
const dks_gpu_input inputs[] = {{"x", DKS_GPU_POINTER, 16}, {"m", DKS_GPU_INT32, 1}};
const dks_gpu_factor blocks[] = {{64, 1}};

int fail(const char* what, long found) {
  std::printf("%s: %ld\n", what, found);
  return 1;
}

}  // namespace

int main(int, char** argv) {
  const int threads = std::atoi(argv[2]), calls = std::atoi(argv[3]);
  dks::gpu::Driver& driver = dks::gpu::driver();
  std::vector<std::thread> all;
  std::atomic<int> wrong{0};
  for (int t = 0; t < threads; ++t)  // all at once, too
    all.emplace_back([&] {
      char why[200];
      if (driver.open(argv[1], why, sizeof why) != DKS_GPU_OK) wrong.fetch_add(1);
    });
  for (auto& thread : all) thread.join();
  if (wrong.load() != 0) return fail("not opened", wrong.load());
  all.clear();

  dks_gpu_cubin cubins[kernels];
  dks_gpu_kernel* added[kernels];
  for (int i = 0; i < kernels; ++i) {
    cubins[i] = {"f", "", names[i], "\177ELF", inputs, blocks, nullptr, nullptr, 2, 2, 1, 0, 0, 90, 4, 64 * 1024, 0, 0, 1};
    added[i] = dks::gpu::add(&cubins[i]);
    if (added[i] == nullptr) return fail("not added", i);
  }
  std::atomic<long> started{0}, after{0};
  for (int t = 0; t < threads; ++t)
    all.emplace_back([&, t] {
      for (int c = 0; c < calls; ++c) {
        const dks_gpu_source first[] = {{0, 0}, {0, 1}}, second[] = {{0, 0}, {7, -1}};
        const int one = (t + c) % kernels, other = (t + c + 1) % kernels;
        const dks_gpu_step steps[] = {{added[one], first}, {added[other], second}};
        const std::int64_t slots[] = {(std::int64_t{t} * calls + c) * 16, 1 + t * calls + c};
        const dks_gpu_call call{steps, slots, nullptr, nullptr, 0, 2, 2, t % 2};
        if (driver.launch(call) != DKS_GPU_OK) wrong.fetch_add(1);
        if (c == kernels) {  // everybody has loaded all of them, on both devices
          started.fetch_add(1);
          while (started.load() < threads) std::this_thread::yield();
          long none = 0;
          after.compare_exchange_strong(none, allocations.load());
        }
      }
    });
  for (auto& thread : all) thread.join();
  const long allocated = after.load() == 0 ? 0 : allocations.load() - after.load();
  if (wrong.load() != 0) return fail("launches failed", wrong.load());

  for (dks_gpu_kernel* kernel : added) delete kernel;

  void* fake = dlopen(argv[1], RTLD_NOW | RTLD_NOLOAD);
  const auto count = reinterpret_cast<int (*)()>(dlsym(fake, "fake_calls"))();
  const auto get = reinterpret_cast<const Call* (*)(int)>(dlsym(fake, "fake_call"));
  long loads = 0, launches = 0, retained = 0;
  for (int i = 0; i < count; ++i) {
    const Call& each = *get(i);
    if (std::strcmp(each.what, "load") == 0) ++loads;
    if (std::strcmp(each.what, "retain") == 0) ++retained;
    if (std::strcmp(each.what, "launch") != 0) continue;
    ++launches;
    const std::int64_t address = each.numbers[9], m = each.numbers[10];
    const std::int64_t device = (address / 16 / calls) % 2;
    const bool first = m == 1 + address / 16 && each.numbers[0] == (m + 63) / 64;
    const bool second = m == 7 && each.numbers[0] == 1;
    if (!(first || second) || each.numbers[8] != 0x1000 + device || each.numbers[11] != 0 || each.numbers[12] != 0)
      return fail("arguments of another call", i);
  }
  if (launches != 2L * threads * calls) return fail("launches", launches);
  if (loads != 2 * kernels) return fail("loads", loads);
  if (retained != 2) return fail("contexts", retained);
  std::printf("{\"launches\": %ld, \"allocations\": %ld}\n", launches, allocated);
  return 0;
}
