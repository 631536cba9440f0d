// The tile registers (AMX), and in DKS_EMULATE a plain form of them for machines without: it has the same state
// and ends the process where hardware would fault or where a shape was not configured.
//
// A tile is up to 16 rows of up to 64 bytes. a * b -> c multiplies rows of a with columns of b, whose rows hold
// groups of 4 int8 or 2 bf16 of each column: b's row r, bytes 4c..4c+3 are column c of inputs group * r onwards.
// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1 chapter 18 and volume 2 (TDPBSSD,
// TDPBF16PS); permission: Linux, Documentation/arch/x86/xstate.rst.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef DKS_EMULATE
#include <cstdio>
#include <cstdlib>

#include "simd.hpp"
#else
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dks {
namespace amx {

// What LDTILECFG reads.
struct alignas(64) Config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Config) == 64, "the instruction's operand");

#ifdef DKS_EMULATE

struct State {
  bool configured = false;
  Config config;
  char tile[8][16][64];
};

inline State& state() {
  static thread_local State one;
  return one;
}

inline void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

inline bool permitted() { return true; }

inline void configure(const Config& config) {
  expect(config.palette == 1 && config.start_row == 0, "expected palette 1 from row 0");
  for (int t = 0; t < 16; ++t) {
    expect((config.rows[t] == 0) == (config.row_bytes[t] == 0), "a tile has rows and bytes, or neither");
    expect(t < 8 || config.rows[t] == 0, "there are 8 tiles");
    expect(config.rows[t] <= 16 && config.row_bytes[t] <= 64, "a tile has at most 16 rows of 64 bytes");
  }
  state().configured = true;
  state().config = config;
  std::memset(state().tile, 0, sizeof state().tile);
}

inline void release() { state().configured = false; }

inline void expect_tile(int t) { expect(state().configured && state().config.rows[t] > 0, "a tile is not configured"); }

template <int T>
inline void zero() {
  expect_tile(T);
  std::memset(state().tile[T], 0, sizeof state().tile[T]);
}

template <int T>
inline void load(const void* from, int64_t stride) {
  expect_tile(T);
  std::memset(state().tile[T], 0, sizeof state().tile[T]);
  for (int r = 0; r < state().config.rows[T]; ++r) {
    std::memcpy(state().tile[T][r], static_cast<const char*>(from) + r * stride, state().config.row_bytes[T]);
  }
}

template <int T>
inline void store(void* to, int64_t stride) {
  expect_tile(T);
  for (int r = 0; r < state().config.rows[T]; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, state().tile[T][r], state().config.row_bytes[T]);
  }
}

template <int C, int A, int B, class Sum, class Element>
inline void multiply() {
  static_assert(A != B && A != C && B != C, "the three tiles differ");
  expect_tile(A);
  expect_tile(B);
  expect_tile(C);
  const Config& config = state().config;
  expect(config.rows[A] == config.rows[C] && config.row_bytes[B] == config.row_bytes[C] &&
             config.row_bytes[A] == 4 * config.rows[B],
         "shapes of a product do not fit");
  constexpr int group = 4 / sizeof(Element);
  const auto wide = [](Element x) {
    if constexpr (sizeof(Element) == 1) {
      return static_cast<Sum>(x);
    } else {
      return to_float(x);
    }
  };
  for (int r = 0; r < config.rows[C]; ++r) {
    for (int c = 0; c < config.row_bytes[C] / 4; ++c) {
      Sum sum;
      std::memcpy(&sum, state().tile[C][r] + 4 * c, 4);
      for (int k = 0; k < config.rows[B]; ++k) {
        Element a[group], b[group];
        std::memcpy(a, state().tile[A][r] + 4 * k, 4);
        std::memcpy(b, state().tile[B][k] + 4 * c, 4);
        for (int i = 0; i < group; ++i) sum += wide(a[i]) * wide(b[i]);
      }
      std::memcpy(state().tile[C][r] + 4 * c, &sum, 4);
    }
  }
}

template <int C, int A, int B>
inline void dot_int8() {
  multiply<C, A, B, int32_t, int8_t>();
}

template <int C, int A, int B>
inline void dot_bf16() {
  multiply<C, A, B, float, bf16>();
}

#else

// Linux gives tiles only to processes that asked, since they enlarge what a context switch and a signal save.
// Asked once; the answer holds for all threads.
inline bool permitted() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, request, tile_data) == 0;
  return granted;
}

// Assembly rather than intrinsics: those of GCC take no template's constant as a tile's number, and do not say
// that they read memory, so that stores before them may be moved behind.
inline void configure(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }

inline void release() { asm volatile("tilerelease" ::: "memory"); }

template <int T>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

template <int T>
inline void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
inline void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

template <int C, int A, int B>
inline void dot_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

template <int C, int A, int B>
inline void dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace amx
}  // namespace dks
