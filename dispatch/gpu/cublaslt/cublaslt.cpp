// See cublaslt.h. What is declared here of cuBLASLt is its documented C interface, versions 12 and 13.
#include "cublaslt.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <new>

#define DKS_EXPORT __attribute__((visibility("default")))

namespace {

using Status = int;
struct Layout {
  uint64_t data[8];
};
struct Operation {
  uint64_t data[32];
};
struct Preference {
  uint64_t data[8];
};
struct Algorithm {
  uint64_t data[8];
};
struct Result {
  Algorithm algorithm;
  size_t workspace;
  Status status;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Algorithm) == DKS_LT_ALGORITHM && sizeof(Result) == 96, "as cublasLt.h has them");

enum Attribute { kTransA = 3, kTransB = 4, kEpilogue = 7, kBias = 8, kScaleA = 17, kScaleB = 18, kFast = 25, kBiasType = 26 };
enum Preferred { kWorkspace = 1, kAlignA = 5, kAlignB = 6, kAlignC = 7, kAlignD = 8 };
constexpr int kCompute32F = 68, kCompute32I = 72, kNotTransposed = 0, kTransposed = 1;

// Everything that is called, by its exported name.
struct Functions {
  Status (*cublasLtCreate)(void** handle);
  Status (*cublasLtDestroy)(void* handle);
  size_t (*cublasLtGetVersion)();
  const char* (*cublasLtGetStatusName)(Status);
  Status (*cublasLtMatmulDescInit_internal)(Operation*, size_t size, int compute, int scale);
  Status (*cublasLtMatmulDescSetAttribute)(Operation*, int, const void*, size_t);
  Status (*cublasLtMatrixLayoutInit_internal)(Layout*, size_t size, int type, uint64_t rows, uint64_t columns,
                                              int64_t leading);
  Status (*cublasLtMatmulPreferenceInit_internal)(Preference*, size_t size);
  Status (*cublasLtMatmulPreferenceSetAttribute)(Preference*, int, const void*, size_t);
  Status (*cublasLtMatmulAlgoGetHeuristic)(void*, Operation*, Layout*, Layout*, Layout*, Layout*, Preference*, int,
                                           Result*, int*);
  Status (*cublasLtMatmulAlgoCheck)(void*, Operation*, Layout*, Layout*, Layout*, Layout*, const Algorithm*, Result*);
  Status (*cublasLtMatmul)(void*, Operation*, const void* alpha, const void*, Layout*, const void*, Layout*,
                           const void* beta, const void*, Layout*, void*, Layout*, const Algorithm*, void*, size_t,
                           void* stream);
};

struct Why {
  char* text;
  size_t room;

  template <class... Values>
  int say(const char* form, Values... values) const {
    if (text != nullptr && room != 0) std::snprintf(text, room, form, values...);
    return -1;
  }
};

// The driver's context of a device, as the current one of this thread for as long as this lives. Where there is no
// driver, there is none to change.
struct Context {
  using Get = int (*)(void**);
  using Set = int (*)(void*);

  static void* current() {
    void* found = nullptr;
    const auto get = reinterpret_cast<Get>(of_driver("cuCtxGetCurrent"));
    return get != nullptr && get(&found) == 0 ? found : nullptr;
  }

  explicit Context(void* wanted) : before_(wanted == nullptr ? nullptr : current()), changed_(before_ != wanted) {
    if (changed_) set(wanted);
  }
  ~Context() {
    if (changed_) set(before_);
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

 private:
  void* before_;
  bool changed_;

  static void set(void* context) {
    const auto change = reinterpret_cast<Set>(of_driver("cuCtxSetCurrent"));
    if (change != nullptr) change(context);
  }
  static void* of_driver(const char* name) {
    static void* const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    return driver == nullptr ? nullptr : dlsym(driver, name);
  }
};

}  // namespace

struct dks_lt {
  void* library;
  void* handle;
  void* context;
  Functions call;
};

struct dks_lt_linear {
  // Of numbers of rows, by their remainder: how much workspace they need, plus 1, or 0 where they are refused.
  static constexpr int kKnown = 256;
  const dks_lt* lt;
  dks_lt_problem problem;
  unsigned char algorithm[DKS_LT_ALGORITHM];
  const void *weight, *bias;
  int64_t device;
  mutable std::atomic<uint64_t> known[kKnown];  // rows in the upper half; 0 is an empty one
};

