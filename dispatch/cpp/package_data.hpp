// What a generated package's own library exports: its table, and how to launch what the table chose.
#ifndef DKS_PACKAGE_DATA_HPP
#define DKS_PACKAGE_DATA_HPP

#include "lookup.hpp"

namespace dks {

// Of everything below. A library of another version is refused.
inline constexpr std::int32_t package_abi = 2;

enum class Kind : std::int32_t { linear = 0, norm = 1, softmax = 2, decode = 3 };

// What a linear's panels hold. `other` (int4) is packed in Python only.
enum class Weights : std::int32_t { other = 0, f32 = 1, bf16 = 2, int8 = 3 };

// A generated kernel with the constants that a rule runs it with; `symbol` has the signature of its kind in abi.h.
struct Kernel {
  const char* symbol;
  Kind kind;
  std::int32_t threads;
  // Of linears only: see `struct dks_linear` in abi.h.
  std::int32_t by_rows;
  Weights weights;
  std::int32_t panel, group, step;
};

// A variable that OpenMP reads, and what it was when the table was measured.
struct Switch {
  const char* name;
  const char* value;     // in capitals; empty at its default
  const char* defaults;  // other words for that, each between blanks
};

// What a package says of itself.
struct PackageData {
  std::int32_t abi;        // first in every version
  const char* name;
  const char* generation;  // digest of the table
  const char* arch;        // CPU that it was measured on: vendor, family, model, stepping
  const char* isa;         // instruction sets, joined by '+'
  const char* threads;     // that a kernel could take
  double max_error;        // ||y - ref|| / ||ref|| that no chosen kernel exceeds
  const Table* table;
  const Kernel* kernels;
  std::int32_t kernel_count;
  const std::int32_t* kernel_of;  // by rule: a kernel's index, -1 for kernels that are not generated ones
  const Switch* switches;
  std::int32_t switch_count;
};

}  // namespace dks

#endif  // DKS_PACKAGE_DATA_HPP
