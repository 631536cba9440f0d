// linear by dot-product instructions: each lane multiplies a group of 4 int8 (AVX-512 VNNI) or 2 bf16 (AVX-512
// BF16) neighbouring inputs and adds them up.
//
// The weights lie in panels of NV vectors of output channels, groups of inputs inside (see abi.h); k is filled up
// to a whole group. A register tile of MR rows by one panel accumulates over KC inputs; each group of x is a
// broadcast of 32 bits against NV vectors of weights.
//
// int8: x is quantised here with a scale a row (a call with NaN or infinity, or more than 2^17 inputs, is
// declined), and needs w.scale and w.sums. bf16: denormals count as zero, as the instruction has it.
#pragma once

#include <atomic>

#include "abi.h"
#include "chunks.hpp"
#include "scratch.hpp"
#include "threads.hpp"

namespace dks {

// Unsigned times signed is all there is: rows are shifted by 128, and sums start at what that adds too much.
struct DotInt8 {
  using Rows = Int8Rows<128>;
  using Vector = __m512i;
  static Vector start(const dks_linear& w, int64_t column) {
    const int64_t n = w.n - column;
    const __mmask16 in = n > 0 ? Avx512::first(n) : __mmask16{0};
    const __m512i sums = n > 0 ? _mm512_maskz_loadu_epi32(in, w.sums + column) : _mm512_setzero_si512();
    return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sums, 7));
  }
  static Vector load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(int32_t* p, Vector v) { _mm512_storeu_si512(p, v); }
  static Vector dot(Vector sum, __m512i x, __m512i weights) { return _mm512_dpbusd_epi32(sum, x, weights); }
};

struct DotBf16 {
  using Rows = Bf16Rows;
  using Vector = __m512;
  static Vector start(const dks_linear&, int64_t) { return _mm512_setzero_ps(); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector dot(Vector sum, __m512i x, __m512i weights) {
#ifdef DKS_EMULATE  // so that everything around the instruction can be tested on any AVX-512 machine
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    const auto odd = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, high)); };
    const auto even = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
    return _mm512_fmadd_ps(even(x), even(weights), _mm512_fmadd_ps(odd(x), odd(weights), sum));
#else
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(weights));
#endif
  }
};

// Dot: DotInt8 or DotBf16. X: x's and y's element. MR: most rows of a register tile. NV: vectors of a panel.
// KC: inputs accumulated before the next row tile has its turn, so that this much of a panel stays in cache; 0 is
// all. PF: 0 leaves prefetching of the weights to the machine; else how many quadruples of groups (NV * 256 bytes)
// ahead where one row tile is all there is. There is no PACK: see chunks.hpp.
template <class Dot, class X, int MR, int NV, int KC, int PF>
struct DotGemm {
  using Rows = typename Dot::Rows;
  using Sum = typename Rows::Sum;
  using Vector = typename Dot::Vector;
  static constexpr int NR = NV * Avx512::width;
  static constexpr int64_t group_bytes = NV * 64;  // weights of one group of inputs
  static_assert(MR * NV + NV + 1 <= Avx512::registers, "accumulators, a row of weights and a broadcast are registers");
  static_assert(KC % Rows::chunk == 0, "blocks of inputs are whole chunks");

