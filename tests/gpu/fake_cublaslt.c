/* Stands for libcublasLt: keeps what it is told in the descriptors, and writes down what it is asked to do. */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "cublaslt.h" /* it must be plain C */

#define API __attribute__((visibility("default")))

struct layout { int64_t type, rows, columns, leading, unused[4]; };
struct operation { int64_t attribute[32]; }; /* by number; 0 and 1 are the compute and scale types */
struct preference { int64_t attribute[8]; };
struct algorithm { int64_t data[8]; };
struct result { struct algorithm algorithm; size_t workspace; int status; float waves; int reserved[4]; };

static char log_text[1 << 16];
static char failing[64];
static int failing_status;

API const size_t fake_sizes[] = {sizeof(struct dks_lt_problem), sizeof(struct dks_lt_found), sizeof(struct dks_lt_call)};
API const char* fake_log(void) { return log_text; }
API void fake_reset(void) { log_text[0] = failing[0] = 0; }
API void fake_fail(const char* function, int status) {
  snprintf(failing, sizeof failing, "%s", function);
  failing_status = status;
}

static void say(const char* form, ...) {
  const size_t length = strlen(log_text);
  va_list values;
  va_start(values, form);
  vsnprintf(log_text + length, sizeof log_text - length, form, values);
  va_end(values);
}

static int status_of(const char* function) { return strcmp(function, failing) == 0 ? failing_status : 0; }

static int64_t number(const void* value, size_t size) {
  int64_t made = 0;
  memcpy(&made, value, size);
  return made;
}

API int cublasLtCreate(void** handle) {
  *handle = (void*)0x1234;
  return status_of("cublasLtCreate");
}
API int cublasLtDestroy(void* handle) { return say("destroy %p\n", handle), 0; }
API size_t cublasLtGetVersion(void) { return 130100; }
API const char* cublasLtGetStatusName(int status) { return status == 15 ? "CUBLAS_STATUS_NOT_SUPPORTED" : NULL; }

API int cublasLtMatmulDescInit_internal(struct operation* made, size_t size, int compute, int scale) {
  if (size != sizeof *made) return 3;
  memset(made, 0, sizeof *made);
  made->attribute[0] = compute, made->attribute[1] = scale;
  return status_of("cublasLtMatmulDescInit");
}
API int cublasLtMatmulDescSetAttribute(struct operation* to, int name, const void* value, size_t size) {
  static const int sizes[32] = {[3] = 4, [4] = 4, [7] = 4, [8] = 8, [17] = 8, [18] = 8, [25] = 1, [26] = 4};
  if (name < 0 || name > 31 || sizes[name] != (int)size) return 7;
  to->attribute[name] = number(value, size);
  return status_of("cublasLtMatmulDescSetAttribute");
}
API int cublasLtMatrixLayoutInit_internal(struct layout* made, size_t size, int type, uint64_t rows, uint64_t columns,
                                          int64_t leading) {
  if (size != 64) return 3;
  made->type = type, made->rows = (int64_t)rows, made->columns = (int64_t)columns, made->leading = leading;
  return status_of("cublasLtMatrixLayoutInit");
}
API int cublasLtMatmulPreferenceInit_internal(struct preference* made, size_t size) {
  if (size != 64) return 3;
  memset(made, 0, 64);
  return 0;
}
API int cublasLtMatmulPreferenceSetAttribute(struct preference* to, int name, const void* value, size_t size) {
  if (size != (name == 1 ? 8 : 4)) return 7;
  to->attribute[name % 8] = number(value, size); /* 8, the last, lies where 0 would, which is not set */
  return 0;
}

static void describe(const struct operation* it, const struct layout* a, const struct layout* b,
                     const struct layout* c, const struct layout* d) {
  const struct layout* layouts[] = {a, b, c, d};
  say("compute %d scale %d\n", (int)it->attribute[0], (int)it->attribute[1]);
  for (int name = 2; name < 32; ++name)
    if (it->attribute[name]) say("set %d = %lld\n", name, (long long)it->attribute[name]);
  for (int i = 0; i < 4; ++i)
    say("%c: type %d, %lld x %lld, leading %lld\n", "ABCD"[i], (int)layouts[i]->type, (long long)layouts[i]->rows,
        (long long)layouts[i]->columns, (long long)layouts[i]->leading);
}

API int cublasLtMatmulAlgoGetHeuristic(void* handle, struct operation* it, struct layout* a, struct layout* b,
                                       struct layout* c, struct layout* d, struct preference* preference, int most,
                                       struct result* results, int* count) {
  say("heuristic %p most %d\n", handle, most);
  describe(it, a, b, c, d);
  say("workspace %lld, alignments A %lld B %lld C %lld D %lld\n", (long long)preference->attribute[1],
      (long long)preference->attribute[5], (long long)preference->attribute[6], (long long)preference->attribute[7],
      (long long)preference->attribute[0]);
  const int64_t first[] = {71, 66, 99, 71, 67}; /* the fourth is the first again, the third does not work */
  *count = most < 5 ? most : 5;
  for (int i = 0; i < *count; ++i) {
    results[i].algorithm.data[0] = first[i];
    results[i].algorithm.data[7] = -1;
    results[i].workspace = first[i] == 67 ? 1 << 30 : first[i] * 1024;
    results[i].status = first[i] == 99 ? 15 : 0;
    results[i].waves = (float)i + 0.5f;
  }
  return status_of("cublasLtMatmulAlgoGetHeuristic");
}

static void name_algorithm(const struct algorithm* algorithm) {
  say("algorithm %lld ... %lld\n", (long long)algorithm->data[0], (long long)algorithm->data[7]);
}

API int cublasLtMatmulAlgoCheck(void* handle, struct operation* it, struct layout* a, struct layout* b,
                                struct layout* c, struct layout* d, const struct algorithm* algorithm,
                                struct result* result) {
  say("check %p\n", handle);
  describe(it, a, b, c, d);
  name_algorithm(algorithm);
  result->workspace = 4096;
  result->waves = 2.0f;
  return algorithm->data[0] == 666 ? 15 : status_of("cublasLtMatmulAlgoCheck");
}

API int cublasLtMatmul(void* handle, struct operation* it, const void* alpha, const void* A, struct layout* a,
                       const void* B, struct layout* b, const void* beta, const void* C, struct layout* c, void* D,
                       struct layout* d, const struct algorithm* algorithm, void* workspace, size_t bytes,
                       void* stream) {
  say("matmul %p\n", handle);
  describe(it, a, b, c, d);
  if (it->attribute[1] == 10)
    say("alpha %d beta %d\n", *(const int*)alpha, *(const int*)beta);
  else
    say("alpha %g beta %g\n", *(const float*)alpha, *(const float*)beta);
  say("A %p B %p C %p D %p\n", A, B, C, D);
  name_algorithm(algorithm);
  say("workspace %p %zu stream %p\n", workspace, bytes, stream);
  return status_of("cublasLtMatmul");
}
