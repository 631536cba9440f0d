// Runs generated kernels on exactly sized memory and compares them with plain loops; built by test_sanitized.py with
// a sanitizer, the kernels in "units.cpp" and the calls of them in "cases.inc".
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

// A team of std::threads in OpenMP's place, since ThreadSanitizer does not see libgomp's barriers. As OpenMP may,
// every third team is smaller than asked for.
namespace team {
struct Barrier {
  std::mutex mutex;
  std::condition_variable all;
  int size, waiting = 0, round = 0;
  explicit Barrier(int n) : size(n) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const int mine = round;
    if (++waiting == size) {
      waiting = 0;
      ++round;
      all.notify_all();
    } else {
      all.wait(lock, [&] { return round != mine; });
    }
  }
};
thread_local int number = 0, size = 1;
thread_local Barrier* meeting = nullptr;
std::atomic<int> made{0};
}  // namespace team

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned asked, unsigned) {
  const int size = asked > 2 && ++team::made % 3 == 0 ? static_cast<int>(asked) - 1 : static_cast<int>(asked);
  team::Barrier barrier(size);
  const auto member = [&](int number) {
    team::number = number, team::size = size, team::meeting = &barrier;
    body(data);
    team::number = 0, team::size = 1, team::meeting = nullptr;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < size; ++i) others.emplace_back(member, i);
  member(0);
  for (auto& other : others) other.join();
}
void GOMP_barrier() { team::meeting->wait(); }
int omp_get_thread_num() { return team::number; }
int omp_get_num_threads() { return team::size; }
}

#ifdef EXACT_SCRATCH
// Scratch of exactly what was asked for, of NaN: what is read behind it or before it was written shows.
#define scratch rounded_scratch
#include "scratch.hpp"
#undef scratch
namespace dks {
inline void* scratch(std::size_t bytes) {
  struct Block {
    void* memory = nullptr;
    ~Block() { std::free(memory); }
  };
  static thread_local Block block;
  std::free(block.memory);
  if (posix_memalign(&block.memory, 64, bytes) != 0) std::abort();
  std::memset(block.memory, 0xff, bytes);
  return block.memory;
}
}  // namespace dks
#endif

#include "units.cpp"

namespace {

std::mt19937 rng(1);
int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

// `count` elements that end where their memory does, `shift` elements past an address divisible by 64. All NaN, or
// -1 where they are integers.
template <class X>
struct Exact {
  char* base;
  X* data;
  explicit Exact(int64_t count, int shift = pick(0, 15)) {
    const std::size_t bytes = sizeof(X) * static_cast<std::size_t>(count + shift);
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes == 0 ? 1 : bytes) != 0) std::abort();
    base = static_cast<char*>(memory);
    std::memset(base, 0xff, bytes);
    data = reinterpret_cast<X*>(base) + shift;
  }
  ~Exact() { std::free(base); }
  Exact(const Exact&) = delete;
};

float wide(float x) { return x; }
float wide(dks::bf16 x) { return dks::to_float(x); }
float wide(int8_t x) { return x; }
void set(float& x, float v) { x = v; }
void set(dks::bf16& x, float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  x.bits = static_cast<uint16_t>(bits >> 16);
}
void set(int8_t& x, float v) { x = static_cast<int8_t>(v * 50); }

template <class X>
void draw(X* x, int64_t count) {
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) set(x[i], std::fmax(-2.5f, std::fmin(2.5f, normal(rng))));
}

int wrong = 0, cases = 0;

template <class X>
void compare(const char* name, X y, double wanted, double size, const char* where, const int64_t (&at)[6]) {
  const double limit = 2e-6 * (1 + size) + (sizeof(X) == 2 ? 1.0 / 200 * std::fabs(wanted) : 0);
  if (!(std::fabs(wide(y) - wanted) <= limit) && ++wrong <= 10) {
    std::printf("%s: found %g, expected %g at %s %ld %ld %ld %ld %ld %ld\n", name, wide(y), wanted, where, at[0], at[1],
                at[2], at[3], at[4], at[5]);
  }
}

double activated(int epilogue, double y) {
  switch (epilogue) {
    case DKS_RELU: return y > 0 ? y : 0;
    case DKS_GELU: return y * 0.5 * std::erfc(-y * std::sqrt(0.5));
    case DKS_GELU_TANH: return y / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (y + 0.044715 * y * y * y)));
    case DKS_SILU: return y / (1 + std::exp(-y));
    default: return y;
  }
}

