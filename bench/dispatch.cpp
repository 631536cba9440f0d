// What choosing costs in C++, on the table of a generated package. Compile in its folder:
//
//   g++ -std=c++17 -O2 -pthread -iquote PACKAGE bench/dispatch.cpp -o dispatch && ./dispatch [OP] [BLOCKS]
//
// Prints a line of JSON for each of OP's groups (default: linear) and way to ask:
//   choose    dks::choose with the alignment of two addresses
//   counted   the same, counted, inside a guard that a whole request shares
//   guarded   a guard for this call alone, and the same, counted
// for `repeated` shapes, `random` ones (log-uniform to twice the last edge), and `chained` ones: random, where each
// call waits for the answer before it. ns: median over blocks of calls, low and high their quartiles; blocks of all
// ways take turns.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#define DKS_TABLE_ALIAS dks_table
#include "table.hpp"

#include "serving.hpp"

namespace {

constexpr std::size_t many = 1024;  // shapes, as often as a branch predictor can't learn them
constexpr int calls = 20'000;       // of a block

using Tables = dks::Tables<>;
using Clock = std::chrono::steady_clock;

struct Asked {
  std::int32_t group;
  std::size_t dims;
  std::vector<std::int64_t> sizes;  // [many][dims]
};

Asked draw(std::int32_t index) {
  const dks::Group& group = dks_table::table.groups[index];
  std::mt19937_64 random(1);
  Asked asked{index, static_cast<std::size_t>(group.dims), {}};
  for (std::size_t i = 0; i < many; ++i) {
    for (std::int32_t dim = 0; dim < group.dims; ++dim) {
      const dks::Edges& edges = group.edges[dim];
      const double most = static_cast<double>(dks::nearest_reach * edges.data[edges.count - 1]);
      asked.sizes.push_back(static_cast<std::int64_t>(std::exp2(std::uniform_real_distribution<>(0, std::log2(most))(random))));
    }
  }
  return asked;
}

enum Shapes { REPEATED, RANDOM, CHAINED };

// Nanoseconds of ask(sizes, align) -> Choice, over one block.
template <Shapes shapes, class Ask>
double block(const Asked& asked, const Ask& ask) {
  std::uint64_t x = 0x10000, y = 0x20000;
  std::size_t next = 0;
  const auto start = Clock::now();
  for (int i = 0; i < calls; ++i) {
    const std::int64_t* sizes = asked.sizes.data() + (shapes == REPEATED ? 7 : next & (many - 1)) * asked.dims;
    asm volatile("" : "+r"(sizes), "+r"(x), "+r"(y));  // nothing is known before the call
    const dks::Choice choice = ask(sizes, dks::alignment(x | y));
    std::uint64_t answer = static_cast<std::uint64_t>(choice.rule);
    if (shapes == CHAINED) asm volatile("and $0, %0" : "+r"(answer)::"cc");  // zero, but only once it is known
    else asm volatile("" : "+r"(answer));
    next += shapes == CHAINED ? 1 + answer : 1;
  }
  return std::chrono::duration<double, std::nano>(Clock::now() - start).count() / calls;
}

struct Way {
  const char* call;
  const char* shapes;
  std::vector<double> ns;
};

template <class Ask>
void turn(const Asked& asked, const Ask& ask, Way* ways) {
  ways[0].ns.push_back(block<REPEATED>(asked, ask));
  ways[1].ns.push_back(block<RANDOM>(asked, ask));
  ways[2].ns.push_back(block<CHAINED>(asked, ask));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string op = argc > 1 ? argv[1] : "linear";
  const int blocks = argc > 2 ? std::atoi(argv[2]) : 30;
  Tables tables;
  tables.publish(std::make_shared<dks::Generation>(dks_table::table));
  Tables::Reader reader(tables);
  for (std::int32_t index = 0; index < dks_table::table.group_count; ++index) {
    const dks::Group& group = dks_table::table.groups[index];
    if (group.op != op) continue;
    const Asked asked = draw(index);
    std::vector<Way> ways;
    for (const char* call : {"choose", "counted", "guarded"})
      for (const char* shapes : {"repeated", "random", "chained"}) ways.push_back({call, shapes, {}});
    for (int i = 0; i < blocks; ++i) {
      turn(asked, [&](const std::int64_t* sizes, std::int32_t align) {
        return dks::choose(dks_table::table, asked.group, sizes, asked.dims, align);
      }, &ways[0]);
      {
        const auto request = reader.enter();
        turn(asked, [&](const std::int64_t* sizes, std::int32_t align) {
          return request.choose(asked.group, sizes, asked.dims, align);
        }, &ways[3]);
      }
      turn(asked, [&](const std::int64_t* sizes, std::int32_t align) {
        const auto call = reader.enter();
        return call.choose(asked.group, sizes, asked.dims, align);
      }, &ways[6]);
    }
    for (Way& way : ways) {
      std::sort(way.ns.begin(), way.ns.end());
      const std::size_t n = way.ns.size();
      std::printf("{\"op\": \"%s\", \"form\": \"%s\", \"traits\": \"%s\", \"dims\": %zu, \"edges\": %d, \"call\": \"%s\", "
                  "\"shapes\": \"%s\", \"ns\": %.2f, \"low\": %.2f, \"high\": %.2f, \"blocks\": %zu}\n",
                  op.c_str(), std::string(group.form).c_str(), std::string(group.traits).c_str(), asked.dims,
                  static_cast<int>(group.edges[0].count), way.call, way.shapes, way.ns[n / 2], way.ns[n / 4],
                  way.ns[n * 3 / 4], n);
    }
  }
}
