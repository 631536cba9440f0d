// The lookup of a DKS dispatch table: C++17, header only, no dependency, no allocation.
//
// It is the C++ form of dks/dispatch/table.py and answers the same whole number:
//   rule << 2 | match   for a hit   (match: 0 exact, 1 bin, 2 nearest)
//   -1 - miss           for a miss  (miss: 0 zero-sized, 1 out of range, 2 unmeasured, 3 misaligned)
#ifndef DKS_LOOKUP_HPP
#define DKS_LOOKUP_HPP

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string_view>

namespace dks {

enum class Match : std::int32_t { exact = 0, bin = 1, nearest = 2 };
enum class Miss : std::int32_t { zero_sized = 0, out_of_range = 1, unmeasured = 2, misaligned = 3 };

// A size up to this many times the last edge takes the last bin's kernel.
inline constexpr std::int64_t nearest_reach = 2;

// Most dynamic dims of a group.
inline constexpr std::int32_t max_dynamic = 8;

struct Rule {
  const char* candidate;
  std::int32_t align;  // bytes
};

// Upper edges of one dynamic dim: bin i holds edges[i-1] < size <= edges[i].
//
// `first` is where to look for a size, by its octave (see below): how many edges lie in the octaves before. No octave
// holds more than `most` edges, and `most` times the largest number follows the last edge, so that there is something
// to read at any of those places.
struct Edges {
  const std::int64_t* data;
  std::int32_t count;
  const std::uint16_t* first;
  std::int32_t most;
};

// One alignment class: a rule's index or -1 for each combination of bins, the last dim running fastest.
struct Class {
  std::int32_t align;  // bytes; a call is in the class if its alignment is at least this
  const std::int32_t* cells;
};

// All choices of one (operator, form, traits, static dims).
struct Group {
  std::string_view op;
  std::string_view form;        // "prepared" or "direct"
  std::string_view traits;      // "name=value,..." sorted by name
  const std::int64_t* statics;  // in the operator's order
  std::int32_t static_count;
  const Edges* edges;  // in the operator's order
  std::int32_t dims;
  const Class* classes;  // largest alignment first
  std::int32_t class_count;
  bool fine = false;  // whether an octave of some dim holds more than a few edges
};

struct Table {
  const Rule* rules;
  const Group* groups;
  std::int32_t group_count;
  std::int32_t rule_count;
};

// What to run for a call. Without a hit: the caller's own default.
struct Choice {
  const char* candidate;  // "" without a hit
  Match match;            // means something with a hit only
  std::int32_t rule;      // -1 without a hit
  bool hit;
  Miss miss;  // means something without a hit only
};

// The octave of a size from 1: 2^(octave - 1) < size <= 2^octave.
constexpr std::int32_t octave_of(std::int64_t size) {
  return 63 - __builtin_clzll(2 * static_cast<std::uint64_t>(size) - 1);
}

constexpr std::int32_t miss(Miss why) { return -1 - static_cast<std::int32_t>(why); }

constexpr std::int32_t hit(std::int32_t rule, Match match) {
  return rule << 2 | static_cast<std::int32_t>(match);
}

// The largest power of two, at most 64, that divides every bit set of addresses and byte strides or-ed together.
constexpr std::int32_t alignment(std::uint64_t addresses_and_strides) {
  const std::uint64_t bits = addresses_and_strides | 64u;
  return static_cast<std::int32_t>(bits & (~bits + 1));
}

// find(); of fine bins, halves are left out until four remain.
template <bool fine>
constexpr std::int32_t search(const Group& group, const Rule* rules, const std::int64_t* sizes, std::int32_t align) {
  // What follows a size branches on none but those that are no hit: sizes that come at random would have every other
  // branch guessed wrong, which takes longer than all of this.
  std::int64_t cell = 0;
  bool exact = true, nearest = false;
  for (std::int32_t dim = 0; dim < group.dims; ++dim) {
    const Edges& edges = group.edges[dim];
    const std::int64_t size = sizes[dim], last = edges.data[edges.count - 1];
    if (size < 1) return miss(Miss::zero_sized);
    if (size > nearest_reach * last) return miss(Miss::out_of_range);
    std::int32_t index = edges.first[octave_of(size)], left = edges.most;
    while (fine && left > 4) {
      const std::int32_t half = left / 2;
      index += half & -static_cast<std::int32_t>(edges.data[index + half - 1] < size);
      left -= half;
    }
    const std::int64_t* near = edges.data + index;
    bool equal = false;
    for (std::int32_t i = 0; i < left; ++i) {
      index += near[i] < size;
      equal |= near[i] == size;
    }
    exact &= equal;
    nearest |= size > last;
    cell = cell * edges.count + index - (size > last);
  }
  // Below every class that was measured, the loosest class whose kernel takes such a call all the same.
  std::int32_t willing = -1;
  Miss why = Miss::unmeasured;
  for (std::int32_t i = 0; i < group.class_count; ++i) {
    const std::int32_t rule = group.classes[i].cells[cell];
    if (rule < 0) continue;
    if (group.classes[i].align <= align)
      return hit(rule, static_cast<Match>(nearest ? 2 : 1 - exact));
    why = Miss::misaligned;
    if (rules[rule].align <= align) willing = rule;
  }
  return willing < 0 ? miss(why) : hit(willing, Match::nearest);
}

// sizes holds group.dims numbers: the dynamic dims, in the operator's order.
constexpr std::int32_t find(const Group& group, const Rule* rules, const std::int64_t* sizes, std::int32_t align) {
  return group.fine ? search<true>(group, rules, sizes, align) : search<false>(group, rules, sizes, align);
}

// Index of the group with exactly this key, -1 where there is none. Looks at every group: ask once a layer,
// not once a call.
constexpr std::int32_t group_of(const Table& table, std::string_view op, std::string_view form,
                                std::string_view traits, std::initializer_list<std::int64_t> statics) {
  for (std::int32_t i = 0; i < table.group_count; ++i) {
    const Group& group = table.groups[i];
    bool same = group.op == op && group.form == form && group.traits == traits &&
                static_cast<std::size_t>(group.static_count) == statics.size();
    for (std::size_t dim = 0; same && dim < statics.size(); ++dim)
      same = group.statics[dim] == statics.begin()[dim];
    if (same) return i;
  }
  return -1;
}

// find() for a call of one group of a table. A group that does not exist (such as -1), or another number of sizes than
// it has dynamic dims, is a miss like any other: nothing was measured for such a call.
constexpr std::int32_t ask(const Table& table, std::int32_t group, const std::int64_t* sizes, std::size_t count,
                           std::int32_t align) {
  const bool known = group >= 0 && group < table.group_count &&
                     static_cast<std::size_t>(table.groups[group].dims) == count;
  return known ? find(table.groups[group], table.rules, sizes, align) : miss(Miss::unmeasured);
}

// What a whole number of find() or ask() says.
constexpr Choice choice_of(const Table& table, std::int32_t code) {
  if (code < 0) return {"", Match::nearest, -1, false, static_cast<Miss>(-1 - code)};
  const std::int32_t rule = code >> 2;
  return {table.rules[rule].candidate, static_cast<Match>(code & 3), rule, true, Miss::unmeasured};
}

// The choice for a call of one group: see ask().
constexpr Choice choose(const Table& table, std::int32_t group, const std::int64_t* sizes, std::size_t count,
                        std::int32_t align) {
  return choice_of(table, ask(table, group, sizes, count, align));
}

}  // namespace dks

#endif  // DKS_LOOKUP_HPP