// How a kernel lays its weights out and what it does to x.
enum Rounds { NOTHING, TO_BF16, TO_INT8 };
template <int PANEL_, int GROUP_ = 1, int STEP_ = 1, Rounds ROUNDS_ = NOTHING>
struct Form {
  static constexpr int PANEL = PANEL_, GROUP = GROUP_, STEP = STEP_;
  static constexpr Rounds ROUNDS = ROUNDS_;
  static int64_t depth(int64_t k) { return (k + STEP - 1) / STEP * STEP; }
  static int64_t at(int64_t j, int64_t i, int64_t k) {
    return ((j / PANEL * (depth(k) / GROUP) + i / GROUP) * PANEL + j % PANEL) * GROUP + i % GROUP;
  }
};

template <class X, class W, class F>
__attribute__((no_sanitize("address", "undefined", "thread"))) void check_linear(
    const char* name, const dks_linear& w, const X* x, const X* residual, const X* y, int64_t m) {
  const W* weight = static_cast<const W*>(w.weight);
  for (int64_t i = 0; i < m; ++i) {
    double most = 0;
    for (int64_t k = 0; k < w.k; ++k) most = std::fmax(most, std::fabs(wide(x[i * w.k + k])));
    for (int64_t j = 0; j < w.n; ++j) {
      double sum = 0, size = 0, weights = 0;
      for (int64_t k = 0; k < w.k; ++k) {
        const double v = wide(weight[F::at(j, k, w.k)]), part = v * wide(x[i * w.k + k]);
        sum += part, size += std::fabs(part), weights += std::fabs(v);
      }
      // What rounding x may cost, as a multiple of what `compare` grants; activations enlarge it a little.
      if (F::ROUNDS == TO_BF16 && sizeof(X) == 4) size *= 1.2 / 256 / 2e-6;
      if (F::ROUNDS == TO_INT8) size = 1.2 * weights * most / 254 / 2e-6;
      if (w.scale != nullptr) sum *= w.scale[j], size *= w.scale[j];
      if (w.bias != nullptr) sum += w.bias[j];
      const double wanted = activated(w.epilogue, sum) + (residual == nullptr ? 0 : wide(residual[i * w.n + j]));
      compare(name, y[i * w.n + j], wanted, size, "row, column, m, n, k, threads", {i, j, m, w.n, w.k, w.threads});
    }
  }
}

template <class X, class W, class F>
void linear(dks_linear_fn f, const char* name, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    // Each size from 1 to 70 has its turn as m, n and k, beside others by chance.
    const int64_t size = 1 + round % 70, m = round % 3 == 0 ? size : pick(1, 70);
    const int64_t n = round % 3 == 1 ? size : pick(1, 70), k = round % 3 == 2 ? size : pick(1, 70);
    const int64_t wide_n = (n + F::PANEL - 1) / F::PANEL * F::PANEL, all = wide_n * F::depth(k);
    Exact<W> weight(all, 0);
    Exact<float> bias(n), scale(n, 0);
    Exact<int32_t> sums(n, 0);
    Exact<X> x(m * k), residual(m * n);
    draw(x.data, m * k);
    draw(residual.data, m * n);
    draw(bias.data, n);
    std::memset(weight.data, 0, sizeof(W) * static_cast<std::size_t>(all));
    for (int64_t j = 0; j < n; ++j) {
      scale.data[j] = 0.02f + 0.0001f * static_cast<float>(j);
      sums.data[j] = 0;
      for (int64_t i = 0; i < k; ++i) {
        W& one = weight.data[F::at(j, i, k)];
        draw(&one, 1);
        sums.data[j] += static_cast<int32_t>(wide(one));
      }
    }
    const int epilogue = round % 6;
    for (int form = 0; form < 4; ++form) {
      dks_linear w{weight.data, round % 4 == 0 ? nullptr : bias.data, sizeof(W) == 1 ? scale.data : nullptr,
                   F::ROUNDS == TO_INT8 ? sums.data : nullptr, n, k, epilogue, form % 2 == 0 ? 1 : 3, form / 2};
      const X* added = epilogue == DKS_ADD ? residual.data : nullptr;
      Exact<X> y(m * n);
      if (f(&w, x.data, added, y.data, m) != DKS_OK) ++wrong, std::printf("%s: declined\n", name);
      check_linear<X, W, F>(name, w, x.data, added, y.data, m);
      ++cases;
      if (round % 8 != 0) continue;
      // Several callers of one bound kernel at once.
      Exact<X> mine(m * n), theirs(m * n);
      const auto call = [&](X* to) { f(&w, x.data, added, to, m); };
      std::thread other(call, theirs.data);
      call(mine.data);
      other.join();
      check_linear<X, W, F>(name, w, x.data, added, mine.data, m);
      check_linear<X, W, F>(name, w, x.data, added, theirs.data, m);
    }
  }
}

