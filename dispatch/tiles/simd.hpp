// Vectors of floats, one class an instruction set with the same names, and the 16-bit floats beside them.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace dks {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

struct Avx512 {
  static constexpr int width = 16;
  static constexpr int registers = 32;
  __m512 v;

  static Avx512 of(float x) { return {_mm512_set1_ps(x)}; }
  static Avx512 zero() { return {_mm512_setzero_ps()}; }
  static __mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }

  static Avx512 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Avx512 load(const bf16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Avx512 load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  // A vector of bytes as the int4 numbers of their low and high halves, less 8.
  static void load_int4(const uint8_t* p, Avx512& low, Avx512& high) {
    // A look-up reads the low 4 bits of an index.
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    low = {_mm512_permutexvar_ps(wide, values)};
    high = {_mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), values)};
  }
  // The first n of a vector, 0 < n; zero behind them, and nothing behind them is read.
  static Avx512 load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Avx512 load(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
  // 2 * width elements, or the first n > 0 of them, as two vectors in the order that is quickest to read:
  // `store_pair` has the same. Zeros behind them.
  static void load_pair(const float* p, Avx512& a, Avx512& b) { a = load(p), b = load(p + width); }
  static void load_pair(const bf16* p, Avx512& a, Avx512& b) { split(_mm512_loadu_si512(p), a, b); }
  static void load_pair(const float* p, int64_t n, Avx512& a, Avx512& b) {
    a = load(p, n);
    b = n > width ? load(p + width, n - width) : zero();
  }
  static void load_pair(const bf16* p, int64_t n, Avx512& a, Avx512& b) {
    split(_mm512_maskz_loadu_epi16(first_halves(n), p), a, b);
  }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store(bf16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), narrow()); }
  static void store_pair(float* p, int64_t n, Avx512 a, Avx512 b) {
    a.store(p, n);
    if (n > width) b.store(p + width, n - width);
  }
  static void store_pair(bf16* p, int64_t n, Avx512 a, Avx512 b) {
    const __m512i even = _mm512_srli_epi32(a.rounded(), 16);
    const __m512i odd = _mm512_and_si512(b.rounded(), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    _mm512_mask_storeu_epi16(p, first_halves(n), _mm512_or_si512(even, odd));
  }

  friend Avx512 operator+(Avx512 a, Avx512 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Avx512 operator-(Avx512 a, Avx512 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Avx512 operator*(Avx512 a, Avx512 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Avx512 operator/(Avx512 a, Avx512 b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Avx512 fma(Avx512 a, Avx512 b, Avx512 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  // The second operand where one is NaN, as the instructions have it.
  friend Avx512 max(Avx512 a, Avx512 b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend Avx512 min(Avx512 a, Avx512 b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend Avx512 sqrt(Avx512 a) { return {_mm512_sqrt_ps(a.v)}; }
  friend Avx512 abs(Avx512 a) { return {_mm512_abs_ps(a.v)}; }
  friend Avx512 round(Avx512 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // a * 2^n for whole n of any size; overflows to infinity and underflows to zero.
  friend Avx512 scale(Avx512 a, Avx512 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
  // a where x < 0, else b; b for NaN.
  friend Avx512 if_negative(Avx512 x, Avx512 a, Avx512 b) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LT_OQ), b.v, a.v)};
  }
  // The first n lanes of a, the others of b.
  friend Avx512 head(Avx512 a, int64_t n, Avx512 b) { return {_mm512_mask_blend_ps(first(n), b.v, a.v)}; }
  float sum() const { return _mm512_reduce_add_ps(v); }
  // NaN lanes may be lost.
  float largest() const { return _mm512_reduce_max_ps(v); }
  // Lane i is the sum of x[i]'s lanes.
  static Avx512 sums(const Avx512 (&x)[width]) {
    const auto four = [&](int i) {
      const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x[i].v, x[i + 1].v), _mm512_unpackhi_ps(x[i].v, x[i + 1].v));
      const __m512 cd =
          _mm512_add_ps(_mm512_unpacklo_ps(x[i + 2].v, x[i + 3].v), _mm512_unpackhi_ps(x[i + 2].v, x[i + 3].v));
      return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    };
    const auto fold = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return {fold(fold(four(0), four(4)), fold(four(8), four(12)))};
  }

 private:
  static __mmask32 first_halves(int64_t n) { return static_cast<__mmask32>(n >= 32 ? ~0u : (1u << n) - 1); }
  static Avx512 widen(__m256i half) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  // Even elements and odd ones: one instruction each.
  static void split(__m512i both, Avx512& even, Avx512& odd) {
    even = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
    odd = {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
  }
  // To nearest, ties to even, in the high half; NaN stays NaN.
  __m512i rounded() const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_blend_epi32(nan, near, _mm512_set1_epi32(0x7fc00000));
  }
  __m256i narrow() const { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(), 16)); }
};

struct Avx2 {
  static constexpr int width = 8;
  static constexpr int registers = 16;
  __m256 v;

  static Avx2 of(float x) { return {_mm256_set1_ps(x)}; }
  static Avx2 zero() { return {_mm256_setzero_ps()}; }
  static __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n > 8 ? 8 : n)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static Avx2 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Avx2 load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Avx2 load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  static void load_int4(const uint8_t* p, Avx2& low, Avx2& high) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i eight = _mm256_set1_epi32(8), half = _mm256_and_si256(wide, _mm256_set1_epi32(15));
    low = {_mm256_cvtepi32_ps(_mm256_sub_epi32(half, eight))};
    high = {_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(wide, 4), eight))};
  }
  static Avx2 load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
  static Avx2 load(const bf16* p, int64_t n) {
    __m128i half = _mm_setzero_si128();
    std::memcpy(&half, p, static_cast<std::size_t>(2 * (n > 8 ? 8 : n)));
    return widen(half);
  }
  static void load_pair(const float* p, Avx2& a, Avx2& b) { a = load(p), b = load(p + width); }
  static void load_pair(const bf16* p, Avx2& a, Avx2& b) {
    split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), a, b);
  }
  static void load_pair(const float* p, int64_t n, Avx2& a, Avx2& b) {
    a = load(p, n);
    b = n > width ? load(p + width, n - width) : zero();
  }
  static void load_pair(const bf16* p, int64_t n, Avx2& a, Avx2& b) {
    __m256i both = _mm256_setzero_si256();
    std::memcpy(&both, p, static_cast<std::size_t>(2 * (n > 16 ? 16 : n)));
    split(both, a, b);
  }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow()); }
  void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
  void store(bf16* p, int64_t n) const {
    const __m128i half = narrow();
    std::memcpy(static_cast<void*>(p), &half, static_cast<std::size_t>(2 * (n > 8 ? 8 : n)));
  }
  static void store_pair(float* p, int64_t n, Avx2 a, Avx2 b) {
    a.store(p, n);
    if (n > width) b.store(p + width, n - width);
  }
  static void store_pair(bf16* p, int64_t n, Avx2 a, Avx2 b) {
    const __m256i even = _mm256_srli_epi32(a.rounded(), 16);
    const __m256i odd = _mm256_and_si256(b.rounded(), _mm256_set1_epi32(static_cast<int>(0xffff0000)));
    const __m256i both = _mm256_or_si256(even, odd);
    std::memcpy(static_cast<void*>(p), &both, static_cast<std::size_t>(2 * (n > 16 ? 16 : n)));
  }

  friend Avx2 operator+(Avx2 a, Avx2 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Avx2 operator-(Avx2 a, Avx2 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Avx2 operator*(Avx2 a, Avx2 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Avx2 operator/(Avx2 a, Avx2 b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Avx2 fma(Avx2 a, Avx2 b, Avx2 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend Avx2 max(Avx2 a, Avx2 b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend Avx2 min(Avx2 a, Avx2 b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend Avx2 sqrt(Avx2 a) { return {_mm256_sqrt_ps(a.v)}; }
  friend Avx2 abs(Avx2 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  friend Avx2 round(Avx2 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  friend Avx2 scale(Avx2 a, Avx2 n) {
    // In two halves, since 2^n itself may lie outside the normal numbers; 300 is far outside either way.
    n = min(of(300.0f), max(of(-300.0f), n));
    const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const auto power = [&](__m256i e) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, bias), 23));
    };
    // Halves of +-150 leave 8 bits of exponent: a third step keeps each inside +-100.
    const __m256i a1 = _mm256_srai_epi32(half, 1), a2 = _mm256_sub_epi32(half, a1);
    return {_mm256_mul_ps(
        _mm256_mul_ps(_mm256_mul_ps(a.v, power(a1)), power(a2)), power(_mm256_sub_epi32(whole, half)))};
  }
  friend Avx2 if_negative(Avx2 x, Avx2 a, Avx2 b) {
    return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_LT_OQ))};
  }
  friend Avx2 head(Avx2 a, int64_t n, Avx2 b) {
    return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(first(n)))};
  }
  float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  float largest() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static Avx2 sums(const Avx2 (&x)[width]) {
    const auto four = [&](int i) {
      const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(x[i].v, x[i + 1].v), _mm256_unpackhi_ps(x[i].v, x[i + 1].v));
      const __m256 cd =
          _mm256_add_ps(_mm256_unpacklo_ps(x[i + 2].v, x[i + 3].v), _mm256_unpackhi_ps(x[i + 2].v, x[i + 3].v));
      return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    };
    const __m256 low = four(0), high = four(4);
    return {_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31))};
  }

 private:
  static Avx2 widen(__m128i half) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static void split(__m256i both, Avx2& even, Avx2& odd) {
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
  }
  __m256i rounded() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(near, _mm256_set1_epi32(0x7fc00000), nan);
  }
  __m128i narrow() const {
    const __m256i high = _mm256_srli_epi32(rounded(), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
};

}  // namespace dks
