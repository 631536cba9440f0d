// Loading and launching compiled GPU programs through NVIDIA's driver library, which is opened at run time: what is
// built from this needs no CUDA to be built, and loads on machines that have none. C++17, header only; see gpu.h for
// the interface, and for what each code means.
#ifndef DKS_GPU_DRIVER_HPP
#define DKS_GPU_DRIVER_HPP

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>

#include "gpu.h"

namespace dks::gpu {

// The part of the driver's interface that is used. Types and numbers are those of cuda.h, which tests compare.
using Handle = void*;  // CUcontext, CUmodule, CUfunction, CUstream
constexpr int success = 0, stub_library = 34, no_device = 100;
constexpr int invalid_image = 200, no_binary_for_gpu = 209, not_found = 500;
constexpr int multiprocessor_count = 16, capability_major = 75, capability_minor = 76, shared_memory_optin = 97;
constexpr int max_dynamic_shared_size = 8;
constexpr int capture_relaxed = 2;
constexpr std::int32_t shared_without_asking = 48 * 1024;

// After these the context is lost, and with it the process for CUDA (cuda.h: "leaves the process in an inconsistent
// state"); 214, 220, 709, 710 and 721 end the context as well.
constexpr int sticky_codes[] = {214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 911};

inline std::int32_t failed(int driver_code) {
  for (const int code : sticky_codes)
    if (code == driver_code) return DKS_GPU_STICKY + driver_code;
  return DKS_GPU_FAILED + driver_code;
}

struct Functions {
  int (*Init)(unsigned) = nullptr;
  int (*DeviceGetCount)(int*) = nullptr;
  int (*DeviceGet)(int*, int) = nullptr;
  int (*DeviceGetAttribute)(int*, int, int) = nullptr;
  int (*DevicePrimaryCtxRetain)(Handle*, int) = nullptr;
  int (*CtxGetCurrent)(Handle*) = nullptr;
  int (*CtxGetDevice)(int*) = nullptr;
  int (*CtxPushCurrent)(Handle) = nullptr;
  int (*CtxPopCurrent)(Handle*) = nullptr;
  int (*ModuleLoadData)(Handle*, const void*) = nullptr;
  int (*ModuleGetFunction)(Handle*, Handle, const char*) = nullptr;
  int (*ModuleUnload)(Handle) = nullptr;
  int (*FuncSetAttribute)(Handle, int, int) = nullptr;
  int (*LaunchKernel)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**,
                      void**) = nullptr;
  int (*GetErrorName)(int, const char**) = nullptr;
  int (*GetErrorString)(int, const char**) = nullptr;
  int (*ThreadExchangeStreamCaptureMode)(int*) = nullptr;
  int (*FuncLoad)(Handle) = nullptr;  // from 12.4 on; null before
};

// One context of one device. Once others can see it, only that it is the primary one may still turn out.
struct Context {
  Handle handle = nullptr;
  int device = 0;
  std::atomic<bool> primary{false};
  dks_gpu_device facts{};
};

}  // namespace dks::gpu

struct dks_gpu_kernel {
  const dks_gpu_cubin* cubin;
  std::atomic<void*> functions[DKS_GPU_MAX_CONTEXTS];  // null: not loaded
  std::int32_t refused[DKS_GPU_MAX_CONTEXTS];          // why it can't be; under the driver's lock
};

