// linear by tile instructions (AMX): int8 times int8 to int32, or bf16 times bf16 to float.
//
// The weights lie in panels of NT tiles of 16 output channels, groups of inputs inside (see abi.h). A tile of
// weights is 16 groups deep, so k is filled up with zeros to a multiple of `step`, DKS_CHUNK bytes: 64 int8, 32
// bf16. A block of MT tiles of rows by one panel accumulates over KC inputs.
//
// int8: x is quantised here with a scale a row (a call with NaN or infinity, or more than 2^17 inputs, is
// declined), and needs w.scale. bf16: denormals count as zero, as the instruction has it. A call is declined
// where the system refuses tiles.
#pragma once

#include <atomic>
#include <utility>

#include "abi.h"
#include "amx.hpp"
#include "chunks.hpp"
#include "scratch.hpp"
#include "threads.hpp"

namespace dks {

struct AmxInt8 {
  using Rows = Int8Rows<0>;
  template <int C, int A, int B>
  static void dot() {
    amx::dot_int8<C, A, B>();
  }
};

struct AmxBf16 {
  using Rows = Bf16Rows;
  template <int C, int A, int B>
  static void dot() {
    amx::dot_bf16<C, A, B>();
  }
};

// Dot: AmxInt8 or AmxBf16. X: x's and y's element. MT: most tiles of rows of a block. NT: tiles of a panel.
// KC: inputs accumulated before the next block of rows has its turn, so that this much of a panel stays in cache;
// 0 is all. PACK: x is always rewritten into tiles; else bf16 x is read in place where its rows are whole tiles
// and its address a whole cache line. PF: 0 leaves prefetching of the weights to the machine; else how many steps
// (NT KiB) ahead where one block of rows is all there is.
template <class Dot, class X, int MT, int NT, int KC, bool PACK, int PF>
struct AmxGemm {
  using Rows = typename Dot::Rows;
  using Sum = typename Rows::Sum;
  static constexpr int NR = NT * 16;
  static constexpr int64_t step = Rows::chunk;       // inputs of a tile
  static constexpr int64_t step_bytes = NT * 1024;   // a panel's weights of that many
  static constexpr int row_tiles = MT * NT;          // the first tile of x; sums come first
  static constexpr int weight_tiles = row_tiles + MT;
  static constexpr int weights_held = NT < 8 - weight_tiles ? NT : 8 - weight_tiles;
  static_assert(MT * NT + MT + 1 <= 8, "there are 8 tiles");
  static_assert(KC % step == 0, "blocks of inputs are whole tiles");
  static_assert(PACK || (Rows::group == 2 && sizeof(X) == 2), "x is read in place only where it is bf16 already");

