// The lookup of a DKS dispatch table: C++17, header only, no dependency, no allocation.
//
// It is the C++ form of dks/dispatch/table.py and answers the same whole number:
//   rule << 2 | match   for a hit   (match: 0 exact, 1 bin, 2 nearest)
//   -1 - miss           for a miss  (miss: 0 zero-sized, 1 out of range, 2 unmeasured, 3 misaligned)
#ifndef DKS_LOOKUP_HPP
#define DKS_LOOKUP_HPP

#include <cstdint>

namespace dks {

enum class Match : std::int32_t { exact = 0, bin = 1, nearest = 2 };
enum class Miss : std::int32_t { zero_sized = 0, out_of_range = 1, unmeasured = 2, misaligned = 3 };

// A size up to this many times the last edge takes the last bin's kernel.
constexpr std::int64_t nearest_reach = 2;

struct Rule {
  const char* candidate;
  std::int32_t align;  // bytes
};

// Upper edges of one dynamic dim: bin i holds edges[i-1] < size <= edges[i].
struct Edges {
  const std::int64_t* data;
  std::int32_t count;
};

// One alignment class: a rule's index or -1 for each combination of bins, the last dim running fastest.
struct Class {
  std::int32_t align;  // bytes; a call is in the class if its alignment is at least this
  const std::int32_t* cells;
};

// All choices of one (operator, form, traits, static dims).
struct Group {
  const char* key;
  const Edges* edges;
  std::int32_t dims;
  const Class* classes;  // largest alignment first
  std::int32_t class_count;
};

// First edge that is not below size; edges.count where there is none.
constexpr std::int32_t bin_of(const Edges& edges, std::int64_t size) {
  std::int32_t low = 0, high = edges.count;
  while (low < high) {
    const std::int32_t middle = low + (high - low) / 2;
    if (edges.data[middle] < size) low = middle + 1;
    else high = middle;
  }
  return low;
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

constexpr std::int32_t find(const Group& group, const Rule* rules, const std::int64_t* sizes,
                            std::int32_t align) {
  std::int64_t cell = 0;
  bool exact = true, nearest = false;
  for (std::int32_t dim = 0; dim < group.dims; ++dim) {
    const Edges& edges = group.edges[dim];
    const std::int64_t size = sizes[dim];
    if (size < 1) return miss(Miss::zero_sized);
    std::int32_t index = bin_of(edges, size);
    if (index == edges.count) {
      if (size > nearest_reach * edges.data[edges.count - 1]) return miss(Miss::out_of_range);
      --index;
      nearest = true;
    }
    exact = exact && edges.data[index] == size;
    cell = cell * edges.count + index;
  }
  bool measured = false;
  for (std::int32_t i = 0; i < group.class_count; ++i) {
    const std::int32_t rule = group.classes[i].cells[cell];
    if (rule < 0) continue;
    if (group.classes[i].align <= align)
      return hit(rule, nearest ? Match::nearest : exact ? Match::exact : Match::bin);
    measured = true;
    if (i == group.class_count - 1 && rules[rule].align <= align) return hit(rule, Match::nearest);
  }
  return miss(measured ? Miss::misaligned : Miss::unmeasured);
}

}  // namespace dks

#endif  // DKS_LOOKUP_HPP