// Two inputs a byte, a scale for every GROUP of them; see gemm_int4.hpp.
template <class X, int PANEL, int GROUP>
void linear_int4(dks_linear_fn f, const char* name, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const int64_t size = 1 + round % 70, m = round % 3 == 0 ? size : pick(1, 9);
    const int64_t n = round % 3 == 1 ? size : pick(1, 70), k = round % 3 == 2 ? size : pick(1, 150);
    const int64_t panels = (n + PANEL - 1) / PANEL, groups = (k + GROUP - 1) / GROUP, bytes = (k + 1) / 2;
    Exact<uint8_t> weight(panels * bytes * PANEL, 0);
    Exact<float> scale(panels * groups * PANEL, 0), bias(n);
    Exact<X> x(m * k), residual(m * n);
    draw(x.data, m * k), draw(residual.data, m * n), draw(bias.data, n), draw(scale.data, panels * groups * PANEL);
    for (int64_t i = 0; i < panels * bytes * PANEL; ++i) weight.data[i] = static_cast<uint8_t>(pick(0, 255));
    for (const int threads : {1, 3}) {
      const bool adds = round % 2 == 1;
      const dks_linear w{weight.data, bias.data, scale.data, nullptr, n, k, adds ? DKS_ADD : DKS_NONE, threads, 0};
      Exact<X> y(m * n);
      if (f(&w, x.data, adds ? residual.data : nullptr, y.data, m) != DKS_OK) ++wrong;
      ++cases;
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          const int64_t panel = j / PANEL, column = j % PANEL;
          double sum = bias.data[j] + (adds ? wide(residual.data[i * n + j]) : 0.0f), length = 0;
          for (int64_t c = 0; c < k; ++c) {
            const int both = weight.data[(panel * bytes + c / 2) * PANEL + column], q = c % 2 == 0 ? both & 15 : both >> 4;
            const double part = (q - 8.0) * scale.data[(panel * groups + c / GROUP) * PANEL + column] * wide(x.data[i * k + c]);
            sum += part, length += std::fabs(part);
          }
          compare(name, y.data[i * n + j], sum, length, "row, column, m, n, k, threads", {i, j, m, n, k, threads});
        }
      }
    }
  }
}

template <class X, bool MEAN>
void norm(dks_norm_fn f, const char* name, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const int64_t n = round % 5 == 4 ? pick(71, 300) : 1 + round % 70, m = pick(1, 13);
    Exact<X> weight(n), bias(n), x(m * n), residual(m * n);
    draw(weight.data, n), draw(bias.data, n), draw(x.data, m * n), draw(residual.data, m * n);
    const bool adds = round % 2 == 1, asks = round % 4 == 3;
    for (const int threads : {1, 3}) {
      Exact<X> y(m * n), sum(asks ? m * n : 0);
      const dks_norm w{round % 3 == 0 ? nullptr : weight.data, MEAN && round % 3 == 1 ? bias.data : nullptr, n, 0.01f,
                       threads};
      if (f(&w, x.data, adds ? residual.data : nullptr, y.data, asks ? sum.data : nullptr, m) != DKS_OK) ++wrong;
      ++cases;
      for (int64_t i = 0; i < m; ++i) {
        std::vector<double> h(n);
        double mean = 0, square = 0;
        for (int64_t j = 0; j < n; ++j) {
          h[j] = wide(x.data[i * n + j]) + (adds ? wide(residual.data[i * n + j]) : 0.0f);
          if (asks) compare(name, sum.data[i * n + j], h[j], 0, "sum: row, column, m, n", {i, j, m, n, 0, threads});
          if (asks) h[j] = wide(sum.data[i * n + j]);
          mean += h[j] / static_cast<double>(n);
        }
        for (const double v : h) square += (v - (MEAN ? mean : 0)) * (v - (MEAN ? mean : 0)) / static_cast<double>(n);
        for (int64_t j = 0; j < n; ++j) {
          const double value = (h[j] - (MEAN ? mean : 0)) / std::sqrt(square + 0.01);
          const double wanted = value * (w.weight == nullptr ? 1 : wide(weight.data[j])) +
                                (w.bias == nullptr ? 0 : wide(bias.data[j]));
          // A sum that was rounded on its way, unseen, is off by its own rounding.
          const double size = (sizeof(X) == 2 && adds ? 1e5 : 100);
          compare(name, y.data[i * n + j], wanted, size, "row, column, m, n", {i, j, m, n, 0, threads});
        }
      }
    }
  }
}

