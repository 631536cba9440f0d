// What one core of this machine can do at most: multiply-adds in registers, and bytes read from memory.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

#if defined(__AVX512F__)
using Floats = __m512;
using Ints = __m512i;
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Ints sum(Ints a, Ints b) { return _mm512_add_epi64(a, b); }
inline Ints load(const char* p) { return _mm512_loadu_si512(p); }
#else
using Floats = __m256;
using Ints = __m256i;
inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Ints sum(Ints a, Ints b) { return _mm256_add_epi64(a, b); }
inline Ints load(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const Ints*>(p)); }
#endif

constexpr int kChains = 12;  // two units, four to five cycles each: ten keep both busy
constexpr int kStreams = 8;

#if defined(__AMX_TILE__)
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Every tile full: 16 rows of 64 bytes. False where the system does not let this process use them.
bool begin_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  return true;
}
#endif

}  // namespace

// Each function returns 0, or 1 where this process may not use what it needs.

// At least `count` multiply-adds in fp32.
EXPORT int roof_fma_fp32(int64_t count) {
  constexpr int64_t kStep = kChains * int64_t{sizeof(Floats) / sizeof(float)};
  const Floats a = all(0.5f), b = all(1.0f);
  Floats chain[kChains];
  for (auto& each : chain) each = b;
  for (int64_t i = 0; i < count; i += kStep) {
#pragma GCC unroll 12
    for (auto& each : chain) each = fma(each, a, b);
  }
  // The compiler must believe that somebody looks at the results.
  for (auto& each : chain) asm volatile("" : : "v"(each));
  return 0;
}

// Reads `size` bytes, a multiple of 512, and adds them up.
EXPORT int roof_read(const char* from, int64_t size) {
  constexpr int64_t kVector = sizeof(Ints);
  Ints total[kStreams] = {};
  for (int64_t i = 0; i < size; i += kStreams * kVector) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) total[s] = sum(total[s], load(from + i + s * kVector));
  }
  for (auto& each : total) asm volatile("" : : "v"(each));
  return 0;
}

#if defined(__AMX_BF16__)
// At least `count` multiply-adds of bf16.
EXPORT int roof_amx_bf16(int64_t count) {
  if (!begin_tiles()) return 1;
  for (int64_t i = 0; i < count; i += 4 * 16 * 16 * 32) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 0;
}
#endif

#if defined(__AMX_INT8__)
// At least `count` multiply-adds of int8.
EXPORT int roof_amx_int8(int64_t count) {
  if (!begin_tiles()) return 1;
  for (int64_t i = 0; i < count; i += 4 * 16 * 16 * 64) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return 0;
}
#endif