namespace dks::gpu {

inline bool power_of_two(std::int64_t value) { return value > 0 && (value & (value - 1)) == 0; }

// Whether everything that a launch relies on holds.
inline bool coherent(const dks_gpu_cubin& c) {
  if (c.symbol == nullptr || c.program == nullptr || c.function == nullptr || c.elf == nullptr) return false;
  if (std::memcmp(c.elf, "\177ELF", 4) != 0) return false;
  if (c.arguments < 0 || c.input_count < c.arguments || c.input_count > DKS_GPU_MAX_INPUTS) return false;
  if (c.warps < 1 || c.warps > 32 || c.shared < 0 || c.resident < 0 || c.scratch < 0) return false;
  if (!power_of_two(c.scratch_align)) return false;
  for (std::int32_t i = 0; i < c.input_count; ++i)
    if (c.inputs[i].name == nullptr || c.inputs[i].type < DKS_GPU_POINTER || c.inputs[i].type > DKS_GPU_FLOAT32 ||
        !power_of_two(c.inputs[i].divisor))
      return false;
  const dks_gpu_factor* axes[] = {c.x, c.y, c.z};
  const std::int32_t counts[] = {c.x_count, c.y_count, c.z_count};
  for (int axis = 0; axis < 3; ++axis) {
    if (counts[axis] < 0 || counts[axis] > DKS_GPU_MAX_FACTORS) return false;
    for (std::int32_t i = 0; i < counts[axis]; ++i) {
      const dks_gpu_factor& factor = axes[axis][i];
      if (factor.size < 1 || factor.input < -1 || factor.input >= c.input_count) return false;
      if (factor.input >= 0 && c.inputs[factor.input].type != DKS_GPU_INT32 &&
          c.inputs[factor.input].type != DKS_GPU_INT64)
        return false;
    }
  }
  return true;
}

// Code for one architecture runs on later minor versions of its major one; from 9.0 on, on that very one.
inline bool runs_on(std::int32_t arch, std::int32_t device) {
  return arch >= 90 ? device == arch : device / 10 == arch / 10 && device >= arch;
}

// What a step of a call comes down to.
struct Prepared {
  Handle function = nullptr;
  std::int64_t grid[3] = {0, 0, 0};
  bool empty() const { return grid[0] == 0 || grid[1] == 0 || grid[2] == 0; }
};

class Driver {
 public:
  Driver() = default;
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  std::int32_t open(const char* path, char* why, std::size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    say(why, size, "", "");
    if (ready_.load(std::memory_order_acquire)) return DKS_GPU_OK;
    const char* name = path != nullptr ? path : "libcuda.so.1";
    void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* told = dlerror();
      say(why, size, "no NVIDIA driver: ", told != nullptr ? told : name);
      return DKS_GPU_NO_DRIVER;
    }
    Functions found;
    const char* lacks = nullptr;
    bind(library, found.Init, "cuInit", lacks);
    bind(library, found.DeviceGetCount, "cuDeviceGetCount", lacks);
    bind(library, found.DeviceGet, "cuDeviceGet", lacks);
    bind(library, found.DeviceGetAttribute, "cuDeviceGetAttribute", lacks);
    bind(library, found.DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", lacks);
    bind(library, found.CtxGetCurrent, "cuCtxGetCurrent", lacks);
    bind(library, found.CtxGetDevice, "cuCtxGetDevice", lacks);
    bind(library, found.CtxPushCurrent, "cuCtxPushCurrent_v2", lacks);
    bind(library, found.CtxPopCurrent, "cuCtxPopCurrent_v2", lacks);
    bind(library, found.ModuleLoadData, "cuModuleLoadData", lacks);
    bind(library, found.ModuleGetFunction, "cuModuleGetFunction", lacks);
    bind(library, found.ModuleUnload, "cuModuleUnload", lacks);
    bind(library, found.FuncSetAttribute, "cuFuncSetAttribute", lacks);
    bind(library, found.LaunchKernel, "cuLaunchKernel", lacks);
    bind(library, found.GetErrorName, "cuGetErrorName", lacks);
    bind(library, found.GetErrorString, "cuGetErrorString", lacks);
    bind(library, found.ThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode", lacks);
    const char* newer = nullptr;
    bind(library, found.FuncLoad, "cuFuncLoad", newer);
    if (lacks != nullptr) {
      say(why, size, "the NVIDIA driver is too old: it has no ", lacks);
      dlclose(library);
      return DKS_GPU_OLD_DRIVER;
    }
    // From here on it stays open: a driver that was started can't be unloaded.
    int count = 0;
    int code = found.Init(0);
    if (code == success) code = found.DeviceGetCount(&count);
    if (code == no_device || code == stub_library || (code == success && count == 0)) {
      say(why, size, "no NVIDIA device: ", code == stub_library ? "the driver is a stub to link with" : "found 0");
      return DKS_GPU_NO_DEVICE;
    }
    if (code != success) {
      describe(found, failed(code), why, size);
      return failed(code);
    }
    call_ = found;
    devices_ = count;
    ready_.store(true, std::memory_order_release);
    return DKS_GPU_OK;
  }

  std::int32_t device(std::int32_t number, dks_gpu_device& out) {
    Entered entered(*this);
    const std::int32_t code = entered.enter(number);
    if (code == DKS_GPU_OK) out = entered.context->facts;
    return code;
  }

  std::int32_t load(const dks_gpu_call& call) {
    if (!sound(call)) return DKS_GPU_BAD_CALL;
    Entered entered(*this);
    if (const std::int32_t code = entered.enter(call.device)) return code;
    for (std::int32_t i = 0; i < call.step_count; ++i) {
      Handle function = nullptr;
      if (const std::int32_t code = find(*call.steps[i].kernel, *entered.context, function)) return code;
    }
    return DKS_GPU_OK;
  }

  std::int64_t scratch(const dks_gpu_call& call) {
    if (!sound(call)) return -DKS_GPU_BAD_CALL;
    Entered entered(*this);
    if (const std::int32_t code = entered.enter(call.device)) return -code;
    std::int64_t most = 0;
    for (std::int32_t i = 0; i < call.step_count; ++i) {
      Prepared step;
      std::int64_t bytes = 0;
      if (const std::int32_t code = shape(call, call.steps[i], entered.context->facts, step, bytes)) return -code;
      if (bytes > most) most = bytes;
    }
    return most;
  }

  std::int32_t launch(const dks_gpu_call& call) {
    if (!sound(call)) return DKS_GPU_BAD_CALL;
    Entered entered(*this);
    if (const std::int32_t code = entered.enter(call.device)) return code;
    Prepared steps[DKS_GPU_MAX_STEPS];
    for (std::int32_t i = 0; i < call.step_count; ++i) {
      const dks_gpu_step& step = call.steps[i];
      const dks_gpu_cubin& cubin = *step.kernel->cubin;
      std::int64_t bytes = 0;
      if (const std::int32_t code = check(call, step)) return code;
      if (const std::int32_t code = shape(call, step, entered.context->facts, steps[i], bytes)) return code;
      const auto address = reinterpret_cast<std::uintptr_t>(call.scratch);
      if (bytes > 0 && (call.scratch == nullptr || bytes > call.scratch_bytes ||
                        address % static_cast<std::uintptr_t>(cubin.scratch_align) != 0))
        return DKS_GPU_SCRATCH;
    }
    for (std::int32_t i = 0; i < call.step_count; ++i)
      if (const std::int32_t code = find(*call.steps[i].kernel, *entered.context, steps[i].function)) return code;
    for (std::int32_t i = 0; i < call.step_count; ++i)
      if (!steps[i].empty())
        if (const std::int32_t code = start(call, call.steps[i], steps[i])) return code;
    return DKS_GPU_OK;
  }

  void text(std::int32_t code, char* out, std::size_t size) const {
    describe(ready_.load(std::memory_order_acquire) ? call_ : Functions{}, code, out, size);
  }

 private:
  // The context of a call for as long as the call lasts.
  struct Entered {
    explicit Entered(Driver& d) : driver(d) {}
    ~Entered() {
      Handle ignored = nullptr;
      if (pushed) driver.call_.CtxPopCurrent(&ignored);
    }
    Entered(const Entered&) = delete;
    Entered& operator=(const Entered&) = delete;

    std::int32_t enter(std::int32_t device) {
      if (!driver.ready_.load(std::memory_order_acquire)) return DKS_GPU_NO_DRIVER;
      if (device < 0 || device >= driver.devices_) return DKS_GPU_NO_DEVICE;
      Handle current = nullptr;
      if (const int code = driver.call_.CtxGetCurrent(&current)) return failed(code);
      const std::int32_t count = driver.count_.load(std::memory_order_acquire);
      const Context* primary = nullptr;
      for (std::int32_t i = 0; i < count; ++i) {
        const Context& held = driver.contexts_[i];
        if (held.device != device) continue;
        if (held.handle == current) {
          context = &held;
          return DKS_GPU_OK;
        }
        if (held.primary.load(std::memory_order_relaxed)) primary = &held;
      }
      if (const std::int32_t code = driver.meet(current, device, primary, context)) return code;
      if (context->handle == current) return DKS_GPU_OK;
      if (const int code = driver.call_.CtxPushCurrent(context->handle)) return failed(code);
      pushed = true;
      return DKS_GPU_OK;
    }

    Driver& driver;
    const Context* context = nullptr;
    bool pushed = false;
  };

  template <class Function>
  static void bind(void* library, Function*& function, const char* name, const char*& lacks) {
    void* found = dlsym(library, name);
    if (found == nullptr) lacks = name;
    function = reinterpret_cast<Function*>(found);
  }

  static void say(char* out, std::size_t size, const char* what, const char* more) {
    if (out != nullptr && size > 0) std::snprintf(out, size, "%s%s", what, more);
  }

  static void describe(const Functions& functions, std::int32_t code, char* out, std::size_t size) {
    const char* const own[] = {"done",
                               "there is no NVIDIA driver, or it was not opened",
                               "the NVIDIA driver is too old",
                               "there is no such NVIDIA device",
                               "too many CUDA contexts in this process",
                               "the program was compiled for another architecture",
                               "the program needs more shared memory than the device has",
                               "an address, stride or size is not aligned as the program needs it",
                               "a value is outside the range of its argument or makes a grid that no device has",
                               "there is too little scratch memory, or it is not aligned",
                               "the call contradicts its description"};
    if (code >= 0 && code < static_cast<std::int32_t>(sizeof own / sizeof *own)) return say(out, size, own[code], "");
    if (out == nullptr || size == 0) return;
    const bool sticky = code >= DKS_GPU_STICKY;
    const int number = code - (sticky ? DKS_GPU_STICKY : DKS_GPU_FAILED);
    const char *name = nullptr, *words = nullptr;
    if (functions.GetErrorName != nullptr) functions.GetErrorName(number, &name);
    if (functions.GetErrorString != nullptr) functions.GetErrorString(number, &words);
    std::snprintf(out, size, "the driver answered %d %s: %s%s", number, name != nullptr ? name : "",
                  words != nullptr ? words : "unknown",
                  sticky ? "; every later CUDA call of this process fails too" : "");
  }

  static bool sound(const dks_gpu_call& call) {
    if (call.step_count < 1 || call.step_count > DKS_GPU_MAX_STEPS || call.steps == nullptr) return false;
    if (call.slot_count < 0 || (call.slot_count > 0 && call.slots == nullptr)) return false;
    for (std::int32_t i = 0; i < call.step_count; ++i) {
      const dks_gpu_step& step = call.steps[i];
      if (step.kernel == nullptr || (step.sources == nullptr && step.kernel->cubin->input_count > 0)) return false;
      for (std::int32_t j = 0; j < step.kernel->cubin->input_count; ++j)
        if (step.sources[j].slot < -1 || step.sources[j].slot >= call.slot_count) return false;
    }
    return true;
  }

  static std::int64_t value(const dks_gpu_call& call, const dks_gpu_source& source) {
    return source.slot < 0 ? source.value : call.slots[source.slot];
  }

  // Whether every value is one that the program was compiled for.
  static std::int32_t check(const dks_gpu_call& call, const dks_gpu_step& step) {
    const dks_gpu_cubin& cubin = *step.kernel->cubin;
    for (std::int32_t i = 0; i < cubin.input_count; ++i) {
      const std::int64_t given = value(call, step.sources[i]);
      if (cubin.inputs[i].type == DKS_GPU_INT32 && (given < INT32_MIN || given > INT32_MAX)) return DKS_GPU_RANGE;
      if ((given & (cubin.inputs[i].divisor - 1)) != 0) return DKS_GPU_MISALIGNED;
    }
    return DKS_GPU_OK;
  }

  static bool times(const dks_gpu_call& call, const dks_gpu_step& step, const dks_gpu_factor* factors,
                    std::int32_t count, std::int64_t& product) {
    product = 1;
    for (std::int32_t i = 0; i < count; ++i) {
      std::int64_t blocks = factors[i].size;
      if (factors[i].input >= 0) {
        const std::int64_t given = value(call, step.sources[factors[i].input]);
        if (given < 0) return false;
        blocks = given / factors[i].size + (given % factors[i].size != 0 ? 1 : 0);
      }
      if (__builtin_mul_overflow(product, blocks, &product)) return false;
    }
    return true;
  }

  // The grid of a step, and the scratch memory that it needs.
  static std::int32_t shape(const dks_gpu_call& call, const dks_gpu_step& step, const dks_gpu_device& facts,
                            Prepared& out, std::int64_t& bytes) {
    const dks_gpu_cubin& cubin = *step.kernel->cubin;
    if (!times(call, step, cubin.x, cubin.x_count, out.grid[0]) ||
        !times(call, step, cubin.y, cubin.y_count, out.grid[1]) ||
        !times(call, step, cubin.z, cubin.z_count, out.grid[2]))
      return DKS_GPU_RANGE;
    const std::int64_t most = std::int64_t{cubin.resident} * facts.multiprocessors;
    if (most > 0 && out.grid[0] > most) out.grid[0] = most;
    if (out.grid[0] > INT32_MAX || out.grid[1] > 65535 || out.grid[2] > 65535) return DKS_GPU_RANGE;
    std::int64_t blocks = out.grid[0] * out.grid[1];  // below 2^47
    if (__builtin_mul_overflow(blocks, out.grid[2], &blocks) ||
        __builtin_mul_overflow(blocks, std::int64_t{cubin.scratch}, &bytes))
      return DKS_GPU_RANGE;
    return DKS_GPU_OK;
  }

  std::int32_t start(const dks_gpu_call& call, const dks_gpu_step& step, const Prepared& prepared) const {
    const dks_gpu_cubin& cubin = *step.kernel->cubin;
    std::int64_t values[DKS_GPU_MAX_INPUTS + 2];
    void* addresses[DKS_GPU_MAX_INPUTS + 2];
    for (std::int32_t i = 0; i < cubin.arguments; ++i) {
      values[i] = value(call, step.sources[i]);  // the first bytes of it are a smaller type's
      addresses[i] = &values[i];
    }
    // Two addresses of scratch memory end every kernel's parameters; the second one is of instruments that are off.
    values[cubin.arguments] =
        cubin.scratch > 0 ? static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(call.scratch)) : 0;
    values[cubin.arguments + 1] = 0;
    addresses[cubin.arguments] = &values[cubin.arguments];
    addresses[cubin.arguments + 1] = &values[cubin.arguments + 1];
    const int code = call_.LaunchKernel(
        prepared.function, static_cast<unsigned>(prepared.grid[0]), static_cast<unsigned>(prepared.grid[1]),
        static_cast<unsigned>(prepared.grid[2]), static_cast<unsigned>(cubin.warps) * 32, 1, 1,
        static_cast<unsigned>(cubin.shared), call.stream, addresses, nullptr);
    return code == success ? DKS_GPU_OK : failed(code);
  }

