// The compiled lookup of one generated package: the Python module `_lookup` (stable ABI, CPython 3.10 on).
//
//   find(group, align, *sizes) -> int   what dks.dispatch.table.Table.find answers, errors included
//   GENERATION                          digest of the package that it was compiled for
//
// dks.codegen.compile compiles it against the package's own table.hpp.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <limits>

#define DKS_TABLE_ALIAS dks_table
#include "table.hpp"

#ifndef DKS_GENERATION
#error "define DKS_GENERATION as a string: the digest of the package"
#endif

namespace {

// A whole number outside the type's range becomes its furthest value: the lookup answers both alike, because
// edges end at 2^40 and alignments at 64. False with a Python error where `value` is no whole number.
template <typename Number>
bool parse(PyObject* value, Number& parsed) {
  constexpr long long least = std::numeric_limits<Number>::min();
  constexpr long long most = std::numeric_limits<Number>::max();
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
  if (number == -1 && overflow == 0 && PyErr_Occurred() != nullptr) return false;
  const long long held = overflow > 0 ? most : overflow < 0 ? least : number;
  parsed = static_cast<Number>(held > most ? most : held < least ? least : held);
  return true;
}

PyObject* find(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count < 2) {
    PyErr_Format(PyExc_TypeError, "found %zd arguments, expected group, align and sizes", count);
    return nullptr;
  }
  std::int32_t group = 0, align = 0;
  if (!parse(args[0], group) || !parse(args[1], align)) return nullptr;
  if (group < 0 || group >= dks_table::table.group_count) {
    PyErr_Format(PyExc_IndexError, "found group %R, expected 0..%d", args[0],
                 static_cast<int>(dks_table::table.group_count) - 1);
    return nullptr;
  }
  const dks::Group& asked = dks_table::table.groups[group];
  if (count - 2 != asked.dims) {
    PyErr_Format(PyExc_TypeError, "found %zd sizes, expected %d", count - 2, static_cast<int>(asked.dims));
    return nullptr;
  }
  std::int64_t sizes[dks::max_dynamic] = {};
  for (std::int32_t dim = 0; dim < asked.dims; ++dim)
    if (!parse(args[2 + dim], sizes[dim])) return nullptr;
  return PyLong_FromLong(dks::find(asked, dks_table::table.rules, sizes, align));
}

int fill(PyObject* module) { return PyModule_AddStringConstant(module, "GENERATION", DKS_GENERATION); }

PyDoc_STRVAR(find_text,
             "find($module, group, align, /, *sizes)\n--\n\n"
             "The compiled form of dks.dispatch.table.Table.find.");

PyMethodDef methods[] = {
    {"find", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&find)), METH_FASTCALL, find_text},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(&fill)},
    {0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_lookup", nullptr, 0, methods, slots, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__lookup() { return PyModuleDef_Init(&definition); }
