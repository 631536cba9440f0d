// What the templates of both architectures do alike: refuse what the kernel would get wrong, and launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>

#include "abi.h"
#include "cutlass/cutlass.h"

#define DKS_EXPORT extern "C" __attribute__((visibility("default")))

namespace dks {

// Why a call can't be served, or DKS_CUTLASS_OK. `align` is in bytes.
inline int objection(const dks_cutlass_linear& w, const dks_cutlass_call& c, int64_t in, int64_t out, uint64_t align,
                     bool scales, bool adds) {
  if (w.weight == nullptr || c.x == nullptr || c.y == nullptr) return DKS_CUTLASS_LACKS;
  if (adds != (c.residual != nullptr)) return DKS_CUTLASS_LACKS;
  if (!scales && (w.weight_scale != nullptr || c.x_scale != nullptr)) return DKS_CUTLASS_LACKS;
  // CUTLASS counts in int; and it launches with a broken descriptor, after a line on stderr, where TMA takes none.
  for (int64_t size : {c.rows, w.n, w.k, w.ldw, c.ldx, c.ldy, adds ? c.ldr : 0})
    if (size < 0 || size > INT32_MAX) return DKS_CUTLASS_REFUSED;
  if (w.k == 0) return DKS_CUTLASS_REFUSED;
  if (w.multiprocessors < 1) return DKS_CUTLASS_REFUSED;  // stream-K divides by it where no device tells its own
  if (w.ldw < w.k || c.ldx < w.k || c.ldy < w.n || (adds && c.ldr < w.n)) return DKS_CUTLASS_REFUSED;
  uint64_t bits = 0, scale = 0;
  for (const void* each : {w.weight, w.bias, c.x, c.residual, static_cast<const void*>(c.y)})
    bits |= reinterpret_cast<uintptr_t>(each);
  for (int64_t bytes : {w.k * in, w.ldw * in, c.ldx * in, w.n * out, c.ldy * out, adds ? c.ldr * out : 0})
    bits |= static_cast<uint64_t>(bytes);
  for (const float* each : {w.weight_scale, c.x_scale}) scale |= reinterpret_cast<uintptr_t>(each);
  return bits % align || scale % 16 ? DKS_CUTLASS_MISALIGNED : DKS_CUTLASS_OK;
}

// Makes the call's device the thread's, for as long as this lives. Without a driver it does nothing.
class OnDevice {
 public:
  explicit OnDevice(int64_t device) {
    int now = 0;
    if (cudaGetDevice(&now) != cudaSuccess || now == device) return;
    if (cudaSetDevice(static_cast<int>(device)) == cudaSuccess) before_ = now;
  }
  ~OnDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

inline int failed() {
  const cudaError_t error = cudaGetLastError();  // and clears it: the next call starts anew
  return error == cudaSuccess ? DKS_CUTLASS_FAILED : DKS_CUTLASS_CUDA + static_cast<int>(error);
}

template <class Gemm>
int launch(const typename Gemm::Arguments& arguments, const dks_cutlass_call& c) {
  if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess) return DKS_CUTLASS_REFUSED;
  const size_t needed = Gemm::get_workspace_size(arguments);
  if (needed != 0 && (c.workspace == nullptr || static_cast<size_t>(c.workspace_bytes) < needed))
    return DKS_CUTLASS_WORKSPACE;
  const auto stream = static_cast<cudaStream_t>(c.stream);
  Gemm gemm;
  if (gemm.initialize(arguments, c.workspace, stream) != cutlass::Status::kSuccess) return failed();
  return gemm.run(stream) == cutlass::Status::kSuccess ? DKS_CUTLASS_OK : failed();
}

}  // namespace dks