  // The context for a device that the caller has not found among those known: the current one if it is of this
  // device, else its primary one, which is what CUDA's runtime, and so PyTorch, uses.
  std::int32_t meet(Handle current, std::int32_t number, const Context* primary, const Context*& out) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int device = 0;
    if (const int code = call_.DeviceGet(&device, number)) return failed(code);
    Handle handle = nullptr;
    if (current != nullptr) {
      int own = 0;
      if (const int code = call_.CtxGetDevice(&own)) return failed(code);
      if (own == device) handle = current;
    }
    const bool retained = handle == nullptr;
    if (retained && primary != nullptr) {
      out = primary;
      return DKS_GPU_OK;
    }
    const std::int32_t count = count_.load(std::memory_order_relaxed);
    if (retained) {
      for (std::int32_t i = 0; i < count; ++i)  // by another thread, meanwhile
        if (contexts_[i].device == number && contexts_[i].primary.load(std::memory_order_relaxed)) {
          out = &contexts_[i];
          return DKS_GPU_OK;
        }
      if (const int code = call_.DevicePrimaryCtxRetain(&handle, device)) return failed(code);
    }
    for (std::int32_t i = 0; i < count; ++i)
      if (contexts_[i].handle == handle && contexts_[i].device == number) {
        if (retained) contexts_[i].primary.store(true, std::memory_order_relaxed);
        out = &contexts_[i];
        return DKS_GPU_OK;
      }
    if (count == DKS_GPU_MAX_CONTEXTS) return DKS_GPU_CONTEXTS;
    Context& made = contexts_[count];
    int major = 0, minor = 0;
    int code = call_.DeviceGetAttribute(&major, capability_major, device);
    if (code == success) code = call_.DeviceGetAttribute(&minor, capability_minor, device);
    if (code == success) code = call_.DeviceGetAttribute(&made.facts.multiprocessors, multiprocessor_count, device);
    if (code == success) code = call_.DeviceGetAttribute(&made.facts.shared, shared_memory_optin, device);
    if (code != success) return failed(code);
    made.facts.capability = major * 10 + minor;
    made.handle = handle;
    made.device = number;
    made.primary.store(retained, std::memory_order_relaxed);
    count_.store(count + 1, std::memory_order_release);
    out = &made;
    return DKS_GPU_OK;
  }

