/* Stands for one compiled CUTLASS kernel: the same functions, on the CPU, and what it was told. Made with
 *   -DSYMBOL=dks_cutlass_... -DDIGEST="..." and, for what the configuration's name says, -DALIGN=16 -DIN=2 -DADDS=0 */
#include <string.h>

#include "abi.h"

#define API __attribute__((visibility("default")))
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

struct told {
  struct dks_cutlass_linear linear;
  struct dks_cutlass_call call;
  int64_t asked, runs, status, room; /* how often each function was called, and what it answers */
};

API const char JOIN(SYMBOL, _source)[] = DIGEST;
API struct told JOIN(SYMBOL, _told);
#define told JOIN(SYMBOL, _told)

static float as_float(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float made;
  memcpy(&made, &wide, sizeof made);
  return made;
}

static uint16_t as_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float element(const void* from, int64_t i) {
  return IN == 1 ? (float)((const int8_t*)from)[i] : as_float(((const uint16_t*)from)[i]);
}

static int objection(const struct dks_cutlass_linear* w, const struct dks_cutlass_call* c) {
  const uintptr_t bits = (uintptr_t)w->weight | (uintptr_t)w->bias | (uintptr_t)c->x | (uintptr_t)c->residual |
                         (uintptr_t)c->y | (uintptr_t)(w->k * IN) | (uintptr_t)(c->ldx * IN) | (uintptr_t)(w->n * 2);
  if (bits % ALIGN) return DKS_CUTLASS_MISALIGNED;
  if (ADDS != (c->residual != NULL) || (IN == 1) != (c->x_scale != NULL)) return DKS_CUTLASS_LACKS;
  return c->ldx < w->k || c->ldy < w->n || w->ldw < w->k || c->ldr < ADDS * w->n ? DKS_CUTLASS_REFUSED : 0;
}

API int64_t JOIN(SYMBOL, _workspace)(const struct dks_cutlass_linear* w, const struct dks_cutlass_call* c) {
  ++told.asked;
  const int why = objection(w, c);
  return why ? -why : told.room;
}

API int SYMBOL(const struct dks_cutlass_linear* w, const struct dks_cutlass_call* c) {
  ++told.runs;
  told.linear = *w, told.call = *c;
  if (told.status || objection(w, c)) return told.status ? (int)told.status : objection(w, c);
  if (c->workspace_bytes < told.room) return DKS_CUTLASS_WORKSPACE;
  if (told.room) memset(c->workspace, 0xff, (size_t)told.room); /* it is the call's own */
  for (int64_t row = 0; row < c->rows; ++row)
    for (int64_t column = 0; column < w->n; ++column) {
      double sum = 0;
      for (int64_t i = 0; i < w->k; ++i)
        sum += (double)element(c->x, row * c->ldx + i) * element(w->weight, column * w->ldw + i);
      if (w->weight_scale != NULL) sum *= w->weight_scale[column];
      if (c->x_scale != NULL) sum *= c->x_scale[row];
      if (w->bias != NULL) sum += as_float(((const uint16_t*)w->bias)[column]);
      if (ADDS) sum += as_float(((const uint16_t*)c->residual)[row * c->ldr + column]);
      ((uint16_t*)c->y)[row * c->ldy + column] = as_bfloat16((float)sum);
    }
  return DKS_CUTLASS_OK;
}
