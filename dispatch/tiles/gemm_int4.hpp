// linear with int4 weights, multiplied in float: for a few rows of x, where reading the weights is all the time
// there is, and 4 bits are read faster than 8.
//
// A weight is (q - 8) * scale, q in 0..15, with one scale for every GROUP inputs of an output channel. Panels of
// NV vectors of channels (see abi.h); two inputs share a byte, the even one in its low half:
//   weight[ceil(n / NR)][ceil(k / 2)][NR] bytes, w.scale[ceil(n / NR)][ceil(k / GROUP)][NR] floats.
#pragma once

#include "abi.h"
#include "math.hpp"
#include "threads.hpp"

namespace dks {

// MR: most rows at once. PF: bytes of a channel that weights are prefetched ahead; 0 leaves it to the machine.
template <class V, class X, int MR, int NV, int GROUP, int PF>
struct Int4Gemm {
  static constexpr int NR = NV * V::width;
  static_assert(GROUP % 2 == 0, "two inputs share a byte");

  static int run(const dks_linear& w, const void* x_, const void* residual_, void* y_, int64_t m) {
    const auto* x = static_cast<const X*>(x_);
    const auto* residual = static_cast<const X*>(residual_);
    auto* y = static_cast<X*>(y_);
    const int64_t panels = (w.n + NR - 1) / NR, tiles = (m + MR - 1) / MR;
    const int threads = static_cast<int>(w.threads < panels ? w.threads : panels);
    parallel(threads, [&](int thread, int count) {
      const Span mine = share(panels, 1, thread, count);
      for (int64_t p = mine.begin; p < mine.end; ++p) {
        for (int64_t t = 0; t < tiles; ++t) {
          // Rows are shared out evenly: a tile of few rows is as long as a whole one.
          const int64_t row = m * t / tiles;
          Rows<MR>::run(m * (t + 1) / tiles - row, w, x, residual, y, row, p);
        }
      }
    });
    return DKS_OK;
  }

 private:
  template <int R, class = void>
  struct Rows {
    static void run(int64_t rows, const dks_linear& w, const X* x, const X* residual, X* y, int64_t row, int64_t p) {
      if (rows != R) {
        Rows<R - 1>::run(rows, w, x, residual, y, row, p);
        return;
      }
      const auto* b = static_cast<const uint8_t*>(w.weight) + p * ((w.k + 1) / 2) * NR;
      const float* scale = w.scale + p * ((w.k + GROUP - 1) / GROUP) * NR;
      const X* a = x + row * w.k;
      V total[R][NV];
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) total[i][j] = V::zero();
      }
      for (int64_t from = 0; from < w.k; from += GROUP, scale += NR) {
        const int64_t to = from + GROUP < w.k ? from + GROUP : w.k;
        V sum[R][NV];
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) sum[i][j] = V::zero();
        }
        for (int64_t k = from; k < to; k += 2, b += NR) {
          if (PF > 0) {
#pragma GCC unroll 4
            for (int line = 0; line < NR; line += 64) {
              _mm_prefetch(reinterpret_cast<const char*>(b + PF * NR) + line, _MM_HINT_T0);
            }
          }
          V even[NV], odd[NV];
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) V::load_int4(b + j * V::width, even[j], odd[j]);
          const bool both = k + 1 < w.k;  // the other half of the last byte belongs to no input
#pragma GCC unroll 4
          for (int i = 0; i < R; ++i) {
            const V first = V::of(to_float(a[i * w.k + k]));
            const V second = both ? V::of(to_float(a[i * w.k + k + 1])) : V::zero();
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) sum[i][j] = fma(second, odd[j], fma(first, even[j], sum[i][j]));
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) total[i][j] = fma(sum[i][j], V::load(scale + j * V::width), total[i][j]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
          const int64_t column = p * NR + j * V::width, n = w.n - column, at = (row + i) * w.n + column;
          if (n > 0) finish(total[i][j], w, column, residual == nullptr ? nullptr : residual + at, y + at, n);
        }
      }
    }
  };

  template <class Unused>
  struct Rows<0, Unused> {
    static void run(int64_t, const dks_linear&, const X*, const X*, X*, int64_t, int64_t) {}
  };
};

}  // namespace dks
