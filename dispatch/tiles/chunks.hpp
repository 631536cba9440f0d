// What the dot-product and the tile instructions share: rows of x as chunks of 64 bytes in their own element, and
// how sums of products become outputs.
//
// x is always rewritten into chunks (once a call, shared out among the threads): quantised or narrowed it must be
// anyway, and behind one another the chunks of a tile's rows lie at fixed distances, so that one pointer serves
// them all, no cache set is hit by every row, and rows that end inside a chunk are filled up with zeros.
#pragma once

#include <limits>

#include "abi.h"
#include "math.hpp"
#include "simd.hpp"

namespace dks {

constexpr int64_t chunk_bytes = DKS_CHUNK;

// One vector of n inputs; zeros behind them, n <= 0 included.
template <class X>
inline Avx512 load_some(const X* x, int64_t n) {
  return n >= Avx512::width ? Avx512::load(x) : n > 0 ? Avx512::load(x, n) : Avx512::zero();
}

// int8 with one scale a row, chosen from the row itself: integer sums of products, times the row's largest value,
// 1/127 and the output channel's scale. FLIP is added to every byte modulo 256: 128 makes them unsigned.
template <int FLIP>
struct Int8Rows {
  using Sum = int32_t;
  static constexpr int group = 4;   // inputs that one instruction lane multiplies
  static constexpr int chunk = 64;  // inputs of a chunk
  // 127 * 127 * k must fit the sums' 32 bits; a greater intermediate wraps around and back.
  static constexpr int64_t most_inputs = int64_t{1} << 17;

  // Write a row of k inputs as chunks `stride` bytes apart. Returns the row's factor, NaN where a value is not
  // finite. The factor is the largest magnitude itself: a 127th of a denormal would lose its last bits.
  template <class X>
  static float pack(const X* x, int64_t k, char* out, int64_t stride) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512(), more = most;
    int64_t j = 0;
    for (; j + 32 <= k; j += 32) {
      most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(Avx512::load(x + j).v), magnitude));
      more = _mm512_max_epi32(more, _mm512_and_si512(_mm512_castps_si512(Avx512::load(x + j + 16).v), magnitude));
    }
    for (; j < k; j += 16) {
      most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(load_some(x + j, k - j).v), magnitude));
    }
    const int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(most, more));
    if (bits >= 0x7f800000) return std::numeric_limits<float>::quiet_NaN();
    float largest;
    std::memcpy(&largest, &bits, 4);
    // The reciprocal of something tiny overflows: such rows are lifted by a power of two first.
    const float lift = largest < 1e-30f ? 0x1p64f : 1.0f;
    const Avx512 up = Avx512::of(lift), inverse = Avx512::of(largest > 0.0f ? 127.0f / (largest * lift) : 0.0f);
    for (j = 0; j + chunk <= k; j += chunk, out += stride) {
      const X* p = x + j;
      store(out, up, inverse, Avx512::load(p), Avx512::load(p + 16), Avx512::load(p + 32), Avx512::load(p + 48));
    }
    if (j < k) {
      const X* p = x + j;
      const int64_t n = k - j;
      store(out, up, inverse, load_some(p, n), load_some(p + 16, n - 16), load_some(p + 32, n - 32),
            load_some(p + 48, n - 48));
    }
    return largest;
  }

  static Avx512 value(const Sum* sum, float factor, const float* scale, int64_t n) {
    const Avx512 whole{_mm512_cvtepi32_ps(_mm512_loadu_si512(sum))};
    return whole * load_some(scale, n) * Avx512::of(1.0f / 127) * Avx512::of(factor);
  }

 private:
  static void store(char* out, Avx512 up, Avx512 inverse, Avx512 a, Avx512 b, Avx512 c, Avx512 d) {
    const auto whole = [&](Avx512 x) { return _mm512_cvtps_epi32((x * up * inverse).v); };
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(whole(a), whole(b)),
                                             _mm512_packs_epi32(whole(c), whole(d)));
    // Packing works on each quarter of a register: put a's quarters first, then b's.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(FLIP));
    _mm512_storeu_si512(out, _mm512_xor_si512(_mm512_permutexvar_epi32(order, bytes), flip));
  }
};

// bf16: pairs are multiplied, sums are float.
struct Bf16Rows {
  using Sum = float;
  static constexpr int group = 2;
  static constexpr int chunk = 32;
  static constexpr int64_t most_inputs = std::numeric_limits<int64_t>::max();

  template <class X>
  static float pack(const X* x, int64_t k, char* out_, int64_t stride) {
    for (int64_t j = 0; j < k; j += chunk, out_ += stride) {
      auto* out = reinterpret_cast<bf16*>(out_);
      if constexpr (sizeof(X) == sizeof(bf16)) {
        const int64_t n = k - j;
        const __mmask32 in = n >= chunk ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
        _mm512_storeu_si512(out, _mm512_maskz_loadu_epi16(in, x + j));
      } else {
        load_some(x + j, k - j).store(out);
        load_some(x + j + 16, k - j - 16).store(out + 16);
      }
    }
    return 1.0f;
  }

  static Avx512 value(const Sum* sum, float, const float*, int64_t) { return Avx512::load(sum); }
};

// Finish rows of sums that lie `stride` apart: outputs column..column+stride of y's rows, those that there are.
// FIXED is the epilogue where it is known, else -1.
template <class Rows, int FIXED, class X>
__attribute__((noinline, flatten)) void write_rows_of(const dks_linear& linear, const typename Rows::Sum* sums,
                                                      int64_t stride, const float* factors, int64_t row, int64_t rows,
                                                      int64_t column, const X* residual, X* y) {
  dks_linear w = linear;  // a copy that no store to y may change: what is known of it stays known
  if (FIXED >= 0) w.epilogue = FIXED;
  const int64_t columns = w.n - column < stride ? w.n - column : stride;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += Avx512::width) {
      const int64_t n = columns - j, at = (row + i) * w.n + column + j;
      const Avx512 sum = Rows::value(sums + i * stride + j, factors[row + i], w.scale + column + j, n);
      finish(sum, w, column + j, residual == nullptr ? nullptr : residual + at, y + at, n);
    }
  }
}

// The same, with a loop of its own for what takes no time itself.
template <class Rows, class X>
inline void write_rows(const dks_linear& w, const typename Rows::Sum* sums, int64_t stride, const float* factors,
                       int64_t row, int64_t rows, int64_t column, const X* residual, X* y) {
  if (w.epilogue == DKS_NONE) {
    write_rows_of<Rows, DKS_NONE>(w, sums, stride, factors, row, rows, column, residual, y);
  } else {
    write_rows_of<Rows, -1>(w, sums, stride, factors, row, rows, column, residual, y);
  }
}

// Prefetching of weights inside a loop over them. One row tile prefetches a fixed way ahead. Where several read
// the same block of weights one after another, each fetches its part of the next block while this one is
// multiplied, so that memory never waits for the arithmetic.
struct Ahead {
  int64_t distance;  // bytes ahead of what is being read
  int64_t turn;      // the block's pieces are fetched by its row tiles in turn: how many go before the first
  int64_t turns;

  template <int LINES>
  void fetch(const char* reading) {
    if (--turn >= 0) return;
    turn = turns - 1;
#pragma GCC unroll 32
    for (int line = 0; line < LINES; ++line) _mm_prefetch(reading + distance + line * 64, _MM_HINT_T1);
  }
};

}  // namespace dks