  static int run(const dks_linear& w, const void* x_, const void* residual_, void* y_, int64_t m) {
    if (w.k > Rows::most_inputs) return DKS_DECLINED;
    if (!amx::permitted()) return DKS_NO_TILES;
    if (m == 0) return DKS_OK;
    const auto* x = static_cast<const X*>(x_);
    const auto* residual = static_cast<const X*>(residual_);
    auto* y = static_cast<X*>(y_);
    // Tiles take as long as they have rows: all have as many as they need, the last one perhaps fewer of use.
    const int64_t tiles = (m + 15) / 16, height = (m + tiles - 1) / tiles;
    const int64_t blocks = (tiles + MT - 1) / MT, panels = (w.n + NR - 1) / NR;
    const int64_t parts = w.by_rows ? blocks : panels;
    const int threads = static_cast<int>(w.threads < parts ? w.threads : parts);
    const int64_t steps = (w.k + step - 1) / step, deep = KC > 0 && KC < w.k ? KC / step : steps;
    const bool blocked = deep < steps;
    const bool in_place = !PACK && w.k % step == 0 && reinterpret_cast<uintptr_t>(x) % 64 == 0;
    const int64_t whole = in_place ? m / height : 0;  // tiles that are read where they are
    const int64_t factor_bytes = (m * 4 + 63) / 64 * 64, tile_bytes = height * steps * chunk_bytes;
    const int64_t packed_bytes = (tiles - whole) * tile_bytes;
    const int64_t sums = (blocked ? tiles : MT) * height * NR;
    auto* memory = static_cast<char*>(
        scratch(static_cast<std::size_t>(factor_bytes + packed_bytes + threads * sums * int64_t{sizeof(Sum)})));
    if (memory == nullptr) return DKS_NO_MEMORY;
    auto* factors = reinterpret_cast<float*>(memory);
    char* packed = memory + factor_bytes;
    amx::Config config;
    for (int t = 0; t < weight_tiles + weights_held; ++t) {
      config.rows[t] = t < weight_tiles ? static_cast<uint8_t>(height) : 16;
      config.row_bytes[t] = 64;
    }
    std::atomic<bool> declined{false};
    parallel(threads, [&](int thread, int count) {
      const Span all_blocks{0, blocks}, all_panels{0, panels};
      const Span mine = w.by_rows ? share(blocks, 1, thread, count) : all_blocks;
      const Span columns = w.by_rows ? all_panels : share(panels, 1, thread, count);
      const int64_t begin = mine.begin * MT * height, end = mine.end * MT * height;
      const Span rows = w.by_rows ? Span{begin, end < m ? end : m} : share(m, 1, thread, count);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const int64_t tile = r / height;
        factors[r] = 1.0f;
        if (tile < whole) continue;
        char* out = packed + (tile - whole) * tile_bytes + r % height * chunk_bytes;
        factors[r] = Rows::pack(x + r * w.k, w.k, out, height * chunk_bytes);
        if (factors[r] != factors[r]) declined = true;
      }
      if (!w.by_rows) barrier(count);
      if (declined) return;
      amx::configure(config);
      Sum* own = reinterpret_cast<Sum*>(packed + packed_bytes) + thread * sums;
      const int64_t turns = mine.end - mine.begin;
      for (int64_t p = columns.begin; p < columns.end; ++p) {
        for (int64_t s = 0; s < steps; s += deep) {
          const bool ends = s + deep >= steps, last = ends && p + 1 == columns.end;
          for (int64_t b = mine.begin; b < mine.end; ++b) {
            const int64_t tile = b * MT, row = tile * height;
            Block block{};
            block.weights = static_cast<const char*>(w.weight) + (p * steps + s) * step_bytes;
            block.steps = ends ? steps - s : deep;
            block.sums = own + (blocked ? row * NR : 0);
            block.height = height;
            block.begins = s == 0;
            for (int64_t i = 0; i < MT && tile + i < tiles; ++i) {
              const int64_t t = tile + i;
              const char* there = reinterpret_cast<const char*>(x + t * height * w.k) + s * chunk_bytes;
              const char* here = packed + (t - whole) * tile_bytes + s * height * chunk_bytes;
              block.x[i] = t < whole ? Rowset{there, w.k * int64_t{sizeof(X)}, chunk_bytes}
                                     : Rowset{here, chunk_bytes, height * chunk_bytes};
            }
            if (PF > 0) {
              // Nothing follows this thread's last block of weights: no turn comes then.
              if (turns == 1) block.ahead = {PF * step_bytes, 0, 1};
              if (turns > 1) block.ahead = {block.steps * step_bytes, last ? block.steps * NT : b - mine.begin, turns};
            }
            if (tiles - tile >= MT) {
              multiply<MT>(block);
            } else {
              multiply<1>(block);
            }
            const int64_t n = m - row < MT * height ? m - row : MT * height;
            if (ends) write_rows<Rows>(w, block.sums, NR, factors, row, n, p * NR, residual, y);
          }
        }
      }
      amx::release();
    });
    return declined ? DKS_DECLINED : DKS_OK;
  }

 private:
  static_assert(MT <= 2, "a block that lacks tiles has one");

  // Where a tile of x lies, how far its rows are apart, and the next step's tile.
  struct Rowset {
    const char* at;
    int64_t stride, next;
  };

  struct Block {
    Rowset x[MT];
    const char* weights;
    int64_t steps;
    Sum* sums;
    int64_t height;
    bool begins;
    Ahead ahead;
  };

  // body(0), body(1)... body(N - 1), each a constant, since an instruction's tiles are part of it.
  template <int N, class Body>
  static void each(const Body& body) {
    each(body, std::make_integer_sequence<int, N>{});
  }
  template <class Body, int... I>
  static void each(const Body& body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
  }

  // The loop for R tiles of rows.
  template <int R>
  static void multiply(const Block& block) {
    constexpr int64_t sum_stride = NR * sizeof(Sum);
    each<R>([&](auto i) {
      each<NT>([&](auto j) {
        if (block.begins) {
          amx::zero<i * NT + j>();
        } else {
          amx::load<i * NT + j>(block.sums + i * block.height * NR + j * 16, sum_stride);
        }
      });
    });
    const char* x[R];
    for (int i = 0; i < R; ++i) x[i] = block.x[i].at;
    const char* weights = block.weights;
    Ahead ahead = block.ahead;
    for (int64_t left = block.steps; left > 0; --left, weights += step_bytes) {
      each<R>([&](auto i) {
        amx::load<row_tiles + i>(x[i], block.x[i].stride);
        x[i] += block.x[i].next;
      });
      each<NT>([&](auto j) {
        constexpr int tile = weight_tiles + j % weights_held;
        amx::load<tile>(weights + j * 64, NT * 64);
        if (PF > 0) ahead.template fetch<16>(weights + j * 1024);
        each<R>([&](auto i) { Dot::template dot<i * NT + j, row_tiles + i, tile>(); });
      });
    }
    each<R>([&](auto i) {
      each<NT>([&](auto j) {
        amx::store<i * NT + j>(block.sums + i * block.height * NR + j * 16, sum_stride);
      });
    });
  }
};

}  // namespace dks
