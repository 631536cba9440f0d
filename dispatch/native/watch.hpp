// Notices that a layer's parameters are no longer those that its kernels were bound to; dks/dispatch/watch.py says
// what is noticed when.
//
//   Watch(weight, bias, seen)        seen: ((tensor, address, version or -1), ...)
//   watch.cover(spans)               spans: ((address, bytes, unit, calls), ...): looks at their bytes from now on
//   watch.changed(weight, bias)      the look of a call: at identity, address, version, and the next units of each span
//   watch.differs(weight, bias)      the same, and at every byte
#ifndef DKS_WATCH_HPP
#define DKS_WATCH_HPP

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "tensor.hpp"

namespace dks {

// A sum of bytes in lanes of words. Each step is one to one, in the sum and in the word. So sums differ for sure where one
// word alone differs; where more do, whatever the others are, one value in 2^64 of the last of them is missed.
struct Sum {
  using Words = std::uint64_t __attribute__((vector_size(16)));
  static constexpr std::uint64_t size = sizeof(Words);

  Words a = {}, b = {}, c = {}, d = {};  // no array: one would lie in memory

  static void add(Words& sums, const char* from) {
    Words words;
    std::memcpy(&words, from, sizeof words);
    sums ^= words;
    sums = sums << 29 | sums >> 35;
    sums += sums << 3;  // times 9
  }

  static void fold(std::uint64_t& total, Words sums) {
    for (int lane = 0; lane < 2; ++lane) {
      total ^= sums[lane];
      total = (total << 29 | total >> 35) * 0x9e3779b97f4a7c15u;
    }
  }

  std::uint64_t total() const {
    std::uint64_t found = 0;
    for (const Words& each : {a, b, c, d}) fold(found, each);
    return found;
  }
};

// A parameter's memory in units: a call looks at units first, first + calls, ...
struct Span {
  const char* address;
  std::uint64_t bytes, unit, calls;  // `unit` is divisible by Sum::size
  std::vector<std::uint64_t> sums;   // of what each of `calls` calls looks at, as it was when it was bound

  std::uint64_t sum(std::uint64_t first) const {
    Sum sum;
    const std::uint64_t whole = bytes / unit, next = calls * unit;
    std::uint64_t at = first;
    for (; at + 3 * calls < whole; at += 4 * calls) {  // four at a time: each step waits for the one before it
      const char* from = address + at * unit;
      const auto ahead = reinterpret_cast<std::uintptr_t>(from) + 4 * next;  // may lie past the end: nothing is read
      for (std::uint64_t i = 0; i < 4; ++i) __builtin_prefetch(reinterpret_cast<const void*>(ahead + i * next));
      for (const char* end = from + unit; from < end; from += Sum::size) {
        Sum::add(sum.a, from);
        Sum::add(sum.b, from + next);
        Sum::add(sum.c, from + 2 * next);
        Sum::add(sum.d, from + 3 * next);
      }
    }
    for (; at * unit < bytes; at += calls)
      for (std::uint64_t from = at * unit; from < bytes && from < (at + 1) * unit; from += Sum::size) {
        char words[Sum::size] = {};  // what is missing at the end counts as zeros
        std::memcpy(words, address + from, static_cast<std::size_t>(bytes - from < Sum::size ? bytes - from : Sum::size));
        Sum::add(sum.a, words);
      }
    return sum.total();
  }
};

struct Watch {
  struct Tensor {
    Ref object;
    const void* address;
    std::int64_t version;  // -1: an inference tensor counts none
    dlpack::DataType dtype{};
    std::vector<std::int64_t> form;  // shape and strides

    // ``weight.data = weight.data.t()`` moves neither address nor version.
    bool lies_as(const View& view) const {
      if (!view.is(dtype) || form.size() != 2 * static_cast<std::size_t>(view.ndim)) return false;
      const auto strides = form.begin() + view.ndim;
      return std::equal(form.begin(), strides, view.shape) && std::equal(strides, form.end(), view.strides);
    }
  };

  Ref weight, bias;
  std::vector<Tensor> tensors;
  std::vector<Span> spans;
  mutable std::atomic<std::uint64_t> calls{0};
  mutable std::atomic<bool> written{false};  // for good: what the next call looks at may be as it was

  static PyTypeObject* type;

  int visit(visitproc visit, void* arg) const {  // a parameter may hold its layer, by an attribute of its own
    for (const Tensor& tensor : tensors)
      if (const int said = visit_all(visit, arg, tensor.object)) return said;
    return visit_all(visit, arg, weight, bias);
  }
  void clear() {}

