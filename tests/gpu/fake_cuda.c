/* A driver library that launches nothing: it notes what it is asked, and answers as a test wants it to.
 *
 * A function's name says what its parameters are: after "__" a letter each, 'p' and 'l' of 8 bytes, 'i' and 'f' of 4.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
enum { MOST = 16384, NUMBERS = 64, FUNCTIONS = 512 };

struct call {
  char what[12];
  char name[100];
  int32_t count;
  int64_t numbers[NUMBERS];
};

/* What it answers. */
EXPORT int fake_init = 0, fake_devices = 2, fake_major = 9, fake_minor = 0, fake_multiprocessors = 132;
EXPORT int fake_shared = 232448, fake_load = 0, fake_function = 0, fake_launch = 0;

static struct call calls[MOST];
static int called;
static struct {
  char name[100];
  void* context;
} functions[FUNCTIONS];
static int functions_made = 1;
static __thread void* stack[8];
static __thread int depth;
static __thread int capture_mode;

EXPORT int fake_calls(void) { return __atomic_load_n(&called, __ATOMIC_ACQUIRE); }
EXPORT const struct call* fake_call(int i) { return &calls[i]; }
EXPORT void fake_forget(void) { __atomic_store_n(&called, 0, __ATOMIC_RELEASE); }
EXPORT void* fake_primary(int device) { return (void*)(uintptr_t)(0x1000 + device); }

static struct call* note(const char* what, const char* name) {
  const int i = __atomic_fetch_add(&called, 1, __ATOMIC_ACQ_REL);
  if (i >= MOST) abort();
  struct call* made = &calls[i];
  snprintf(made->what, sizeof made->what, "%s", what);
  snprintf(made->name, sizeof made->name, "%s", name);
  made->count = 0;
  return made;
}

static void number(struct call* made, int64_t value) { made->numbers[made->count++] = value; }
static void* current(void) { return depth > 0 ? stack[depth - 1] : NULL; }

EXPORT int cuInit(unsigned flags) { return flags != 0 ? 1 : fake_init; }
EXPORT int cuDeviceGetCount(int* count) {
  *count = fake_devices;
  return 0;
}
EXPORT int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < fake_devices ? 0 : 101;
}
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 16: *value = fake_multiprocessors; return 0;
    case 75: *value = fake_major; return 0;
    case 76: *value = fake_minor; return 0;
    case 97: *value = fake_shared; return 0;
    default: return 1;
  }
}
EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = fake_primary(device);
  number(note("retain", ""), device);
  return 0;
}
EXPORT int cuCtxGetCurrent(void** context) {
  *context = current();
  return 0;
}
EXPORT int cuCtxGetDevice(int* device) {
  if (current() == NULL) return 201;
  *device = (int)((uintptr_t)current() & 0xff);
  return 0;
}
EXPORT int cuCtxPushCurrent_v2(void* context) {
  if (depth == 8) return 1;
  stack[depth++] = context;
  return 0;
}
EXPORT int cuCtxPopCurrent_v2(void** context) {
  if (depth == 0) return 201;
  *context = stack[--depth];
  return 0;
}
EXPORT int cuModuleLoadData(void** module, const void* image) {
  if (fake_load != 0) {
    number(note("load", "refused"), fake_load);
    return fake_load;
  }
  struct call* made = note("load", "");
  number(made, (int64_t)(uintptr_t)current());
  number(made, (int64_t)(uintptr_t)image);
  number(made, capture_mode);
  *module = (void*)image;
  return memcmp(image, "\177ELF", 4) == 0 && current() != NULL ? 0 : 200;
}
EXPORT int cuModuleUnload(void* module) {
  number(note("unload", ""), (int64_t)(uintptr_t)module);
  return 0;
}
EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module;
  if (fake_function != 0) return fake_function;
  const int i = __atomic_fetch_add(&functions_made, 1, __ATOMIC_ACQ_REL);
  if (i >= FUNCTIONS) abort();
  snprintf(functions[i].name, sizeof functions[i].name, "%s", name);
  functions[i].context = current();
  *function = (void*)(uintptr_t)i;
  return 0;
}
EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
  struct call* made = note("attribute", functions[(uintptr_t)function].name);
  number(made, attribute);
  number(made, value);
  return 0;
}
EXPORT int cuFuncLoad(void* function) {
  note("funcload", functions[(uintptr_t)function].name);
  return 0;
}
EXPORT int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return 0;
}
/* What the parameters of a function are whose name doesn't say it. */
static struct { char name[200], types[64]; } signatures[16];
static int signatures_made;
EXPORT void fake_signature(const char* name, const char* types) {
  if (signatures_made == 16) abort();
  snprintf(signatures[signatures_made].name, sizeof signatures[0].name, "%s", name);
  snprintf(signatures[signatures_made++].types, sizeof signatures[0].types, "%s", types);
}
static const char* types_of(const char* name) {
  for (int i = 0; i < signatures_made; ++i)
    if (strcmp(signatures[i].name, name) == 0) return signatures[i].types;
  const char* types = strstr(name, "__");
  return types == NULL ? "" : types + 2;
}
EXPORT int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void* stream, void** parameters, void** extra) {
  const uintptr_t which = (uintptr_t)function;
  if (which == 0 || which >= FUNCTIONS || extra != NULL) return 1;
  if (functions[which].context != current()) return 400;
  struct call* made = note("launch", functions[which].name);
  const int64_t numbers[] = {x, y, z, bx, by, bz, shared, (int64_t)(uintptr_t)stream, (int64_t)(uintptr_t)current()};
  for (int i = 0; i < 9; ++i) number(made, numbers[i]);
  const char* types = types_of(functions[which].name);
  for (int i = 0; types[i] != 0; ++i) {
    int64_t wide = 0;
    int32_t narrow = 0;
    if (types[i] == 'p' || types[i] == 'l') {
      memcpy(&wide, parameters[i], sizeof wide);
    } else {
      memcpy(&narrow, parameters[i], sizeof narrow);
      wide = narrow;
    }
    number(made, wide);
  }
  return fake_launch;
}
EXPORT int cuGetErrorName(int code, const char** name) {
  *name = code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_OF_A_KIND";
  return 0;
}
EXPORT int cuGetErrorString(int code, const char** text) {
  *text = code == 700 ? "an illegal memory access was encountered" : "of a kind";
  return 0;
}
