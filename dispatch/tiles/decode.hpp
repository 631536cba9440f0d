// Attention of one query row a sequence, over keys and values that lie contiguously or in pages.
//
// The keys are read once, in blocks of BLOCK: the scores of a block, its part of the softmax with the largest
// score so far (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018), its values summed up.
// All query heads of one key head share what is read. Elements are widened as they are read; sums are floats.
#pragma once

#include <cmath>
#include <limits>

#include "abi.h"
#include "math.hpp"
#include "scratch.hpp"
#include "threads.hpp"

namespace dks {

// BLOCK: keys between two corrections of the largest score. PF: the next block is prefetched while one is read;
// for heads that lie beside each other, so that a key's row is short and the machine sees no stream.
template <class V, class X, int BLOCK, bool PF>
struct Decode {
  static constexpr int W = V::width;
  static constexpr int PAIR = 2 * W;  // elements are read by two vectors at a time
  static_assert(BLOCK % W == 0, "scores are whole vectors");

  // Declines lengths outside 0..kv; a sequence of no keys gives zeros.
  static int run(const dks_decode& w, const void* q, const void* k, const void* v, void* y) {
    Call call{w, static_cast<const X*>(q), static_cast<const X*>(k), static_cast<const X*>(v), static_cast<X*>(y)};
    int64_t blocks = 0;
    for (int64_t b = 0; b < w.b; ++b) {
      const int64_t length = call.length(b);
      if (length < 0 || length > w.kv) return DKS_DECLINED;
      blocks += call.blocks(b) * call.groups;
    }
    if (blocks == 0) return DKS_OK;
    const int threads = static_cast<int>(w.threads < blocks ? w.threads : blocks);
    call.memory = static_cast<float*>(scratch(sizeof(float) * call.thread_size() * static_cast<std::size_t>(threads)));
    if (call.memory == nullptr) return DKS_NO_MEMORY;
    // Threads share out blocks of keys, wherever the sequences end, so that ragged ones keep all of them busy.
    // A unit, the heads that are read together of one sequence, may so be cut: its parts are merged at the end.
    parallel(threads, [&](int thread, int count) {
      const Span mine = share(blocks, 1, thread, count);
      each_unit(call, mine, [&](const Unit& u) {
        const Span part{mine.begin > u.begin ? mine.begin - u.begin : 0, (mine.end < u.end ? mine.end : u.end) - u.begin};
        const bool begins = u.begin >= mine.begin, ends = u.end <= mine.end;
        const State state = call.state(thread, !begins ? CONTINUED : ends ? WHOLE : CUT);
        attend(call, u, part, call.queries(thread), state);
        if (begins && ends) finish(call, u, state);
      });
      barrier(count);
      each_unit(call, mine, [&](const Unit& u) {
        if (u.begin < mine.begin || u.end <= mine.end) return;
        const State state = call.state(thread, CUT);
        for (int next = thread + 1; next < count && share(blocks, 1, next, count).begin < u.end; ++next) {
          merge(call, u.heads() * call.group, state, call.state(next, CONTINUED));
        }
        finish(call, u, state);
      });
    });
    return DKS_OK;
  }

 private:
  static constexpr float lowest = -std::numeric_limits<float>::infinity();

  // What is known of some query rows after some keys: of a row the largest score, by lanes the sum of e^(score -
  // largest), and that sum with the values as weights; elements in the order of load_pair.
  struct State {
    float* values;   // [row][call.padded]
    float* sums;     // [row][W]
    float* largest;  // [row]
  };
  // A thread's states: of units that are its own, of the one that it begins and others end, of one begun before.
  enum Kind { WHOLE, CUT, CONTINUED, KINDS };

  struct Call {
    const dks_decode& w;
    const X* q;
    const X* k;
    const X* v;
    X* y;
    float* memory = nullptr;
    int64_t group = w.h / w.hkv;  // query heads of a key head
    int64_t padded = (w.d + PAIR - 1) / PAIR * PAIR;
    int64_t together = heads_together();  // key heads of a unit
    int64_t groups = (w.hkv + together - 1) / together;
    int64_t rows = together * group;

