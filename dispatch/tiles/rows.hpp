// Operators that work row by row: layer_norm, rms_norm and softmax, in float whatever the element. A row is read
// several times, from the cache after the first; ROWS rows go together so that one row's reductions, all latency,
// hide behind another's.
//
// UNROLL: vectors of a row in flight, each with an accumulator of its own. ROWS: rows of a step; the rows that are
// left over go one by one with as many vectors in flight as a step has.
#pragma once

#include <atomic>
#include <cmath>
#include <limits>

#include "abi.h"
#include "math.hpp"
#include "scratch.hpp"
#include "threads.hpp"

namespace dks {

// A whole vector of a row, or the first n of one.
template <class V>
struct Whole {
  template <class X>
  V load(const X* p) const {
    return V::load(p);
  }
  template <class X>
  void store(V v, X* p) const {
    v.store(p);
  }
  V or_else(V v, V) const { return v; }
};

template <class V>
struct First {
  int64_t n;
  template <class X>
  V load(const X* p) const {
    return V::load(p, n);
  }
  template <class X>
  void store(V v, X* p) const {
    v.store(p, n);
  }
  V or_else(V v, V other) const { return head(v, n, other); }
};

// body(j, at, part) for every vector of n elements: `at` where it begins, `part` how much of it there is, and j
// below UNROLL the accumulator it belongs to.
template <class V, int UNROLL, class Body>
__attribute__((always_inline)) inline void sweep(int64_t n, const Body& body) {
  int64_t at = 0;
  for (; at + UNROLL * V::width <= n; at += UNROLL * V::width) {
#pragma GCC unroll 16
    for (int j = 0; j < UNROLL; ++j) body(j, at + j * V::width, Whole<V>{});
  }
#pragma GCC unroll 16
  for (int j = 0; j < UNROLL - 1; ++j) {
    if (at + V::width <= n) {
      body(j, at, Whole<V>{});
      at += V::width;
    }
  }
  if (at < n) body(UNROLL - 1, at, First<V>{n - at});
}

#define DKS_INLINE __attribute__((always_inline))

// The accumulators of R rows.
template <class V, int R, int UNROLL>
struct Accumulators {
  V lane[R][UNROLL];

  explicit Accumulators(V start) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < UNROLL; ++j) lane[i][j] = start;
    }
  }
  // All of a row in one vector.
  template <class Join>
  V joined(int i, const Join& join) const {
    V all = lane[i][0];
#pragma GCC unroll 16
    for (int j = 1; j < UNROLL; ++j) all = join(all, lane[i][j]);
    return all;
  }
  float sum(int i) const {
    return joined(i, [](V a, V b) { return a + b; }).sum();
  }
  float largest(int i) const {
    return joined(i, [](V a, V b) { return max(a, b); }).largest();
  }
};

template <int R, int U>
struct Step {
  static constexpr int rows = R, unroll = U;
};

// body(row, step) for all m rows on up to `threads` threads.
template <int UNROLL, int ROWS, class Body>
inline void by_rows(int64_t m, int32_t threads, const Body& body) {
  const int64_t steps = (m + ROWS - 1) / ROWS;
  parallel(static_cast<int>(threads < steps ? threads : steps), [&](int thread, int count) {
    const Span mine = share(m, ROWS, thread, count);
    int64_t row = mine.begin;
    for (; row + ROWS <= mine.end; row += ROWS) body(row, Step<ROWS, UNROLL>{});
    for (; row < mine.end; ++row) body(row, Step<1, ROWS * UNROLL>{});
  });
}

// MEAN: layer_norm, which takes the mean away; else rms_norm. The squares are summed around the mean in a pass of
// their own, since E[x^2] - E[x]^2 cancels where the mean is large. AHEAD: while a step is written, the next one is
// fetched into the cache, for rows that come from beyond it.
template <class V, class X, int UNROLL, int ROWS, bool AHEAD, bool MEAN>
struct Norm {
  static int run(const dks_norm& w, const void* x, const void* residual, void* y, void* sum, int64_t m) {
    const Call call{w, static_cast<const X*>(x), static_cast<const X*>(residual), static_cast<X*>(y),
                    static_cast<X*>(sum)};
    by_rows<UNROLL, ROWS>(m, w.threads, [&](int64_t row, auto step) { normalise<decltype(step)>(call, row); });
    return DKS_OK;
  }

 private:
  struct Call {
    const dks_norm& w;
    const X* x;
    const X* residual;
    X* y;
    X* sum;
  };

