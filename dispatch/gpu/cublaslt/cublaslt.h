/* cuBLASLt behind a small C interface. Plain C; nothing of CUDA is needed to build it or to load it.
 *
 * Functions that return int give 0, or -1 and a sentence in `why` (of `room` bytes, always terminated). Nothing is
 * remembered between calls, so that any thread may call; an algorithm is its bytes, never an index into a list.
 */
#ifndef DKS_CUBLASLT_H
#define DKS_CUBLASLT_H

#include <stddef.h>
#include <stdint.h>

/* As CUDA numbers them (cudaDataType_t). */
enum dks_lt_type {
  DKS_LT_FLOAT32 = 0,
  DKS_LT_FLOAT16 = 2,
  DKS_LT_INT8 = 3,
  DKS_LT_INT32 = 10,
  DKS_LT_BFLOAT16 = 14,
  DKS_LT_FLOAT8_E4M3 = 28,
};

/* cuBLASLt has no exact GELU and no SiLU. */
enum dks_lt_epilogue {
  DKS_LT_NONE = 0,
  DKS_LT_RELU = 1,
  DKS_LT_GELU_TANH = 3, /* the numbers of abi.h of the CPU's kernels */
  DKS_LT_ADD = 5,       /* + residual */
};

/* y (m, n) = epilogue(x_scale * weight_scale * (x (m, k) @ weight (n, k)^T) + bias (n)). All row-major. */
struct dks_lt_problem {
  int64_t m, n, k;
  int64_t ldx, ldw, ldr, ldy; /* distances of rows in elements; ldr for DKS_LT_ADD alone */
  int32_t type;               /* of x and weight: 16-bit, fp8 or int8 */
  int32_t out;                /* of y, residual and bias: `type`, for fp8 a 16-bit one, for int8 int32 */
  int32_t epilogue;
  int32_t bias;                                          /* whether there is one */
  int32_t scales;                                        /* fp8: whether there are, one float each */
  int32_t fast;                                          /* fp8: sums are not promoted to full float32 */
  uint32_t align_x, align_w, align_r, align_y, align_b; /* bytes, powers of two, that divide the addresses */
  uint64_t workspace;                                    /* bytes, at most */
};

enum { DKS_LT_ALGORITHM = 64 }; /* bytes of a cublasLtMatmulAlgo_t: to be kept and used again with this version */

struct dks_lt_found {
  unsigned char algorithm[DKS_LT_ALGORITHM];
  uint64_t workspace; /* bytes that it needs */
  float waves;        /* of blocks that fill the device */
  int32_t unused;
};

struct dks_lt_call {
  const void *x, *weight, *bias, *residual; /* of the device; null where there is none */
  const float *x_scale, *weight_scale;
  void* y;
  void* workspace; /* 256-byte aligned */
  uint64_t workspace_bytes;
  void* stream; /* cudaStream_t or CUstream */
};

struct dks_lt;

#ifdef __cplusplus
extern "C" {
#endif

/* Load the library at `path`, or libcublasLt.so.13, else .12, where path is null; and make its handle for the
 * current device. Null, and `why`, where that can't be. */
struct dks_lt* dks_lt_open(const char* path, char* why, size_t room);
void dks_lt_close(struct dks_lt*);

/* As cublasLtGetVersion gives it, e.g. 130100. */
uint64_t dks_lt_version(const struct dks_lt*);

/* The heuristic's `most` best algorithms in its order; how many were found, or -1. */
int dks_lt_search(const struct dks_lt*, const struct dks_lt_problem*, struct dks_lt_found* found, int most, char* why,
                  size_t room);

/* Whether an algorithm can run this problem on the current device; what it needs, in `found`. */
int dks_lt_check(const struct dks_lt*, const struct dks_lt_problem*, const unsigned char* algorithm,
                 struct dks_lt_found* found, char* why, size_t room);

/* Run it. Nothing is launched where an address is not as aligned as the problem says. */
int dks_lt_run(const struct dks_lt*, const struct dks_lt_problem*, const unsigned char* algorithm,
               const struct dks_lt_call*, char* why, size_t room);

/* An algorithm with the constant part of a linear, as a compiled call launches it: see `Function` of call.py.
 *
 * `values` are x, 0, residual, y, m, ldx, ldr, ldy, workspace, workspace_bytes, stream and the device's number. Both
 * run on the device that was current when `lt` was opened, and leave the thread's as it was. */
struct dks_lt_linear;

enum dks_lt_code {
  DKS_LT_OK = 0,
  /* Nothing was launched: */
  DKS_LT_MISALIGNED = 1, /* an address is not as aligned as the problem says, or a distance of rows another */
  DKS_LT_REFUSED = 2,    /* the algorithm can't run so many rows */
  DKS_LT_WORKSPACE = 3,  /* smaller than dks_lt_linear_workspace says */
  DKS_LT_DEVICE = 4,     /* another device than that which `lt` was opened for */
  DKS_LT_FAILED = 1000,  /* plus cuBLASLt's own status */
};

/* Null where memory ran out. `p->m` does not matter; `device` is the number of the one that is current. */
struct dks_lt_linear* dks_lt_linear_make(const struct dks_lt*, const struct dks_lt_problem* p,
                                         const unsigned char* algorithm, const void* weight, const void* bias,
                                         int64_t device);
void dks_lt_linear_free(struct dks_lt_linear*);

/* Bytes of workspace, or minus a code. cuBLASLt is asked once for each number of rows. */
int64_t dks_lt_linear_workspace(const void* linear, const int64_t* values);
int dks_lt_linear_run(const void* linear, const int64_t* values);

#ifdef __cplusplus
}
#endif

#endif