  static int run(const dks_linear& w, const void* x_, const void* residual_, void* y_, int64_t m) {
    if (w.k > Rows::most_inputs) return DKS_DECLINED;
    if (m == 0) return DKS_OK;
    const auto* x = static_cast<const X*>(x_);
    const auto* residual = static_cast<const X*>(residual_);
    auto* y = static_cast<X*>(y_);
    const int64_t tiles = (m + MR - 1) / MR, panels = (w.n + NR - 1) / NR;
    const int64_t parts = w.by_rows ? tiles : panels;
    const int threads = static_cast<int>(w.threads < parts ? w.threads : parts);
    const int64_t chunks = (w.k + Rows::chunk - 1) / Rows::chunk, groups = (w.k + Rows::group - 1) / Rows::group;
    const int64_t block = KC > 0 && KC < w.k ? KC / Rows::chunk : chunks;
    const bool blocked = block < chunks;
    const int64_t factor_bytes = (m * 4 + 63) / 64 * 64, packed_bytes = m * chunks * chunk_bytes;
    const int64_t sums = (blocked ? m : MR) * NR;
    auto* memory = static_cast<char*>(
        scratch(static_cast<std::size_t>(factor_bytes + packed_bytes + threads * sums * int64_t{sizeof(Sum)})));
    if (memory == nullptr) return DKS_NO_MEMORY;
    auto* factors = reinterpret_cast<float*>(memory);
    char* packed = memory + factor_bytes;
    std::atomic<bool> declined{false};
    parallel(threads, [&](int thread, int count) {
      const Span all_tiles{0, tiles}, all_panels{0, panels};
      const Span mine = w.by_rows ? share(tiles, 1, thread, count) : all_tiles;
      const Span columns = w.by_rows ? all_panels : share(panels, 1, thread, count);
      const Span rows =
          w.by_rows ? Span{row(mine.begin, m, tiles), row(mine.end, m, tiles)} : share(m, 1, thread, count);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t begin = row(t, m, tiles), end = row(t + 1, m, tiles), apart = (end - begin) * chunk_bytes;
        for (int64_t r = begin < rows.begin ? rows.begin : begin; r < end && r < rows.end; ++r) {
          char* out = packed + begin * chunks * chunk_bytes + (r - begin) * chunk_bytes;
          factors[r] = Rows::pack(x + r * w.k, w.k, out, apart);
          if (factors[r] != factors[r]) declined = true;
        }
      }
      if (!w.by_rows) barrier(count);
      if (declined) return;
      Sum* own = reinterpret_cast<Sum*>(packed + packed_bytes) + thread * sums;
      const int64_t turns = mine.end - mine.begin;
      for (int64_t p = columns.begin; p < columns.end; ++p) {
        for (int64_t c = 0; c < chunks; c += block) {
          const bool begins = c == 0, ends = c + block >= chunks, last = ends && p + 1 == columns.end;
          const int64_t first = c * 16, depth = (ends ? groups : first + block * 16) - first;
          const char* weights = static_cast<const char*>(w.weight) + (p * groups + first) * group_bytes;
          for (int64_t t = mine.begin; t < mine.end; ++t) {
            const int64_t r = row(t, m, tiles), n = row(t + 1, m, tiles) - r;
            Tile tile{};
            tile.x = packed + (r * chunks + c * n) * chunk_bytes;
            tile.weights = weights;
            tile.groups = depth;
            tile.sums = own + (blocked ? r * NR : 0);
            tile.begins = begins ? &w : nullptr;
            tile.column = p * NR;
            if (PF > 0) {
              // Nothing follows this thread's last block: its row tiles have no turn then.
              if (turns == 1) tile.ahead = {PF * 4 * group_bytes, 0, 1};
              if (turns > 1) tile.ahead = {depth * group_bytes, last ? depth : t - mine.begin, turns};
            }
            Tiles<MR>::run(n, tile);
            if (ends) write_rows<Rows>(w, tile.sums, NR, factors, r, n, p * NR, residual, y);
          }
        }
      }
    });
    return declined ? DKS_DECLINED : DKS_OK;
  }

 private:
  struct Tile {
    const char* x;
    const char* weights;
    int64_t groups;
    Sum* sums;
    const dks_linear* begins;  // null where sums go on
    int64_t column;
    Ahead ahead;
  };

  // The first row of a tile: rows are shared out evenly, since a tile of few rows is as long as a whole one.
  static int64_t row(int64_t tile, int64_t m, int64_t tiles) { return m * tile / tiles; }

  // The loop for exactly R rows, chosen by the number of rows there are.
  template <int R, class = void>
  struct Tiles {
    static void run(int64_t rows, const Tile& t) {
      if (rows == R) {
        multiply(t);
      } else {
        Tiles<R - 1>::run(rows, t);
      }
    }

    static void multiply(const Tile& t) {
      Vector sum[R][NV];
#pragma GCC unroll 32
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) {
          sum[i][j] = t.begins != nullptr ? Dot::start(*t.begins, t.column + j * 16) : Dot::load(t.sums + i * NR + j * 16);
        }
      }
      const char *x = t.x, *weights = t.weights;
      const auto step = [&](int g) {
        __m512i row[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) row[j] = _mm512_loadu_si512(weights + g * group_bytes + j * 64);
#pragma GCC unroll 32
        for (int i = 0; i < R; ++i) {
          int32_t group;
          std::memcpy(&group, x + i * chunk_bytes + g * 4, 4);
          const __m512i value = _mm512_set1_epi32(group);
#pragma GCC unroll 8
          for (int j = 0; j < NV; ++j) sum[i][j] = Dot::dot(sum[i][j], value, row[j]);
        }
      };
      Ahead ahead = t.ahead;
      int64_t left = t.groups;
      for (; left >= 16; left -= 16, x += (R - 1) * chunk_bytes) {
        for (int quadruple = 0; quadruple < 4; ++quadruple, x += 16, weights += 4 * group_bytes) {
          if (PF > 0) ahead.template fetch<4 * NV>(weights);
          step(0);
          step(1);
          step(2);
          step(3);
        }
      }
      for (; left > 0; --left, x += 4, weights += group_bytes) step(0);
#pragma GCC unroll 32
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) Dot::store(t.sums + i * NR + j * 16, sum[i][j]);
      }
    }
  };

  template <class Unused>
  struct Tiles<0, Unused> {
    static void run(int64_t, const Tile&) {}
  };
};

}  // namespace dks