    // Heads that lie beside each other are read side by side, while what is known of them fits in L1 beside.
    int64_t heads_together() const {
      if (w.k_h > w.k_s) return 1;
      const int64_t fit = 2048 / (group * padded);
      return fit < 1 ? 1 : fit < w.hkv ? fit : w.hkv;
    }
    int64_t length(int64_t b) const { return w.lengths == nullptr ? w.kv : w.lengths[b]; }
    int64_t blocks(int64_t b) const { return length(b) > BLOCK ? (length(b) + BLOCK - 1) / BLOCK : 1; }

    std::size_t state_size() const { return static_cast<std::size_t>((rows * (padded + W + 1) + 15) / 16 * 16); }
    std::size_t thread_size() const { return static_cast<std::size_t>(rows * padded) + KINDS * state_size(); }
    float* queries(int thread) const { return memory + thread_size() * static_cast<std::size_t>(thread); }
    State state(int thread, Kind kind) const {
      float* at = queries(thread) + rows * padded + static_cast<std::size_t>(kind) * state_size();
      return {at, at + rows * padded, at + rows * (padded + W)};
    }
  };

  struct Unit {
    int64_t sequence, head, head_end;  // key heads
    int64_t begin, end;                // among the blocks of all units
    int64_t heads() const { return head_end - head; }
  };

  template <class Body>
  static void each_unit(const Call& call, Span mine, const Body& body) {
    int64_t at = 0;
    for (int64_t b = 0; b < call.w.b && at < mine.end; ++b) {
      const int64_t blocks = call.blocks(b);
      for (int64_t g = 0; g < call.groups; ++g, at += blocks) {
        if (at + blocks <= mine.begin || at >= mine.end) continue;
        const int64_t head = g * call.together, end = head + call.together;
        body(Unit{b, head, end < call.w.hkv ? end : call.w.hkv, at, at + blocks});
      }
    }
  }

  // Where the keys and values of a block are, in elements from a head's first; the last one again where the keys
  // end inside a vector of scores, so that nothing behind them is read.
  struct Block {
    int64_t n;
    int64_t k[BLOCK], v[BLOCK];

    void find(const Call& call, int64_t b, int64_t block) {
      const dks_decode& w = call.w;
      const int64_t first = block * BLOCK, left = call.length(b) - first;
      n = left < BLOCK ? left : BLOCK;
      if (w.block_table == nullptr) {
        fill(0, n, b * w.k_b + first * w.k_s, b * w.v_b + first * w.v_s, w);
      } else {
        const int32_t* table = w.block_table + b * w.table_stride;
        for (int64_t j = 0; j < n;) {
          const int64_t page = (first + j) / w.page, row = (first + j) - page * w.page;
          const int64_t end = n - j < w.page - row ? n : j + w.page - row;
          fill(j, end, table[page] * w.k_b + row * w.k_s, table[page] * w.v_b + row * w.v_s, w);
          j = end;
        }
      }
      for (int64_t j = n; j % W != 0; ++j) k[j] = k[n - 1];
    }

    void fill(int64_t j, int64_t end, int64_t at_k, int64_t at_v, const dks_decode& w) {
      for (; j < end; ++j, at_k += w.k_s, at_v += w.v_s) k[j] = at_k, v[j] = at_v;
    }
  };

