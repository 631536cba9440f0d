// Whether operators called in this thread are plain computations, as dks/dispatch/ambient.py asks it in Python.
//
// A probe reads one switch of PyTorch's, a thread-local one in a nanosecond. Python looks the functions up by
// name and proves each by turning its switch on and off (dks/dispatch/native/probes.py); what can't be proved is
// asked through Python.
#ifndef DKS_THREAD_HPP
#define DKS_THREAD_HPP

#include <cstdint>
#include <vector>

#include "python.hpp"

namespace dks {

struct Probe {
  enum Kind : int { narrow, wide, callable, level };

  Kind kind = callable;
  void* function = nullptr;  // narrow: returns a bool; wide: an int64
  std::int64_t argument = 0;
  PyObject* object = nullptr;  // callable: returns anything true; level: a dict
  PyObject* key = nullptr;     // level: of a number that is -1 where nothing is on

  bool operator()() const {
    switch (kind) {
      case narrow: return reinterpret_cast<std::uint8_t (*)(std::int64_t)>(function)(argument) != 0;
      case wide: return reinterpret_cast<std::int64_t (*)(std::int64_t)>(function)(argument) != 0;
      case level: return below_zero();
      case callable: break;
    }
    Ref answer = Ref::take(PyObject_CallNoArgs(object));
    if (!answer) PyErr_Clear();
    return !answer || PyObject_IsTrue(answer.get()) != 0;
  }

 private:
  bool below_zero() const {
    PyObject* number = PyDict_GetItemWithError(object, key);  // borrowed
    const bool off = number != nullptr && PyLong_AsLong(number) == -1;
    PyErr_Clear();
    return !off;
  }
};

struct Thread {
  std::vector<Probe> special;   // each true where the framework must serve
  std::vector<Probe> autocast;  // whether it is on for CPUs, for GPUs
  Probe gradients;              // whether autograd records

  // For tensors on such a device; `kind` as DLPack numbers it: 1 or 2.
  bool plain(std::int32_t kind) const {
    for (const Probe& probe : special)
      if (probe()) return false;
    return !autocast[kind == 1 ? 0 : 1]();
  }
};

inline Thread thread;

}  // namespace dks

#endif  // DKS_THREAD_HPP
