// A small server on a generated package, without Python: worker threads serve requests of a linear layer, each a
// number of rows, with the kernel that the package's table chose, or with a plain loop of their own where it chose
// none that C++ has. The package is swapped while they work.
//
//   server PACKAGE [workers] [threads]
//
// On stdin, one a line: a number of rows; `trace COUNT` for so many requests of random sizes; `reload PACKAGE`;
// `rollback`; `stats`. Ends with code 1 where a result was wrong.
#include <omp.h>

#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <iostream>
#include <new>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "linear.hpp"
#include "package.hpp"
#include "serving.hpp"

namespace {

// Floats on whole lines of memory: the most aligned calls there are.
template <class T>
struct OnLines {
  using value_type = T;
  OnLines() = default;
  template <class U>
  OnLines(const OnLines<U>&) {}
  T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* memory, std::size_t) { ::operator delete(memory, std::align_val_t{64}); }
  bool operator==(const OnLines&) const { return true; }
  bool operator!=(const OnLines&) const { return false; }
};
using Floats = std::vector<float, OnLines<float>>;

// The layer that is served, as a model file would bring it.
struct Layer {
  std::string traits;
  std::int64_t n = 0, k = 0;
  Floats weight, bias;
};

// A package with the layer bound to it: what is swapped as a whole.
struct Model : dks::Generation {
  Model(const std::shared_ptr<const dks::Package>& package, const Layer& layer)
      : Generation(package->table(), package->data().generation, package),
        max_error(package->data().max_error),
        linear(*package, layer.traits, layer.weight.data(), layer.bias.data(), layer.n, layer.k) {}
  double max_error;
  dks::Linear linear;
};

using Tables = dks::Tables<Model>;

Floats normal(std::int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> draw;
  Floats made(static_cast<std::size_t>(count));
  for (float& value : made) value = draw(random);
  return made;
}

// A layer of the first shape that the package was measured for: fp32, a bias, no epilogue.
Layer make_layer(const dks::Table& table) {
  for (std::int32_t i = 0; i < table.group_count; ++i) {
    const dks::Group& group = table.groups[i];
    if (group.op != "linear" || group.form != "prepared" || group.traits != "bias=yes,dtype=float32,epilogue=none") continue;
    Layer layer{std::string(group.traits), group.statics[0], group.statics[1], {}, {}};
    layer.weight = normal(layer.n * layer.k, 1);
    layer.bias = normal(layer.n, 2);
    return layer;
  }
  throw std::runtime_error("the package has no linear of fp32 with a bias: expected one; profile one");
}

// The server's own default: y = x @ weight.T + bias.
void plain(const Layer& layer, const float* x, float* y, std::int64_t m) {
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < layer.n; ++j) {
      double sum = layer.bias[static_cast<std::size_t>(j)];
      const float* row = layer.weight.data() + j * layer.k;
      for (std::int64_t c = 0; c < layer.k; ++c) sum += double{x[i * layer.k + c]} * double{row[c]};
      y[i * layer.n + j] = static_cast<float>(sum);
    }
  }
}

double relative_error(const Floats& y, const Floats& wanted, std::size_t count) {
  double off = 0, all = 1e-300;
  for (std::size_t i = 0; i < count; ++i) {
    off += (double{y[i]} - wanted[i]) * (double{y[i]} - wanted[i]);
    all += double{wanted[i]} * wanted[i];
  }
  return std::sqrt(off / all);
}

class Server {
 public:
  Server(const std::shared_ptr<const dks::Package>& package, int workers, int threads)
      : threads_(threads), layer_(make_layer(package->table())), x_(normal(most_rows * layer_.k, 3)) {
    tables_.publish(std::make_shared<Model>(package, layer_));
    for (int i = 0; i < workers; ++i) workers_.emplace_back([this] { work(); });
  }

