// linear by fused multiply-adds in float: weights of any element are widened as they are read, so this serves
// fp32, and is the family for few rows, where reading the weights is all the time there is.
//
// The weights lie in panels of NV vectors of output channels (see abi.h). A register tile of MR rows by one
// panel accumulates over KC inputs; each input is a broadcast of x against NV vectors of weights.
#pragma once

#include "abi.h"
#include "math.hpp"
#include "scratch.hpp"
#include "threads.hpp"

namespace dks {

// Weight elements: whether they have a scale, and how a vector of channels is read.
template <class V, class W>
struct Weights {
  static constexpr bool scaled = sizeof(W) == 1;  // int8: one scale an output channel, at the end
  static V load(const W* panel_row, int j) { return V::load(panel_row + j * V::width); }
};

// MR: most rows of a register tile. NV: vectors of a panel. KC: inputs accumulated before the next row tile has
// its turn, so that this much of a panel stays in cache; 0 is all. PACK: x is copied into the order the tile
// reads it. PF: inputs that the weights are prefetched ahead; 0 leaves it to the machine.
template <class V, class X, class W, int MR, int NV, int KC, bool PACK, int PF>
struct FmaGemm {
  static constexpr int NR = NV * V::width;
  using Weight = Weights<V, W>;

  static int run(const dks_linear& w, const void* x_, const void* residual_, void* y_, int64_t m) {
    const auto* x = static_cast<const X*>(x_);
    const auto* residual = static_cast<const X*>(residual_);
    auto* y = static_cast<X*>(y_);
    const int64_t tiles = (m + MR - 1) / MR, panels = (w.n + NR - 1) / NR;
    const int threads = static_cast<int>(w.threads < (w.by_rows ? tiles : panels) ? w.threads
                                         : w.by_rows                             ? tiles
                                                                                 : panels);
    const bool blocked = KC > 0 && KC < w.k;
    const int64_t step = blocked ? KC : w.k;
    // Sums of whole panels, between one block of inputs and the next.
    const std::size_t packed = PACK ? align(static_cast<std::size_t>(m * w.k)) : 0;
    const std::size_t partial = blocked ? static_cast<std::size_t>(m * panels * NR) : 0;
    float* memory = nullptr;
    if (packed + partial > 0) {
      memory = static_cast<float*>(scratch((packed + partial) * sizeof(float)));
      if (memory == nullptr) return DKS_NO_MEMORY;
    }
    parallel(threads, [&](int thread, int count) {
      const Span rows = share(tiles, 1, thread, count);
      const Span mine = w.by_rows ? rows : Span{0, tiles};
      const Span columns = w.by_rows ? Span{0, panels} : share(panels, 1, thread, count);
      if (PACK) {
        for (int64_t t = rows.begin; t < rows.end; ++t) {
          const int64_t r = row(t, m, tiles);
          Rows<MR>::pack(row(t + 1, m, tiles) - r, x + r * w.k, memory + r * w.k, w.k);
        }
        if (!w.by_rows) barrier(count);
      }
      // One block of x stays in the second cache while the panels pass, one block of a panel in the first.
      for (int64_t k = 0; k < w.k; k += step) {
        const int64_t depth = w.k - k < step ? w.k - k : step;
        for (int64_t p = columns.begin; p < columns.end; ++p) {
          for (int64_t t = mine.begin; t < mine.end; ++t) {
            const int64_t r = row(t, m, tiles);
            float* sums = blocked ? memory + packed + (p * m + r) * NR : nullptr;
            Rows<MR>::run(row(t + 1, m, tiles) - r, {w, x, residual, y, memory, sums, r, p, k, depth});
          }
        }
      }
    });
    return DKS_OK;
  }

 private:
  struct Tile {
    const dks_linear& w;
    const X* x;
    const X* residual;
    X* y;
    const float* packed;
    float* sums;
    int64_t row, panel, k, depth;
  };

  static std::size_t align(std::size_t floats) { return (floats + 15) / 16 * 16; }

  // The first row of a tile: rows are shared out evenly, since a tile of few rows is as long as a whole one.
  static int64_t row(int64_t tile, int64_t m, int64_t tiles) { return m * tile / tiles; }

  // The loop for exactly R rows, chosen by the number of rows there are.
  template <int R, class = void>
  struct Rows {
    static void run(int64_t rows, const Tile& t) {
      if (rows == R) {
        multiply(t);
      } else {
        Rows<R - 1>::run(rows, t);
      }
    }

    // R rows of x as [k][row]. Scalar: gathers of a few rows are slower than loads and stores in order.
    __attribute__((noinline, optimize("no-tree-vectorize"))) static void pack(int64_t rows, const X* x, float* out, int64_t k) {
      if (rows != R) {
        Rows<R - 1>::pack(rows, x, out, k);
        return;
      }
      for (int64_t j = 0; j < k; ++j) {
#pragma GCC unroll 32
        for (int i = 0; i < R; ++i) out[j * R + i] = to_float(x[i * k + j]);
      }
    }

    static void multiply(const Tile& t) {
      const dks_linear& w = t.w;
      V sum[R][NV];
      const bool begins = t.k == 0, ends = t.k + t.depth == w.k;
#pragma GCC unroll 32
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) sum[i][j] = begins ? V::zero() : V::load(t.sums + i * NR + j * V::width);
      }
      const W* b = static_cast<const W*>(w.weight) + (t.panel * w.k + t.k) * NR;
      const float* a = PACK ? t.packed + t.row * w.k + t.k * R : reinterpret_cast<const float*>(t.x) + t.row * w.k + t.k;
      const int64_t down = PACK ? 1 : w.k, right = PACK ? R : 1;
#pragma GCC unroll 4
      for (int64_t k = 0; k < t.depth; ++k, a += right, b += NR) {
        if (PF > 0) {
#pragma GCC unroll 8
          for (std::size_t line = 0; line < NR * sizeof(W); line += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(b + PF * NR) + line, _MM_HINT_T0);
          }
        }
        V row[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) row[j] = Weight::load(b, j);
#pragma GCC unroll 32
        for (int i = 0; i < R; ++i) {
          const V value = V::of(a[i * down]);
#pragma GCC unroll 8
          for (int j = 0; j < NV; ++j) sum[i][j] = fma(value, row[j], sum[i][j]);
        }
      }
      if (!ends) {
#pragma GCC unroll 32
        for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
          for (int j = 0; j < NV; ++j) sum[i][j].store(t.sums + i * NR + j * V::width);
        }
        return;
      }
      const int64_t column = t.panel * NR;
#pragma GCC unroll 32
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) write(t, i, column + j * V::width, sum[i][j]);
      }
    }
  };

  template <class Unused>
  struct Rows<0, Unused> {
    static void run(int64_t, const Tile&) {}
    static void pack(int64_t, const X*, float*, int64_t) {}
  };

  __attribute__((noinline)) static void write(const Tile& t, int64_t i, int64_t column, V sum) {
    const int64_t n = t.w.n - column, at = (t.row + i) * t.w.n + column;
    if (n <= 0) return;
    if (Weight::scaled) {
      sum = sum * (n >= V::width ? V::load(t.w.scale + column) : V::load(t.w.scale + column, n));
    }
    finish(sum, t.w, column, t.residual == nullptr ? nullptr : t.residual + at, t.y + at, n);
  }
};

}  // namespace dks
