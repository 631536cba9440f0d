// A package's table as a library, for C++ servers that open packages while they run; see package.hpp.
// dks.codegen.launch compiles it against the package's own launch.hpp.
#define DKS_TABLE_ALIAS dks_table
#include "launch.hpp"

extern "C" __attribute__((visibility("default"))) const dks::PackageData* dks_package() { return &dks_table::package; }