  ~Server() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    changed_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  void request(std::int64_t rows) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(rows);
    }
    changed_.notify_all();
  }

  // A package that can't be opened never replaces the one that serves.
  void reload(const std::string& path) {
    try {
      const auto package = dks::Package::open(path, threads_);
      tables_.publish(std::make_shared<Model>(package, layer_));
      std::printf("serving %s\n", package->data().generation);
    } catch (const std::exception& error) {
      std::printf("refused: %s\n", error.what());
    }
  }

  void rollback() {
    if (tables_.rollback()) std::printf("serving %s\n", tables_.current()->id().c_str());
    else std::printf("refused: nothing to go back to\n");
  }

  // Once all requests so far are served.
  void stats() {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return queue_.empty() && busy_ == 0; });
    }
    std::printf("{\"generation\": \"%s\", \"kernels\": %ld, \"default\": %ld, \"checked\": %ld, \"wrong\": %ld",
                tables_.current()->id().c_str(), kernels_.load(), defaults_.load(), checked_.load(), wrong());
    for (std::int32_t i = 0; i < dks::outcomes; ++i)
      std::printf(", \"%s\": %lu", dks::outcome_names[i], static_cast<unsigned long>(tables_.total(static_cast<dks::Outcome>(i))));
    std::printf("}\n");
    std::fflush(stdout);
  }

  long wrong() const { return wrong_.load(); }

 private:
  static constexpr std::int64_t most_rows = 1024;
  static constexpr long every = 16;  // requests from one that is checked to the next

  void work() {
    Tables::Reader reader(tables_);
    Floats y(static_cast<std::size_t>(most_rows * layer_.n)), wanted(y.size());
    while (true) {
      std::int64_t m;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return closing_ || !queue_.empty(); });
        if (queue_.empty()) return;
        m = std::min(queue_.front(), most_rows);
        queue_.pop_front();
        ++busy_;
      }
      serve(reader, m, y, wanted);
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        --busy_;
      }
      changed_.notify_all();
    }
  }

  void serve(Tables::Reader& reader, std::int64_t m, Floats& y, Floats& wanted) {
    const auto call = reader.enter();
    const bool launched = call->linear.run(call, x_.data(), nullptr, y.data(), m);
    if (!launched) plain(layer_, x_.data(), y.data(), m);
    const long number = (launched ? kernels_ : defaults_).fetch_add(1);
    if (!launched || number % every != 0) return;
    plain(layer_, x_.data(), wanted.data(), m);
    ++checked_;
    if (!(relative_error(y, wanted, static_cast<std::size_t>(m * layer_.n)) <= call->max_error)) ++wrong_;
  }

  const int threads_;
  Layer layer_;
  Floats x_;
  Tables tables_;
  std::mutex mutex_;  // guards the four below
  std::condition_variable changed_;
  std::deque<std::int64_t> queue_;
  int busy_ = 0;
  bool closing_ = false;
  std::atomic<long> kernels_{0}, defaults_{0}, checked_{0}, wrong_{0};
  std::vector<std::thread> workers_;
};

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::fprintf(stderr, "usage: server PACKAGE [workers] [threads]\n");
    return 2;
  }
  const int workers = argc > 2 ? std::stoi(argv[2]) : 2;
  const int threads = argc > 3 ? std::stoi(argv[3]) : omp_get_max_threads();  // of one kernel
  Server server(dks::Package::open(argv[1], threads), workers, threads);
  std::mt19937 random(4);
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string word;
    if (!(words >> word)) continue;
    std::string path;
    long count = 0;
    if (word == "stats") server.stats();
    else if (word == "rollback") server.rollback();
    else if (word == "reload" && std::getline(words >> std::ws, path)) server.reload(path);
    else if (word == "trace" && words >> count)
      while (count-- > 0) server.request(static_cast<std::int64_t>(std::exp2(std::uniform_real_distribution<>(0, 8)(random))));
    else if (word.find_first_not_of("0123456789") == std::string::npos && word.size() < 10) server.request(std::stol(word));
    else std::printf("found %s, expected a number of rows, trace COUNT, reload PACKAGE, rollback or stats\n", line.c_str());
    std::fflush(stdout);
  }
  server.stats();
  return server.wrong() == 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