  // The function of a kernel in the context that is current, loaded by whoever asks first.
  std::int32_t find(dks_gpu_kernel& kernel, const Context& context, Handle& function) {
    const auto place = static_cast<std::size_t>(&context - contexts_);
    function = kernel.functions[place].load(std::memory_order_acquire);
    if (function != nullptr) return DKS_GPU_OK;
    const std::lock_guard<std::mutex> lock(mutex_);
    function = kernel.functions[place].load(std::memory_order_relaxed);
    if (function != nullptr) return DKS_GPU_OK;
    if (kernel.refused[place] != DKS_GPU_OK) return kernel.refused[place];
    const std::int32_t code = bring(*kernel.cubin, context, function);
    if (code == DKS_GPU_OK) kernel.functions[place].store(function, std::memory_order_release);
    else if (hopeless(code)) kernel.refused[place] = code;
    return code;
  }

  // Whether loading would end the same way again.
  static bool hopeless(std::int32_t code) {
    return code < DKS_GPU_FAILED || code == failed(invalid_image) || code == failed(no_binary_for_gpu) ||
           code == failed(not_found);
  }

  std::int32_t bring(const dks_gpu_cubin& cubin, const Context& context, Handle& function) const {
    if (!runs_on(cubin.arch, context.facts.capability)) return DKS_GPU_OTHER_ARCH;
    if (cubin.shared > context.facts.shared) return DKS_GPU_SHARED;
    // Loading may allocate, which a thread that captures a graph is not allowed to, although it does the graph no harm.
    int mode = capture_relaxed;
    if (const int code = call_.ThreadExchangeStreamCaptureMode(&mode)) return failed(code);
    Handle module = nullptr;
    int code = call_.ModuleLoadData(&module, cubin.elf);
    if (code == success) {
      code = call_.ModuleGetFunction(&function, module, cubin.function);
      if (code == success && cubin.shared > shared_without_asking)
        code = call_.FuncSetAttribute(function, max_dynamic_shared_size, cubin.shared);
      // By default the driver loads a function's code with its first launch, which may have to wait for the device.
      if (code == success && call_.FuncLoad != nullptr) code = call_.FuncLoad(function);
      if (code != success) call_.ModuleUnload(module);
    }
    call_.ThreadExchangeStreamCaptureMode(&mode);
    if (code == success) return DKS_GPU_OK;
    function = nullptr;
    return failed(code);
  }

  Functions call_;
  std::int32_t devices_ = 0;
  std::atomic<bool> ready_{false};
  std::mutex mutex_;  // whoever opens, meets a context or loads
  Context contexts_[DKS_GPU_MAX_CONTEXTS];
  std::atomic<std::int32_t> count_{0};
};

inline Driver& driver() {
  static Driver only;
  return only;
}

// Null if the description contradicts itself or memory ran out.
inline dks_gpu_kernel* add(const dks_gpu_cubin* cubin) {
  if (cubin == nullptr || !coherent(*cubin)) return nullptr;
  auto* made = new (std::nothrow) dks_gpu_kernel();
  if (made != nullptr) made->cubin = cubin;
  return made;
}

}  // namespace dks::gpu

#endif
