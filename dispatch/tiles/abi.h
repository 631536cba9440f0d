/* The C interface of generated kernels. Plain C: a server without Python or C++ can call them too.
 *
 * A kernel is one function. It is reentrant, keeps no pointer of a call, never writes outside its output, and
 * runs on the caller's thread and at most `threads - 1` of OpenMP's, and never on more than omp_get_max_threads().
 */
#ifndef DKS_ABI_H
#define DKS_ABI_H

#include <stdint.h>

enum {
  DKS_OK = 0,
  /* The call was declined, and y is undefined. */
  DKS_DECLINED = 1,  /* values or sizes outside its domain, such as NaN where integers are multiplied */
  DKS_NO_MEMORY = 2, /* scratch memory ran out */
  DKS_NO_TILES = 3,  /* the system refuses this process AMX */
};

enum dks_epilogue {
  DKS_NONE = 0,
  DKS_RELU = 1,
  DKS_GELU = 2,      /* x * normal_cdf(x) */
  DKS_GELU_TANH = 3, /* its tanh form */
  DKS_SILU = 4,
  DKS_ADD = 5, /* + residual */
};

/* Kernels that multiply tiles read this many bytes of inputs at once. */
enum { DKS_CHUNK = 64 };

/* The constant part of a linear: made once, read by every call.
 *
 * Panels: weights of `panel` output channels lie together, k-groups of `group` inputs inside:
 * weight[ceil(n / panel)][ceil(k / step) * step / group][panel][group], zeros where n or k end. `panel`, `group`
 * and the element belong to the kernel and are in its name. `step` is `group`, but in gemm_amx.hpp DKS_CHUNK
 * bytes: 64 int8 or 32 bf16. Everything is 64-byte aligned.
 */
struct dks_linear {
  const void* weight;
  const float* bias;   /* n, or null */
  const float* scale;  /* of an output channel (n), for integer weights; int4: see gemm_int4.hpp */
  const int32_t* sums; /* sum of an output channel's integer weights (n); null where the kernel needs none */
  int64_t n, k;
  int32_t epilogue; /* enum dks_epilogue */
  int32_t threads;  /* at most */
  int32_t by_rows;  /* threads share out rows of x instead of output channels */
};

/* x (m, k) rows contiguous; residual (m, n) for DKS_ADD, else null; y (m, n). */
typedef int (*dks_linear_fn)(const struct dks_linear*, const void* x, const void* residual, void* y, int64_t m);

/* y = norm(x + residual) over rows of n; `sum` receives x + residual where it is not null (m, n). */
struct dks_norm {
  const void* weight; /* n of the element type, or null */
  const void* bias;   /* the same; rms_norm has none */
  int64_t n;
  float eps;
  int32_t threads;
};

typedef int (*dks_norm_fn)(const struct dks_norm*, const void* x, const void* residual, void* y, void* sum,
                           int64_t m);

/* y = softmax over rows of n. */
typedef int (*dks_softmax_fn)(const void* x, void* y, int64_t m, int64_t n, int32_t threads);

/* Attention of one query row a sequence. Strides are in elements; the last dim's is 1. */
struct dks_decode {
  int64_t b, h, hkv, d;
  int64_t kv;                 /* keys of every sequence; paged: the longest one */
  int64_t q_b, q_h;           /* strides of q */
  int64_t k_b, k_h, k_s;      /* strides of k: sequence (paged: page), head, key */
  int64_t v_b, v_h, v_s;
  int64_t page;               /* keys a page */
  const int32_t* block_table; /* (b, table_stride): pages of a sequence; null where k and v are contiguous */
  int64_t table_stride;
  const int32_t* lengths; /* (b,); null means kv for all */
  float scale;
  int32_t threads;
};

/* y (b, h, d) contiguous. */
typedef int (*dks_decode_fn)(const struct dks_decode*, const void* q, const void* k, const void* v, void* y);

#ifdef __cplusplus
#define DKS_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define DKS_EXPORT extern
#endif

#endif