  static void prefetch(const X* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

  template <class Step>
  __attribute__((noinline)) static void normalise(const Call& call, int64_t row) {
    constexpr int R = Step::rows, U = Step::unroll;
    const int64_t n = call.w.n, begin = row * n;
    const X* x = call.x + begin;
    X* y = call.y + begin;
    if (call.residual != nullptr) {
      // The sum is rounded to the element, so it is written first; y has room for it where nobody asked for it.
      X* h = call.sum != nullptr ? call.sum + begin : y;
      sweep<V, U>(R * n, [&](int, int64_t at, auto part) DKS_INLINE {
        part.store(part.template load(x + at) + part.load(call.residual + begin + at), h + at);
      });
      x = h;
    }
    V mean[R], scale[R];
    if (MEAN) {
      Accumulators<V, R, U> sums(V::zero());
      sweep<V, U>(n, [&](int j, int64_t at, auto part) DKS_INLINE {
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) sums.lane[i][j] = sums.lane[i][j] + part.load(x + i * n + at);
      });
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) mean[i] = V::of(sums.sum(i) / static_cast<float>(n));
    }
    Accumulators<V, R, U> squares(V::zero());
    sweep<V, U>(n, [&](int j, int64_t at, auto part) DKS_INLINE {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        V value = part.load(x + i * n + at);
        if (MEAN) value = part.or_else(value - mean[i], V::zero());
        squares.lane[i][j] = fma(value, value, squares.lane[i][j]);
      }
    });
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      scale[i] = V::of(1.0f / std::sqrt(squares.sum(i) / static_cast<float>(n) + call.w.eps));
    }
    const auto* weight = static_cast<const X*>(call.w.weight);
    const auto* bias = static_cast<const X*>(call.w.bias);
    const int64_t next = begin + R * n;
    sweep<V, U>(n, [&](int, int64_t at, auto part) DKS_INLINE {
      if (AHEAD) {
        for (int i = 0; i < R; ++i) prefetch(call.x + next + i * n + at);
        if (call.residual != nullptr) {
          for (int i = 0; i < R; ++i) prefetch(call.residual + next + i * n + at);
        }
      }
      const V factor = weight != nullptr ? part.load(weight + at) : V::of(1.0f);
      const V shift = bias != nullptr ? part.load(bias + at) : V::zero();
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        V value = part.load(x + i * n + at);
        if (MEAN) value = value - mean[i];
        part.store(fma(value * scale[i], factor, shift), y + i * n + at);
      }
    });
  }
};

template <class V, class X, int UNROLL, int ROWS, bool AHEAD>
using LayerNorm = Norm<V, X, UNROLL, ROWS, AHEAD, true>;
template <class V, class X, int UNROLL, int ROWS, bool AHEAD>
using RmsNorm = Norm<V, X, UNROLL, ROWS, AHEAD, false>;

template <class V, class X, int UNROLL, int ROWS>
struct Softmax {
  static int run(const void* x_, void* y_, int64_t m, int64_t n, int32_t threads) {
    const auto* x = static_cast<const X*>(x_);
    auto* y = static_cast<X*>(y_);
    std::atomic<int> result{DKS_OK};
    by_rows<UNROLL, ROWS>(m, threads, [&](int64_t row, auto step) {
      float* powers = room(y + row * n, decltype(step)::rows * n);
      if (powers != nullptr) {
        softmax<decltype(step)>(x + row * n, powers, y + row * n, n);
      } else {
        result = DKS_NO_MEMORY;
      }
    });
    return result;
  }

 private:
  // Where the powers of some rows are kept until their sum is known: in place where they are not rounded.
  static float* room(float* y, int64_t) { return y; }
  static float* room(bf16*, int64_t count) { return static_cast<float*>(scratch(count * sizeof(float))); }

  template <class Step>
  __attribute__((noinline)) static void softmax(const X* x, float* powers, X* y, int64_t n) {
    constexpr int R = Step::rows, U = Step::unroll;
    const V lowest = V::of(-std::numeric_limits<float>::infinity());
    Accumulators<V, R, U> tops(lowest);
    // A NaN may get lost here: its power is one as well, and so is the sum.
    sweep<V, U>(n, [&](int j, int64_t at, auto part) DKS_INLINE {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        tops.lane[i][j] = max(tops.lane[i][j], part.or_else(part.load(x + i * n + at), lowest));
      }
    });
    V top[R], scale[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) top[i] = V::of(tops.largest(i));
    Accumulators<V, R, U> sums(V::zero());
    sweep<V, U>(n, [&](int j, int64_t at, auto part) DKS_INLINE {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const V power = exp(part.load(x + i * n + at) - top[i]);
        part.store(power, powers + i * n + at);
        sums.lane[i][j] = sums.lane[i][j] + part.or_else(power, V::zero());
      }
    });
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) scale[i] = V::of(1.0f / sums.sum(i));
    sweep<V, U>(n, [&](int, int64_t at, auto part) DKS_INLINE {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) part.store(part.load(powers + i * n + at) * scale[i], y + i * n + at);
    });
  }
};

}  // namespace dks
