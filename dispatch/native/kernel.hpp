// A generated kernel with its constants bound: a Python callable, and what the fast path launches without Python.
//
//   Kernel(kind, address, constants, dtype, width, keep)
//     kind: "linear" or "norm"; address of the function; the bytes of its constant struct (tiles/abi.h);
//     dtype: (DLPack code, bits) of x and y; width: x's last dim; keep: what the constants point to.
//   kernel(x) -> y, kernel(x, residual) -> y, or (y, x + residual) of a norm
#ifndef DKS_KERNEL_HPP
#define DKS_KERNEL_HPP

#include <cstring>
#include <string_view>

#include "abi.h"
#include "tensor.hpp"

namespace dks {

struct Kernel {
  enum Kind { linear, norm } kind = linear;
  union {
    dks_linear_fn as_linear;
    dks_norm_fn as_norm;
    void* address;
  } function{};
  union {
    dks_linear linear;
    dks_norm norm;
  } constant{};
  dlpack::DataType dtype{};
  std::int64_t width = 0;
  Ref keep;
  PyObject* texts = nullptr;  // why a kernel declined, by its code

  int visit(visitproc visit, void* arg) const { return visit_all(visit, arg, keep); }
  void clear() {}  // what is kept are tensors: they are part of no cycle

  std::int64_t out_width() const { return kind == linear ? constant.linear.n : width; }

  // x and the residual (null for none) as they were read, `rows` of them; both were checked. New, or null with
  // an error.
  PyObject* launch(PyObject* x_object, const View& x, const View* residual, std::int64_t rows) const {
    Ref y = Ref::take(kind == linear && out_width() != width
                          ? empty(x_object, x)
                          : PyObject_CallFunctionObjArgs(torch.empty_like, x_object, nullptr));
    if (!y) return nullptr;
    Ref sum;
    View out, added;
    if (!out.read(y.get())) return unreadable();
    if (kind == norm && residual != nullptr) {
      sum = Ref::take(PyObject_CallFunctionObjArgs(torch.empty_like, x_object, nullptr));
      if (!sum) return nullptr;
      if (!added.read(sum.get())) return unreadable();
    }
    const void* other = residual == nullptr ? nullptr : residual->address();
    void* to = const_cast<char*>(out.address());
    int code = 0;
    PyThreadState* state = PyEval_SaveThread();
    if (kind == linear) {
      code = function.as_linear(&constant.linear, x.address(), other, to, rows);
    } else {
      void* also = sum ? const_cast<char*>(added.address()) : nullptr;
      code = function.as_norm(&constant.norm, x.address(), other, to, also, rows);
    }
    PyEval_RestoreThread(state);
    if (code != DKS_OK) return decline(code);
    return sum ? PyTuple_Pack(2, y.get(), sum.get()) : y.release();
  }

  static PyObject* create(PyTypeObject* type, PyObject* args, PyObject*) {
    const char *kind, *bytes;
    Py_ssize_t size;
    unsigned long long address;
    int code, bits;
    long long width;
    PyObject *keep, *texts;
    if (!PyArg_ParseTuple(args, "sKy#(ii)LOO!", &kind, &address, &bytes, &size, &code, &bits, &width, &keep,
                          &PyDict_Type, &texts))
      return nullptr;
    const bool is_linear = std::string_view(kind) == "linear";
    const std::size_t wanted = is_linear ? sizeof(dks_linear) : sizeof(dks_norm);
    if ((!is_linear && std::string_view(kind) != "norm") || static_cast<std::size_t>(size) != wanted ||
        address == 0 || width < 1) {
      PyErr_Format(PyExc_ValueError, "kernel: found kind %s and %zd bytes, expected linear or norm and %zu", kind,
                   size, wanted);
      return nullptr;
    }
    auto* state = new (std::nothrow) Kernel;
    if (state == nullptr) return PyErr_NoMemory();
    state->kind = is_linear ? linear : norm;
    state->function.address = reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));
    std::memcpy(&state->constant, bytes, wanted);
    state->dtype = {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1};
    state->width = width;
    state->keep = Ref::take(PyTuple_Pack(2, keep, texts));
    state->texts = texts;
    return Object<Kernel>::make(type, state);
  }

  static PyObject* call(PyObject* self, PyObject* args, PyObject* named) {
    const Kernel& kernel = Object<Kernel>::of(self);
    PyObject *x_object, *r_object = nullptr;
    if (named != nullptr && PyDict_Size(named) != 0) {
      PyErr_SetString(PyExc_TypeError, "a kernel takes x, or x and a residual, by position");
      return nullptr;
    }
    if (!PyArg_UnpackTuple(args, "kernel", 1, 2, &x_object, &r_object)) return nullptr;
    View x, residual;
    const std::int64_t count = x.read(x_object) && x.is(kernel.dtype) ? x.packed() : -1;
    if (count < 0 || x.ndim < 1 || x.shape[x.ndim - 1] != kernel.width) return kernel.misfit("x");
    if (r_object != nullptr &&
        !(residual.read(r_object) && residual.is(kernel.dtype) && residual.packed() >= 0 &&
          residual.same_rows(x, kernel.out_width())))
      return kernel.misfit("the residual");
    const bool adds = kernel.kind == linear && kernel.constant.linear.epilogue == DKS_ADD;
    if (kernel.kind == linear && adds != (r_object != nullptr)) return kernel.misfit("the residual");
    return kernel.launch(x_object, x, r_object == nullptr ? nullptr : &residual, count / kernel.width);
  }

 private:
  static PyObject* unreadable() {
    PyErr_SetString(PyExc_RuntimeError, "the output that PyTorch made can't be read");
    return nullptr;
  }

  PyObject* misfit(const char* what) const {
    PyErr_Format(PyExc_ValueError, "%s: expected rows of %lld elements, contiguous on a CPU, of the bound dtype",
                 what, static_cast<long long>(width));
    return nullptr;
  }

  PyObject* decline(int code) const {
    Ref number = Ref::take(PyLong_FromLong(code));
    PyObject* text = number ? PyDict_GetItemWithError(texts, number.get()) : nullptr;
    if (text != nullptr)
      PyErr_SetObject(torch.declined, text);
    else if (!PyErr_Occurred())
      PyErr_Format(PyExc_RuntimeError, "the kernel answered the unknown code %d", code);
    return nullptr;
  }

  // (..., n) of x's dtype.
  PyObject* empty(PyObject* x_object, const View& x) const {
    Ref arguments = Ref::take(PyTuple_New(x.ndim + 1));
    if (!arguments) return nullptr;
    Py_INCREF(x_object);
    PyTuple_SetItem(arguments.get(), 0, x_object);
    for (std::int32_t dim = 0; dim < x.ndim; ++dim) {
      PyObject* size = PyLong_FromLongLong(dim + 1 == x.ndim ? out_width() : x.shape[dim]);
      if (size == nullptr) return nullptr;
      PyTuple_SetItem(arguments.get(), dim + 1, size);
    }
    return PyObject_Call(torch.new_empty, arguments.get(), nullptr);
  }
};

}  // namespace dks

#endif  // DKS_KERNEL_HPP
