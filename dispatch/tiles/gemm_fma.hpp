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

// Weight elements: `stride` of them a channel for one input, and how a vector of channels is read.
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
  static_assert(PACK || sizeof(X) == 4, "a 16-bit element can't be broadcast as a float: x is widened while packed");
  static_assert(MR * NV + NV + 1 <= V::registers, "accumulators, a row of weights and a broadcast are registers");
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
    const std::size_t packed = PACK ? align(static_cast<std::size_t>(m * w.k)) : 0;
    const std::size_t partial = blocked ? align(static_cast<std::size_t>(m * NR)) : 0;
    float* memory = nullptr;
    if (packed + partial > 0) {
      memory = static_cast<float*>(scratch((packed + partial * static_cast<std::size_t>(threads)) * sizeof(float)));
      if (memory == nullptr) return DKS_DECLINED;
    }
    parallel(threads, [&](int thread, int count) {
      const Span all_tiles{0, tiles}, all_panels{0, panels};
      const Span mine = w.by_rows ? share(tiles, 1, thread, count) : all_tiles;
      const Span columns = w.by_rows ? all_panels : share(panels, 1, thread, count);
      if (PACK) {
        const Span pack_tiles = share(tiles, 1, thread, count);
        for (int64_t t = pack_tiles.begin; t < pack_tiles.end; ++t) pack(x, memory, w.k, row(t, m, tiles), row(t + 1, m, tiles));
        if (!w.by_rows) barrier(count);
      }
      float* sums = memory + packed + partial * static_cast<std::size_t>(thread);
      for (int64_t p = columns.begin; p < columns.end; ++p) {
        for (int64_t k = 0; k < w.k; k += blocked ? KC : w.k) {
          const int64_t depth = !blocked ? w.k : w.k - k < KC ? w.k - k : KC;
          for (int64_t t = mine.begin; t < mine.end; ++t) {
            const int64_t r = row(t, m, tiles), rows = row(t + 1, m, tiles) - r;
            const Tile tile{w, x, residual, y, memory, blocked ? sums + r * NR : nullptr, r, p, k, depth};
            Rows<MR>::run(rows, tile);
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

  // Rows begin..end as [k][row], from where row `begin` would be.
  static void pack(const X* x, float* packed, int64_t k, int64_t begin, int64_t end) {
    const int64_t rows = end - begin;
    float* out = packed + begin * k;
    if (rows == 1) {
      for (int64_t j = 0; j < k; ++j) out[j] = to_float(x[begin * k + j]);
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const X* in = x + (begin + i) * k;
      for (int64_t j = 0; j < k; ++j) out[j * rows + i] = to_float(in[j]);
    }
  }

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