template <class X>
void softmax(dks_softmax_fn f, const char* name, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const int64_t n = round % 5 == 4 ? pick(71, 300) : 1 + round % 70, m = pick(1, 13);
    Exact<X> x(m * n);
    draw(x.data, m * n);
    for (const int threads : {1, 3}) {
      Exact<X> y(m * n);
      if (f(x.data, y.data, m, n, threads) != DKS_OK) ++wrong;
      ++cases;
      for (int64_t i = 0; i < m; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < n; ++j) sum += std::exp(wide(x.data[i * n + j]));
        for (int64_t j = 0; j < n; ++j) {
          const double wanted = std::exp(wide(x.data[i * n + j])) / sum;
          compare(name, y.data[i * n + j], wanted, 1, "row, column, m, n", {i, j, m, n, 0, threads});
        }
      }
    }
  }
}

template <class X>
void decode(dks_decode_fn f, const char* name, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const int64_t b = pick(1, 3), hkv = pick(1, 3), group = pick(1, 6), h = hkv * group, kv = pick(1, 150);
    const int64_t d = 1 + round % 70, page = pick(1, 20), pages = (kv + page - 1) / page;
    const bool paged = round % 2 == 1, ragged = round % 4 > 1, beside = round % 3 == 0;
    const int64_t blocks = paged ? b * pages : b, keys = paged ? page : kv, elements = blocks * hkv * keys * d;
    Exact<X> q(b * h * d), k(elements), v(elements);
    draw(q.data, b * h * d);
    Exact<int32_t> table(b * pages), lengths(b);
    std::vector<int32_t> order(b * pages);
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    std::shuffle(order.begin(), order.end(), rng);
    const int64_t k_s = beside ? hkv * d : d, k_h = beside ? d : keys * d, k_b = hkv * keys * d;
    const auto row = [&](int64_t s, int64_t head, int64_t j) {
      const int64_t block = paged ? order[s * pages + j / page] : s, key = paged ? j % page : j;
      return block * k_b + head * k_h + key * k_s;
    };
    for (int64_t s = 0; s < b; ++s) {
      lengths.data[s] = ragged ? pick(0, static_cast<int>(kv)) : static_cast<int32_t>(kv);
      // Pages behind the end are named by no one: -1, and keys that are no one's stay NaN.
      for (int64_t p = 0; p * page < lengths.data[s]; ++p) table.data[s * pages + p] = order[s * pages + p];
      for (int64_t head = 0; head < hkv; ++head) {
        for (int64_t j = 0; j < lengths.data[s]; ++j) draw(k.data + row(s, head, j), d), draw(v.data + row(s, head, j), d);
      }
    }
    for (const int threads : {1, 3}) {
      Exact<X> y(b * h * d);
      const dks_decode w{b, h, hkv, d, kv, h * d, d, k_b, k_h, k_s, k_b, k_h, k_s, page, paged ? table.data : nullptr, pages,
                         ragged || paged ? lengths.data : nullptr, 0.2f, threads};
      if (f(&w, q.data, k.data, v.data, y.data) != DKS_OK) ++wrong, std::printf("%s: declined\n", name);
      ++cases;
      for (int64_t s = 0; s < b; ++s) {
        for (int64_t head = 0; head < h; ++head) {
          std::vector<double> wanted(d);
          double sum = 0;
          const X* query = q.data + (s * h + head) * d;
          for (int64_t j = 0; j < lengths.data[s]; ++j) {
            const int64_t at = row(s, head / group, j);
            double score = 0;
            for (int64_t c = 0; c < d; ++c) score += static_cast<double>(wide(query[c])) * wide(k.data[at + c]);
            const double weight = std::exp(0.2 * score);
            sum += weight;
            for (int64_t c = 0; c < d; ++c) wanted[c] += weight * wide(v.data[at + c]);
          }
          for (int64_t c = 0; c < d; ++c) {
            compare(name, y.data[(s * h + head) * d + c], sum == 0 ? 0 : wanted[c] / sum, 4,
                    "sequence, head, element, d, kv, threads", {s, head, c, d, kv, threads});
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
#include "cases.inc"
  std::printf("%d cases, %d wrong\n", cases, wrong);
  return wrong == 0 && cases > 0 ? 0 : 1;
}