  // Blocks part.begin..part.end of a unit, for all its heads, into `state`.
  static void attend(const Call& call, const Unit& u, Span part, float* queries, const State& state) {
    const dks_decode& w = call.w;
    const int64_t rows = u.heads() * call.group;
    for (int64_t i = 0; i < rows; ++i) {
      const X* from = call.q + u.sequence * w.q_b + (u.head * call.group + i) * w.q_h;
      for (int64_t c = 0; c < w.d; c += PAIR) {
        V a, b;
        V::load_pair(from + c, w.d - c, a, b);
        (a * V::of(w.scale)).store(queries + i * call.padded + c);
        (b * V::of(w.scale)).store(queries + i * call.padded + c + W);
      }
      for (int64_t c = 0; c < call.padded; c += W) V::zero().store(state.values + i * call.padded + c);
      V::zero().store(state.sums + i * W);
      state.largest[i] = lowest;
    }
    Block both[2];
    both[0].find(call, u.sequence, part.begin);
    for (int64_t at = part.begin; at < part.end; ++at) {
      const Block& block = both[(at - part.begin) % 2];
      Block& next = both[(at - part.begin + 1) % 2];
      if (at + 1 < part.end) next.find(call, u.sequence, at + 1);
      const Block& ahead = at + 1 < part.end && next.n == BLOCK ? next : block;
      for (int64_t head = u.head; head < u.head_end; ++head) {
        const X* k = call.k + head * w.k_h;
        const X* v = call.v + head * w.v_h;
        for (int64_t i = 0; i < call.group;) {
          const int64_t row = (head - u.head) * call.group + i, left = call.group - i;
          const Task task{block, ahead, k, v, w.d, call.padded, queries + row * call.padded,
                          {state.values + row * call.padded, state.sums + row * W, state.largest + row}};
          i += left >= 4 ? Rows<4>::run(task) : left >= 2 ? Rows<2>::run(task) : Rows<1>::run(task);
        }
      }
    }
  }

  struct Task {
    const Block& block;
    const Block& ahead;
    const X* k;
    const X* v;
    int64_t d, padded;
    const float* q;
    State state;
  };

  static void prefetch(const X* row, int64_t d) {
    if (!PF) return;
    for (int64_t c = 0; c < d; c += static_cast<int64_t>(64 / sizeof(X))) _mm_prefetch(row + c, _MM_HINT_T0);
  }

  // One block for R query rows of one key head.
  template <int R>
  struct Rows {
    static constexpr int KEYS = W / R;  // their scores with this many keys are one vector

    static int run(const Task& t) {
      alignas(64) float scores[R][BLOCK];
      for (int64_t j = 0; j < t.block.n; j += KEYS) multiply(t, j, scores);
      V shrink[R];
      for (int i = 0; i < R; ++i) shrink[i] = soften(t, i, scores[i]);
      const int64_t whole = t.d / PAIR * PAIR;
      constexpr int most = V::registers / 4 / R > 4 ? 4 : V::registers / 4 / R;
      int64_t c = 0;
      for (; c + most * PAIR <= whole; c += most * PAIR) sum_up<most, false>(t, c, scores, shrink);
      if (most > 2 && c + 2 * PAIR <= whole) sum_up<2, false>(t, c, scores, shrink), c += 2 * PAIR;
      for (; c < whole; c += PAIR) sum_up<1, false>(t, c, scores, shrink);
      if (c < t.d) sum_up<1, true>(t, c, scores, shrink);
      return R;
    }

    // Scores of keys j..j + KEYS.
    static void multiply(const Task& t, int64_t j, float (&scores)[R][BLOCK]) {
      V sum[W];
      const int64_t whole = t.d / PAIR * PAIR;
#pragma GCC unroll 1
      for (int key = 0; key < KEYS; ++key) {
        const X* k = t.k + t.block.k[j + key];
        prefetch(t.k + t.ahead.k[j + key], t.d);
        V even[R], odd[R], a, b;
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) even[i] = odd[i] = V::zero();
        const auto add = [&](int64_t c) {
#pragma GCC unroll 4
          for (int i = 0; i < R; ++i) {
            even[i] = fma(a, V::load(t.q + i * t.padded + c), even[i]);
            odd[i] = fma(b, V::load(t.q + i * t.padded + c + W), odd[i]);
          }
        };
        int64_t c = 0;
        for (; c < whole; c += PAIR) {
          V::load_pair(k + c, a, b);
          add(c);
        }
        if (c < t.d) {
          V::load_pair(k + c, t.d - c, a, b);
          add(c);
        }
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) sum[i * KEYS + key] = even[i] + odd[i];
      }
      alignas(64) float found[W];
      V::sums(sum).store(found);
      for (int i = 0; i < R; ++i) std::memcpy(&scores[i][j], found + i * KEYS, sizeof(float) * KEYS);
    }