namespace {

int refused(const dks_lt* lt, Status status, const char* what, Why why) {
  const char* name = lt->call.cublasLtGetStatusName(status);
  return why.say("%s: %s (%d)", what, name == nullptr ? "an unknown status" : name, status);
}

bool find(void* library, Functions* call, Why why) {
#define DKS_FIND(name)                                                                 \
  call->name = reinterpret_cast<decltype(call->name)>(dlsym(library, #name));          \
  if (call->name == nullptr) return why.say("libcublasLt has no function " #name), false;
  DKS_FIND(cublasLtCreate)
  DKS_FIND(cublasLtDestroy)
  DKS_FIND(cublasLtGetVersion)
  DKS_FIND(cublasLtGetStatusName)
  DKS_FIND(cublasLtMatmulDescInit_internal)
  DKS_FIND(cublasLtMatmulDescSetAttribute)
  DKS_FIND(cublasLtMatrixLayoutInit_internal)
  DKS_FIND(cublasLtMatmulPreferenceInit_internal)
  DKS_FIND(cublasLtMatmulPreferenceSetAttribute)
  DKS_FIND(cublasLtMatmulAlgoGetHeuristic)
  DKS_FIND(cublasLtMatmulAlgoCheck)
  DKS_FIND(cublasLtMatmul)
#undef DKS_FIND
  return true;
}

bool odd(uint32_t align) { return align == 0 || (align & (align - 1)) != 0; }

// Why a problem can't be put to cuBLASLt at all, or null.
const char* objection(const dks_lt_problem& p) {
  const bool fp8 = p.type == DKS_LT_FLOAT8_E4M3, int8 = p.type == DKS_LT_INT8;
  const bool wide = p.type == DKS_LT_BFLOAT16 || p.type == DKS_LT_FLOAT16;
  if (!fp8 && !int8 && !wide) return "type: expected bfloat16, float16, fp8 or int8";
  if (wide && p.out != p.type) return "out: expected the type of x";
  if (fp8 && p.out != DKS_LT_BFLOAT16 && p.out != DKS_LT_FLOAT16) return "out: expected a 16-bit type for fp8";
  if (int8 && p.out != DKS_LT_INT32) return "out: expected int32 for int8";
  if (int8 && (p.bias != 0 || p.epilogue != DKS_LT_NONE)) return "int8: expected no bias and no epilogue";
  if (!fp8 && (p.scales != 0 || p.fast != 0)) return "scales and fast sums: expected fp8";
  if (p.epilogue != DKS_LT_NONE && p.epilogue != DKS_LT_RELU && p.epilogue != DKS_LT_GELU_TANH &&
      p.epilogue != DKS_LT_ADD)
    return "epilogue: expected none, relu, gelu_tanh or add";
  if (p.m < 1 || p.n < 1 || p.k < 1) return "m, n, k: expected at least 1";
  if (p.ldx < p.k || p.ldw < p.k || p.ldy < p.n || (p.epilogue == DKS_LT_ADD && p.ldr < p.n))
    return "distances of rows: expected no less than a row";
  if (odd(p.align_x) || odd(p.align_w) || odd(p.align_r) || odd(p.align_y) || odd(p.align_b))
    return "alignments: expected powers of two";
  return nullptr;
}

// A problem in cuBLASLt's words. Its matrices are column-major, so y^T = weight x^T is what it computes: A is the
// weight, stored as (k, n) and transposed, which is also the one form that fp8 and int8 have; B is x as (k, m).
struct Described {
  Operation operation;
  Layout a, b, c, d;

  int make(const dks_lt* lt, const dks_lt_problem& p, const dks_lt_call& call, Why why) {
    if (const char* text = objection(p)) return why.say("%s", text);
    const bool int8 = p.type == DKS_LT_INT8, adds = p.epilogue == DKS_LT_ADD;
    const int compute = int8 ? kCompute32I : kCompute32F, scale = int8 ? DKS_LT_INT32 : DKS_LT_FLOAT32;
    const Status status =
        lt->call.cublasLtMatmulDescInit_internal(&operation, sizeof operation, compute, scale);
    if (status != 0) return refused(lt, status, "cublasLtMatmulDescInit", why);
    if (layout(lt, &a, p.type, p.k, p.n, p.ldw, why) || layout(lt, &b, p.type, p.k, p.m, p.ldx, why) ||
        layout(lt, &c, p.out, p.n, p.m, adds ? p.ldr : p.ldy, why) || layout(lt, &d, p.out, p.n, p.m, p.ldy, why))
      return -1;
    const int32_t transposed = kTransposed, plain = kNotTransposed;
    if (set(lt, kTransA, transposed, why) || set(lt, kTransB, plain, why)) return -1;
    uint32_t epilogue = p.epilogue == DKS_LT_RELU ? 2 : p.epilogue == DKS_LT_GELU_TANH ? 32 : 0;
    if (p.bias != 0) epilogue |= 4;
    if (epilogue == 0) epilogue = 1;
    if (set(lt, kEpilogue, epilogue, why)) return -1;
    if (p.bias != 0 && (set(lt, kBiasType, p.out, why) || set(lt, kBias, call.bias, why))) return -1;
    if (p.scales != 0 && (set(lt, kScaleA, call.weight_scale, why) || set(lt, kScaleB, call.x_scale, why))) return -1;
    const int8_t fast = 1;
    return p.fast != 0 ? set(lt, kFast, fast, why) : 0;
  }

  template <class Value>
  int set(const dks_lt* lt, Attribute attribute, const Value& value, Why why) {
    const Status status = lt->call.cublasLtMatmulDescSetAttribute(&operation, attribute, &value, sizeof value);
    return status == 0 ? 0 : refused(lt, status, "cublasLtMatmulDescSetAttribute", why);
  }

  static int layout(const dks_lt* lt, Layout* made, int type, int64_t rows, int64_t columns, int64_t leading, Why why) {
    const Status status = lt->call.cublasLtMatrixLayoutInit_internal(
        made, sizeof *made, type, static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), leading);
    return status == 0 ? 0 : refused(lt, status, "cublasLtMatrixLayoutInit", why);
  }
};

// Addresses that say no more than how they are aligned: the heuristic looks at the bias's alone, and follows none.
dks_lt_call stand_in(const dks_lt_problem& p) {
  const auto address = [](uintptr_t align) { return reinterpret_cast<void*>(align); };
  dks_lt_call call{};
  call.bias = address(p.align_b);
  call.x_scale = call.weight_scale = static_cast<float*>(address(16));
  return call;
}

int prefer(const dks_lt* lt, Preference* preference, const dks_lt_problem& p, Why why) {
  Status status = lt->call.cublasLtMatmulPreferenceInit_internal(preference, sizeof *preference);
  const auto set = [&](Preferred name, const auto& value) {
    if (status == 0) status = lt->call.cublasLtMatmulPreferenceSetAttribute(preference, name, &value, sizeof value);
  };
  set(kWorkspace, p.workspace);
  set(kAlignA, p.align_w);
  set(kAlignB, p.align_x);
  set(kAlignC, p.epilogue == DKS_LT_ADD ? p.align_r : p.align_y);
  set(kAlignD, p.align_y);
  return status == 0 ? 0 : refused(lt, status, "cublasLtMatmulPreferenceSetAttribute", why);
}

void copy(const Algorithm& algorithm, const Result& result, dks_lt_found* found) {
  std::memcpy(found->algorithm, &algorithm, sizeof algorithm);
  found->workspace = result.workspace;
  found->waves = result.waves;
  found->unused = 0;
}

// What an address lacks to be what the problem says, or null.
const char* missing(const dks_lt_problem& p, const dks_lt_call& c) {
  const auto off = [](const void* address, uint32_t align) {
    return address == nullptr || reinterpret_cast<uintptr_t>(address) % align != 0;
  };
  if (off(c.x, p.align_x)) return "x";
  if (off(c.weight, p.align_w)) return "weight";
  if (off(c.y, p.align_y)) return "y";
  if (p.bias != 0 && off(c.bias, p.align_b)) return "bias";
  if (p.epilogue == DKS_LT_ADD && off(c.residual, p.align_r)) return "residual";
  if (p.scales != 0 && (off(c.x_scale, 4) || off(c.weight_scale, 4))) return "scales";
  return nullptr;
}

constexpr int kMost = 256;

// The status of the call; a negative one where it can't even be described.
int matmul(const dks_lt* lt, const dks_lt_problem& p, const unsigned char* bytes, const dks_lt_call& call, Why why) {
  Described it{};
  if (it.make(lt, p, call, why)) return -1;
  Algorithm algorithm;
  std::memcpy(&algorithm, bytes, sizeof algorithm);
  const bool int8 = p.type == DKS_LT_INT8, adds = p.epilogue == DKS_LT_ADD;
  const float one = 1.0f, add = adds ? 1.0f : 0.0f;
  const int32_t integer_one = 1, integer_zero = 0;
  const void* alpha = int8 ? static_cast<const void*>(&integer_one) : &one;
  const void* beta = int8 ? static_cast<const void*>(&integer_zero) : &add;
  return lt->call.cublasLtMatmul(lt->handle, &it.operation, alpha, call.weight, &it.a, call.x, &it.b, beta,
                                 adds ? call.residual : call.y, &it.c, call.y, &it.d, &algorithm, call.workspace,
                                 call.workspace_bytes, call.stream);
}

void* address(int64_t value) { return reinterpret_cast<void*>(static_cast<uintptr_t>(value)); }

// A compiled call in this library's words. Returns a dks_lt_code.
int understand(const dks_lt_linear& it, const int64_t* values, dks_lt_problem* p, dks_lt_call* call) {
  *p = it.problem;
  p->m = values[4];
  *call = {};
  call->x = address(values[0]);
  call->weight = it.weight;
  call->bias = it.bias;
  call->residual = address(values[2]);
  call->y = address(values[3]);
  call->workspace = address(values[8]);
  call->workspace_bytes = static_cast<uint64_t>(values[9]);
  call->stream = address(values[10]);
  if (values[11] != it.device) return DKS_LT_DEVICE;
  if (p->m < 0 || p->m > INT32_MAX) return DKS_LT_REFUSED;
  const bool apart = values[5] != p->ldx || values[7] != p->ldy || (p->epilogue == DKS_LT_ADD && values[6] != p->ldr);
  return p->m > 0 && (apart || missing(*p, *call) != nullptr) ? DKS_LT_MISALIGNED : DKS_LT_OK;
}

}  // namespace

#ifndef DKS_SOURCE
#error "define DKS_SOURCE as a string: the digest of these sources"
#endif

extern "C" {

DKS_EXPORT extern const char dks_lt_source[];
const char dks_lt_source[] = DKS_SOURCE;

DKS_EXPORT dks_lt* dks_lt_open(const char* path, char* text, size_t room) {
  const Why why{text, room};
  void* library = nullptr;
  if (path != nullptr) {
    library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  } else {
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
      if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  if (library == nullptr) {
    const char* said = dlerror();
    why.say("no cuBLASLt: %s", said == nullptr ? "it can't be loaded" : said);
    return nullptr;
  }
  Functions call{};
  void* handle = nullptr;
  if (find(library, &call, why)) {
    const Status status = call.cublasLtCreate(&handle);
    if (status == 0) {
      auto* lt = new (std::nothrow) dks_lt{library, handle, Context::current(), call};
      if (lt != nullptr) return lt;
      why.say("out of memory");
      call.cublasLtDestroy(handle);
    } else {
      const dks_lt failed{library, nullptr, nullptr, call};
      refused(&failed, status, "cublasLtCreate", why);
    }
  }
  dlclose(library);
  return nullptr;
}

DKS_EXPORT void dks_lt_close(dks_lt* lt) {
  if (lt == nullptr) return;
  lt->call.cublasLtDestroy(lt->handle);
  dlclose(lt->library);
  delete lt;
}

DKS_EXPORT uint64_t dks_lt_version(const dks_lt* lt) { return lt->call.cublasLtGetVersion(); }

DKS_EXPORT int dks_lt_search(const dks_lt* lt, const dks_lt_problem* p, dks_lt_found* found, int most, char* text,
                             size_t room) {
  const Why why{text, room};
  Described it{};
  Preference preference{};
  if (most < 1 || most > kMost) return why.say("most: expected 1 to %d, found %d", kMost, most);
  if (it.make(lt, *p, stand_in(*p), why) || prefer(lt, &preference, *p, why)) return -1;
  Result results[kMost] = {};  // zeros, so that bytes which cuBLASLt leaves alone are the same each time
  int count = 0;
  const Status status = lt->call.cublasLtMatmulAlgoGetHeuristic(lt->handle, &it.operation, &it.a, &it.b, &it.c, &it.d,
                                                                &preference, most, results, &count);
  if (status != 0) return refused(lt, status, "cublasLtMatmulAlgoGetHeuristic", why);
  int usable = 0;
  for (int i = 0; i < count && i < most; ++i)
    if (results[i].status == 0 && results[i].workspace <= p->workspace)
      copy(results[i].algorithm, results[i], &found[usable++]);
  return usable;
}

DKS_EXPORT int dks_lt_check(const dks_lt* lt, const dks_lt_problem* p, const unsigned char* bytes,
                            dks_lt_found* found, char* text, size_t room) {
  const Why why{text, room};
  Described it{};
  if (it.make(lt, *p, stand_in(*p), why)) return -1;
  Algorithm algorithm;
  std::memcpy(&algorithm, bytes, sizeof algorithm);
  Result result{};
  const Status status = lt->call.cublasLtMatmulAlgoCheck(lt->handle, &it.operation, &it.a, &it.b, &it.c, &it.d,
                                                         &algorithm, &result);
  if (status != 0) return refused(lt, status, "cublasLtMatmulAlgoCheck", why);
  if (result.workspace > p->workspace)
    return why.say("workspace: the algorithm needs %llu bytes, the problem gives %llu",
                   static_cast<unsigned long long>(result.workspace), static_cast<unsigned long long>(p->workspace));
  copy(algorithm, result, found);
  return 0;
}

DKS_EXPORT int dks_lt_run(const dks_lt* lt, const dks_lt_problem* p, const unsigned char* bytes,
                          const dks_lt_call* call, char* text, size_t room) {
  const Why why{text, room};
  if (const char* said = objection(*p)) return why.say("%s", said);
  if (const char* name = missing(*p, *call)) return why.say("%s: null, or not as aligned as the problem says", name);
  const Status status = matmul(lt, *p, bytes, *call, why);
  return status > 0 ? refused(lt, status, "cublasLtMatmul", why) : status;
}

DKS_EXPORT dks_lt_linear* dks_lt_linear_make(const dks_lt* lt, const dks_lt_problem* p, const unsigned char* algorithm,
                                             const void* weight, const void* bias, int64_t device) {
  auto* made = new (std::nothrow) dks_lt_linear{};
  if (made == nullptr) return nullptr;
  made->lt = lt;
  made->problem = *p;
  std::memcpy(made->algorithm, algorithm, sizeof made->algorithm);
  made->weight = weight;
  made->bias = bias;
  made->device = device;
  return made;
}

DKS_EXPORT void dks_lt_linear_free(dks_lt_linear* linear) { delete linear; }

DKS_EXPORT int64_t dks_lt_linear_workspace(const void* linear, const int64_t* values) {
  const auto& it = *static_cast<const dks_lt_linear*>(linear);
  dks_lt_problem p;
  dks_lt_call call;
  if (const int code = understand(it, values, &p, &call)) return -code;
  if (p.m == 0) return 0;
  const auto rows = static_cast<uint64_t>(p.m);
  auto& known = it.known[rows % dks_lt_linear::kKnown];
  uint64_t found = known.load(std::memory_order_relaxed);
  if (found >> 32 != rows) {
    const Context on(it.lt->context);
    dks_lt_found checked;
    const int refusal = dks_lt_check(it.lt, &p, it.algorithm, &checked, nullptr, 0);
    found = rows << 32 | (refusal != 0 ? 0 : checked.workspace + 1);
    known.store(found, std::memory_order_relaxed);
  }
  const auto needed = static_cast<int64_t>(found & UINT32_MAX);
  return needed == 0 ? -DKS_LT_REFUSED : needed - 1;
}

DKS_EXPORT int dks_lt_linear_run(const void* linear, const int64_t* values) {
  const auto& it = *static_cast<const dks_lt_linear*>(linear);
  dks_lt_problem p;
  dks_lt_call call;
  if (const int code = understand(it, values, &p, &call)) return code;
  if (p.m == 0) return DKS_LT_OK;
  const Context on(it.lt->context);
  const Status status = matmul(it.lt, p, it.algorithm, call, Why{nullptr, 0});
  return status == 0 ? DKS_LT_OK : status < 0 ? DKS_LT_REFUSED : DKS_LT_FAILED + status;
}

}  // extern "C"
