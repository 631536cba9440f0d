/* The C interface of the CUTLASS kernels. Plain C: a server without Python or C++ can call them too.
 *
 * A kernel is two functions, <name> and <name>_workspace. Both are reentrant and keep no pointer of a call. The
 * first puts its work on call->stream and returns; it allocates nothing, so that a CUDA graph can capture it.
 * Whatever device was the calling thread's before is so again after it.
 */
#ifndef DKS_CUTLASS_ABI_H
#define DKS_CUTLASS_ABI_H

#include <stdint.h>

enum dks_cutlass_status {
  DKS_CUTLASS_OK = 0,
  /* Nothing was launched: */
  DKS_CUTLASS_MISALIGNED = 1, /* an address, a row's distance, n or k is not divisible by what the kernel needs */
  DKS_CUTLASS_REFUSED = 2,    /* sizes or distances out of range (0 to 2^31 - 1, k above 0), or that CUTLASS refuses */
  DKS_CUTLASS_WORKSPACE = 3,  /* the workspace is smaller than <name>_workspace says */
  DKS_CUTLASS_LACKS = 4,      /* a null pointer that the kernel needs, or one that it cannot use */
  DKS_CUTLASS_FAILED = 5,     /* CUTLASS could not launch and named no CUDA error */
  DKS_CUTLASS_CUDA = 1000,    /* and above: 1000 + the number of a CUDA error */
};

/* The constant part of a linear: y = epilogue(x_scale * weight_scale * (x @ weight^T) + bias).
 *
 * All pointers are of the device. Distances of rows are in elements. `n`, `k`, rows' distances times the element's
 * size and all addresses are divisible by the kernel's alignment in bytes, scales' addresses by 16.
 */
struct dks_cutlass_linear {
  const void* weight;        /* (n, k), rows ldw apart */
  const void* bias;          /* n of y's type, or null */
  const float* weight_scale; /* of an output channel (n), or null for 1; fp8 and int8 alone */
  int64_t n, k, ldw;
  int32_t multiprocessors; /* of the device, or fewer that may be used; 1 at least */
};

/* Every field has 8 bytes, so that a caller may fill an array of them instead. */
struct dks_cutlass_call {
  const void* x;        /* (rows, k), ldx apart */
  const float* x_scale; /* of a row (rows), or null for 1; fp8 and int8 alone */
  const void* residual; /* (rows, n) of y's type, ldr apart, for the epilogue `add`; else null */
  void* y;              /* (rows, n), ldy apart: x's type; bfloat16 for fp8 and int8 */
  int64_t rows, ldx, ldr, ldy;
  void* workspace; /* 16-byte aligned, no other call's while this one runs */
  int64_t workspace_bytes;
  void* stream;   /* cudaStream_t or CUstream, which are one */
  int64_t device; /* whose stream and memory these are: its number */
};

/* An enum dks_cutlass_status. */
typedef int (*dks_cutlass_fn)(const struct dks_cutlass_linear*, const struct dks_cutlass_call*);

/* Bytes of workspace that this call needs, whatever its workspace and stream are; or minus a status. */
typedef int64_t (*dks_cutlass_workspace_fn)(const struct dks_cutlass_linear*, const struct dks_cutlass_call*);

#endif