    // Scores of a row to their weights; what the state shrinks by, as its largest score grew.
    static V soften(const Task& t, int i, float* scores) {
      const int64_t n = t.block.n;
      V top = V::of(lowest);
      for (int64_t j = 0; j < n; j += W) {
        V s = V::load(scores + j);
        if (n - j < W) {
          s = head(s, n - j, V::of(lowest));
          s.store(scores + j);
        }
        top = max(s, top);  // a NaN is left out here and makes the sum NaN below
      }
      const float before = t.state.largest[i], found = top.largest();
      const float largest = found > before ? found : before;
      t.state.largest[i] = largest;
      const V shift = V::of(largest == lowest ? 0.0f : largest);
      const V shrink = exp(V::of(before) - shift);
      V sum = V::load(t.state.sums + i * W) * shrink;
      for (int64_t j = 0; j < n; j += W) {
        const V weight = exp(V::load(scores + j) - shift);
        weight.store(scores + j);
        sum = sum + weight;
      }
      sum.store(t.state.sums + i * W);
      return shrink;
    }

    // Weights times values, elements c..c + N * PAIR of them, or those behind the last whole pair.
    template <int N, bool TAIL>
    static void sum_up(const Task& t, int64_t c, const float (&weights)[R][BLOCK], const V (&shrink)[R]) {
      V sum[R][2 * N];
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int p = 0; p < 2 * N; ++p) sum[i][p] = V::load(t.state.values + i * t.padded + c + p * W) * shrink[i];
      }
#pragma GCC unroll 2
      for (int64_t j = 0; j < t.block.n; ++j) {
        const X* v = t.v + t.block.v[j] + c;
        prefetch(t.v + t.ahead.v[j] + c, TAIL ? t.d - c : N * PAIR);
        V row[2 * N];
#pragma GCC unroll 4
        for (int p = 0; p < N; ++p) {
          if (TAIL) {
            V::load_pair(v, t.d - c, row[0], row[1]);
          } else {
            V::load_pair(v + p * PAIR, row[2 * p], row[2 * p + 1]);
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
          const V weight = V::of(weights[i][j]);
#pragma GCC unroll 8
          for (int p = 0; p < 2 * N; ++p) sum[i][p] = fma(weight, row[p], sum[i][p]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int p = 0; p < 2 * N; ++p) sum[i][p].store(t.state.values + i * t.padded + c + p * W);
      }
    }
  };

  // Add what `from` knows to `to`.
  static void merge(const Call& call, int64_t rows, const State& to, const State& from) {
    for (int64_t i = 0; i < rows; ++i) {
      const float largest = to.largest[i] > from.largest[i] ? to.largest[i] : from.largest[i];
      const V shift = V::of(largest == lowest ? 0.0f : largest);
      const V a = exp(V::of(to.largest[i]) - shift), b = exp(V::of(from.largest[i]) - shift);
      const auto add = [&](float* x, const float* more) { fma(V::load(more), b, V::load(x) * a).store(x); };
      for (int64_t c = i * call.padded; c < (i + 1) * call.padded; c += W) add(to.values + c, from.values + c);
      add(to.sums + i * W, from.sums + i * W);
      to.largest[i] = largest;
    }
  }

  static void finish(const Call& call, const Unit& u, const State& state) {
    const dks_decode& w = call.w;
    for (int64_t i = 0; i < u.heads() * call.group; ++i) {
      X* y = call.y + (u.sequence * w.h + u.head * call.group + i) * w.d;
      const float sum = V::load(state.sums + i * W).sum();
      const V share = V::of(sum == 0.0f ? 0.0f : 1.0f / sum);
      for (int64_t c = 0; c < w.d; c += PAIR) {
        const float* values = state.values + i * call.padded + c;
        V::store_pair(y + c, w.d - c, V::load(values) * share, V::load(values + W) * share);
      }
    }
  }
};

}  // namespace dks