  static PyObject* create(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *weight, *bias, *seen;
    if (!PyArg_ParseTuple(args, "OOO!", &weight, &bias, &PyTuple_Type, &seen)) return nullptr;
    auto* state = new (std::nothrow) Watch;
    if (state == nullptr) return PyErr_NoMemory();
    state->weight = Ref::share(weight);
    state->bias = Ref::share(bias);
    for (Py_ssize_t i = 0; i < PyTuple_Size(seen); ++i) {
      PyObject* object;
      unsigned long long address;
      long long version;
      if (!PyArg_ParseTuple(PyTuple_GetItem(seen, i), "OKL", &object, &address, &version)) {
        delete state;
        return nullptr;
      }
      const auto* at = reinterpret_cast<const void*>(static_cast<std::uintptr_t>(address));
      Tensor tensor{Ref::share(object), at, version};
      if (View view; view.read(object)) {
        tensor.dtype = view.dtype;
        tensor.form.assign(view.shape, view.shape + view.ndim);
        tensor.form.insert(tensor.form.end(), view.strides, view.strides + view.ndim);
      }
      state->tensors.push_back(std::move(tensor));
    }
    return Object<Watch>::make(type, state);
  }

  static PyObject* cover(PyObject* self, PyObject* told) {
    std::vector<Span> spans;
    if (!PyTuple_Check(told)) {
      PyErr_SetString(PyExc_TypeError, "watch: expected a tuple of spans");
      return nullptr;
    }
    for (Py_ssize_t i = 0; i < PyTuple_Size(told); ++i) {
      unsigned long long address, bytes, unit, calls;
      if (!PyArg_ParseTuple(PyTuple_GetItem(told, i), "KKKK", &address, &bytes, &unit, &calls)) return nullptr;
      if (unit == 0 || unit % Sum::size != 0 || calls == 0 || calls > 1 << 16) {
        PyErr_SetString(PyExc_ValueError, "watch: expected units of 16 bytes or more, all looked at in 1 to 65536 calls");
        return nullptr;
      }
      const auto* at = reinterpret_cast<const char*>(static_cast<std::uintptr_t>(address));
      spans.push_back({at, bytes, unit, calls, std::vector<std::uint64_t>(static_cast<std::size_t>(calls))});
    }
    PyThreadState* state = PyEval_SaveThread();  // whoever asks for it keeps the memory
    for (Span& span : spans)
      for (std::uint64_t i = 0; i < span.calls; ++i)
        span.sums[i] = span.sum(i);
    PyEval_RestoreThread(state);
    Object<Watch>::of(self).spans = std::move(spans);
    Py_RETURN_NONE;
  }

  static PyObject* changed_python(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    return answer(self, args, count, [](const Watch& watch) { return watch.scrub(); });
  }

  static PyObject* differs(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    return answer(self, args, count, [](const Watch& watch) {
      PyThreadState* state = PyEval_SaveThread();
      for (const Span& span : watch.spans)
        for (std::uint64_t i = 0; i < span.calls && !watch.written; ++i) watch.look(span, i);
      PyEval_RestoreThread(state);
      return watch.written.load();
    });
  }

  // For the parameters as the layer holds them now, null for one it lacks. Looks at bytes last: what was resized away
  // must not be read.
  bool changed(PyObject* now_weight, PyObject* now_bias) const { return replaced(now_weight, now_bias) || scrub(); }

 private:
  static constexpr std::uint64_t long_look = 256 * 1024;  // bytes that others need not wait for

  template <typename Look>
  static PyObject* answer(PyObject* self, PyObject* const* args, Py_ssize_t count, Look look) {
    if (count != 2) {
      PyErr_SetString(PyExc_TypeError, "watch: expected a weight and a bias");
      return nullptr;
    }
    const Watch& watch = Object<Watch>::of(self);
    return PyBool_FromLong(watch.replaced(args[0], args[1]) || look(watch));
  }

  bool replaced(PyObject* now_weight, PyObject* now_bias) const {
    if (now_weight != weight.get() || (now_bias == nullptr ? Py_None : now_bias) != bias.get()) return true;
    for (const Tensor& tensor : tensors) {
      View view;
      if (!view.read(tensor.object.get()) || view.address() != tensor.address || !tensor.lies_as(view))
        return true;
      if (tensor.version < 0) continue;
      Ref version = Ref::take(PyObject_GetAttr(tensor.object.get(), torch.version));
      const long long number = version ? PyLong_AsLongLong(version.get()) : -1;
      if (number != tensor.version) {
        PyErr_Clear();
        return true;
      }
    }
    return false;
  }

  // Whether a write was noticed, now or before.
  bool scrub() const {
    if (spans.empty()) return false;
    if (written.load(std::memory_order_relaxed)) return true;
    const std::uint64_t call = calls.fetch_add(1, std::memory_order_relaxed);
    for (const Span& span : spans) {
      const bool lets_others = span.bytes / span.calls > long_look;
      PyThreadState* state = lets_others ? PyEval_SaveThread() : nullptr;
      look(span, call % span.calls);
      if (lets_others) PyEval_RestoreThread(state);
    }
    return written.load(std::memory_order_relaxed);
  }

  void look(const Span& span, std::uint64_t first) const {
    if (span.sum(first) != span.sums[first]) written = true;
  }
};

inline PyTypeObject* Watch::type = nullptr;

}  // namespace dks

#endif  // DKS_WATCH_HPP
