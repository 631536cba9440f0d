// Threads dispatch while others publish tables and roll back. Every table's text, edges and cells say which generation
// it is of; each call checks that all it saw is of one.
//
//   stress THREADS DISPATCHES SWAPS    (SWAPS even: half of them roll back)
//
// Prints one line of JSON; ends with code 1 where a call saw two generations, or counts do not add up.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "serving.hpp"

using Clock = std::chrono::steady_clock;

// Generation `number`: bins end at 8 + number % 8, rule r is called "number/r", and odd generations have their two
// rules the other way round.
struct Made : dks::Generation {
  struct Memory {
    explicit Memory(long number)
        : names{std::to_string(number) + "/0", std::to_string(number) + "/1"},
          rules{{names[0].c_str(), 4}, {names[1].c_str(), 4}},
          data{8 + number % 8, 64, INT64_MAX, INT64_MAX},
          first{0, 0, 0, 0, data[0] > 8 ? std::uint16_t{0} : std::uint16_t{1}, 1, 1, 2},
          edges{data, 2, first, 1},
          cells{static_cast<std::int32_t>(number % 2), static_cast<std::int32_t>(1 - number % 2)},
          classes{64, cells},
          group{"op", "direct", "", nullptr, 0, &edges, 1, &classes, 1},
          table{rules, &group, 1, 2} {}
    std::string names[2];
    dks::Rule rules[2];
    std::int64_t data[4];
    std::uint16_t first[8];
    dks::Edges edges;
    std::int32_t cells[2];
    dks::Class classes;
    dks::Group group;
    dks::Table table;
  };

  explicit Made(long of) : Made(of, std::make_shared<Memory>(of)) {}
  ~Made() override { number = -1; }
  long number;

 private:
  Made(long of, const std::shared_ptr<Memory>& memory) : Generation(memory->table, std::to_string(of), memory), number(of) {}
};

using Tables = dks::Tables<Made>;

struct Worker {
  alignas(64) std::atomic<long> done{0};
  std::vector<float> steady, swapping;  // nanoseconds of one call in 64
  long wrong = 0;
};

enum Phase { STEADY, SWAPPING, OVER };

static void dispatch(Tables& tables, Worker& own, const std::atomic<int>& phase) {
  Tables::Reader reader(tables);
  std::uint64_t random = 88172645463325252u + reinterpret_cast<std::uintptr_t>(&own);
  for (long i = 0; phase.load(std::memory_order_relaxed) != OVER; ++i) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    const auto size = static_cast<std::int64_t>(random % 64 + 1);
    const bool timed = i % 64 == 0;
    const auto start = timed ? Clock::now() : Clock::time_point{};
    dks::Choice choice;
    long number;
    {
      const auto call = reader.enter();
      choice = call.choose(0, {size}, 64);
      if (timed) {
        const float ns = std::chrono::duration<float, std::nano>(Clock::now() - start).count();
        (phase.load(std::memory_order_relaxed) == STEADY ? own.steady : own.swapping).push_back(ns);
      }
      number = call->number;
      const std::int32_t bin = size > 8 + number % 8;
      own.wrong += !choice.hit || choice.rule != (bin ^ number % 2) || std::atol(choice.candidate) != number ||
                   call->id() != std::to_string(number);
      if (i % 4096 == 0) {  // a request of several layers
        const auto inner = reader.enter();
        own.wrong += inner->number != number;
      }
    }
    own.done.store(i + 1, std::memory_order_relaxed);
  }
}

static double p99(std::vector<Worker>& workers, std::vector<float> Worker::*which) {
  std::vector<float> all;
  for (Worker& worker : workers) all.insert(all.end(), (worker.*which).begin(), (worker.*which).end());
  if (all.empty()) return 0;
  const std::size_t at = all.size() * 99 / 100;
  std::nth_element(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(at), all.end());
  return static_cast<double>(all[at]);
}

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const long threads = std::atol(argv[1]), dispatches = std::atol(argv[2]), swaps = std::atol(argv[3]);
  Tables tables(static_cast<std::size_t>(threads));
  tables.publish(std::make_shared<Made>(0));
  std::vector<Worker> workers(static_cast<std::size_t>(threads));
  for (Worker& worker : workers) {
    const auto room = static_cast<std::size_t>(dispatches / threads / 16 + 1024);
    worker.steady.reserve(room);
    worker.swapping.reserve(room);
  }
  std::atomic<int> phase{STEADY};
  std::vector<std::thread> running;
  const auto start = Clock::now();
  for (Worker& worker : workers) running.emplace_back([&] { dispatch(tables, worker, phase); });
  const auto done = [&] {
    long sum = 0;
    for (const Worker& worker : workers) sum += worker.done.load(std::memory_order_relaxed);
    return sum;
  };
  while (done() < dispatches / 2) std::this_thread::sleep_for(std::chrono::microseconds(100));
  phase = SWAPPING;
  const auto swapping = Clock::now();
  std::atomic<long> number{0}, rolled{0};
  std::atomic<long> slowest{0};  // nanoseconds of a rollback
  const auto write = [&](long first) {
    for (long i = first; i < swaps; i += 2) {
      while (done() < dispatches / 2 + dispatches / 2 * i / swaps) std::this_thread::yield();
      if (i / 2 % 2 == 0) {
        tables.publish(std::make_shared<Made>(++number), std::chrono::minutes(1));
        continue;
      }
      const auto before = Clock::now();
      rolled += tables.rollback();
      const long ns = static_cast<long>(std::chrono::duration<double, std::nano>(Clock::now() - before).count());
      for (long old = slowest; ns > old && !slowest.compare_exchange_weak(old, ns);) {}
    }
  };
  std::thread other(write, 1);
  write(0);
  other.join();
  while (done() < dispatches) std::this_thread::sleep_for(std::chrono::microseconds(100));
  phase = OVER;
  for (std::thread& thread : running) thread.join();
  const auto end = Clock::now();
  long wrong = 0;
  for (const Worker& worker : workers) wrong += worker.wrong;
  std::uint64_t counted = 0;
  for (std::int32_t i = 0; i < dks::outcomes; ++i) counted += tables.total(static_cast<dks::Outcome>(i));
  const long dispatched = done();
  const double seconds = std::chrono::duration<double>(end - start).count();
  std::printf("{\"dispatches\": %ld, \"counted\": %lu, \"swaps\": %ld, \"wrong\": %ld, \"per_second\": %.0f, "
              "\"swapping_seconds\": %.2f, \"p99_steady_ns\": %.0f, \"p99_swapping_ns\": %.0f, \"slowest_rollback_us\": %.1f}\n",
              dispatched, static_cast<unsigned long>(counted), number + rolled, wrong, static_cast<double>(dispatched) / seconds,
              std::chrono::duration<double>(end - swapping).count(), p99(workers, &Worker::steady), p99(workers, &Worker::swapping),
              static_cast<double>(slowest) / 1000);
  return wrong == 0 && counted == static_cast<std::uint64_t>(dispatched) && number + rolled == swaps ? 0 : 1;
}
