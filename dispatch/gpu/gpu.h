/* The C interface of compiled GPU programs: load them into a CUDA context and launch them, through the driver alone.
 *
 * Plain C, and no header of CUDA's is needed. Every function but dks_gpu_open and dks_gpu_add may be called from any
 * number of threads at once, and so may these two. Nothing throws, prints or ends the process; every failure is a code.
 *
 * A launch first checks every step of the call (ranges, alignment, scratch memory), then loads what is not loaded in
 * the context yet, and only then launches, in order, on the call's stream. So a code below DKS_GPU_FAILED means that
 * nothing was launched. Nothing is allocated once all kernels of a call are loaded; launches can be captured in CUDA
 * graphs, and so can the first one, since modules are loaded with capture relaxed for this thread.
 */
#ifndef DKS_GPU_H
#define DKS_GPU_H

#include <stddef.h>
#include <stdint.h>

enum {
  DKS_GPU_OK = 0,
  DKS_GPU_NO_DRIVER = 1,   /* there is no driver, or nobody opened it */
  DKS_GPU_OLD_DRIVER = 2,  /* it lacks a function */
  DKS_GPU_NO_DEVICE = 3,   /* there is no device, or none of this number */
  DKS_GPU_CONTEXTS = 4,    /* more than DKS_GPU_MAX_CONTEXTS contexts in this process */
  DKS_GPU_OTHER_ARCH = 5,  /* compiled for another architecture */
  DKS_GPU_SHARED = 6,      /* needs more shared memory than the device has */
  DKS_GPU_MISALIGNED = 7,  /* an address, stride or size is outside the program's alignment class */
  DKS_GPU_RANGE = 8,       /* a value does not fit its argument, or makes a grid that no device has */
  DKS_GPU_SCRATCH = 9,     /* too little scratch memory, or not aligned: see dks_gpu_scratch */
  DKS_GPU_BAD_CALL = 10,   /* a description or call that contradicts itself */
  DKS_GPU_FAILED = 1000,   /* plus the driver's own code: the call failed, and the context is as it was */
  DKS_GPU_STICKY = 2000,   /* plus the driver's own code: this and every later call fails; end the process */
};

enum { DKS_GPU_MAX_INPUTS = 48, DKS_GPU_MAX_FACTORS = 8, DKS_GPU_MAX_STEPS = 8, DKS_GPU_MAX_CONTEXTS = 32 };

enum dks_gpu_type {
  DKS_GPU_POINTER = 0,
  DKS_GPU_INT32 = 1,
  DKS_GPU_INT64 = 2,
  DKS_GPU_FLOAT32 = 3, /* the value's lower 32 bits are those of the number */
};

struct dks_gpu_input {
  const char* name;
  int32_t type;    /* enum dks_gpu_type */
  int32_t divisor; /* power of two that divides the value in every call; 1 where nothing is known */
};

/* How many blocks of `size` cover an input's value; where `input` is -1, `size` itself. */
struct dks_gpu_factor {
  int64_t size;
  int32_t input;
};

/* One compiled program. */
struct dks_gpu_cubin {
  const char* symbol;
  const char* program;  /* digest of what it was made from */
  const char* function; /* the kernel's name in the code */
  const void* elf;
  const struct dks_gpu_input* inputs; /* the kernel's arguments, then what only its grid names */
  const struct dks_gpu_factor* x;     /* the grid: products of factors */
  const struct dks_gpu_factor* y;
  const struct dks_gpu_factor* z;
  int32_t arguments, input_count, x_count, y_count, z_count;
  int32_t arch;          /* 80, 90, 100 */
  int32_t warps;         /* of 32 threads, in a block */
  int32_t shared;        /* bytes of dynamic shared memory */
  int32_t resident;      /* x is at most so many blocks a multiprocessor; 0: as many as there are */
  int32_t scratch;       /* bytes of global memory for each block of a launch */
  int32_t scratch_align; /* of the first of them, a power of two */
};

/* A compiled program that this process may launch. */
typedef struct dks_gpu_kernel dks_gpu_kernel;

/* Where an input's value comes from: a slot of the call, or where `slot` is -1 the constant `value`. */
struct dks_gpu_source {
  int64_t value;
  int32_t slot;
};

struct dks_gpu_step {
  dks_gpu_kernel* kernel;
  const struct dks_gpu_source* sources; /* one for each of its inputs */
};

/* Several kernels in order that share their arguments: those of a call that splits K also share its workspace. */
struct dks_gpu_call {
  const struct dks_gpu_step* steps;
  const int64_t* slots; /* addresses, whole numbers, and 32-bit floats by their bits */
  void* scratch;        /* device memory of at least dks_gpu_scratch() bytes; no other call's that may run beside it */
  void* stream;         /* CUstream or cudaStream_t; null for the default stream */
  int64_t scratch_bytes;
  int32_t step_count, slot_count;
  int32_t device; /* its number; the current context is used if it is of this device, else its primary one */
};

struct dks_gpu_device {
  int32_t capability; /* 80, 86, 90 ... */
  int32_t multiprocessors;
  int32_t shared; /* most bytes that a block may opt in to */
};

#if defined(__cplusplus)
#define DKS_GPU_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define DKS_GPU_EXPORT extern
#endif

/* Open the driver; once it is open, later calls only say so.
 *
 * path: of its library; null for the system's libcuda.so.1. why: receives the reason in words, if not null; "" if OK.
 */
DKS_GPU_EXPORT int32_t dks_gpu_open(const char* path, char* why, size_t size);

DKS_GPU_EXPORT int32_t dks_gpu_device_of(int32_t device, struct dks_gpu_device* out);

/* The programs that this library holds. */
DKS_GPU_EXPORT const struct dks_gpu_cubin* dks_gpu_embedded(int32_t* count);

/* Make a kernel of a compiled program, which must stay where it is; null if its description contradicts itself or
 * memory ran out. It lives as long as the process. No driver is needed yet. */
DKS_GPU_EXPORT dks_gpu_kernel* dks_gpu_add(const struct dks_gpu_cubin* cubin);

/* Load a call's kernels without launching them; its slots don't matter. */
DKS_GPU_EXPORT int32_t dks_gpu_load(const struct dks_gpu_call* call);

/* Bytes of scratch memory that a call needs, 0 for most programs; or minus a code. Align it by 128 bytes or more. */
DKS_GPU_EXPORT int64_t dks_gpu_scratch(const struct dks_gpu_call* call);

DKS_GPU_EXPORT int32_t dks_gpu_launch(const struct dks_gpu_call* call);

/* What a code means, in words. */
DKS_GPU_EXPORT void dks_gpu_text(int32_t code, char* text, size_t size);

#endif
