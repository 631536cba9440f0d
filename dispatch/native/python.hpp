// What the extension's types share: an owning reference, and Python objects whose state is a C++ object.
#ifndef DKS_PYTHON_HPP
#define DKS_PYTHON_HPP

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <new>
#include <utility>

namespace dks {

// An owning reference, or null.
class Ref {
 public:
  Ref() = default;
  static Ref take(PyObject* owned) { return Ref(owned); }
  static Ref share(PyObject* borrowed) {
    Py_XINCREF(borrowed);
    return Ref(borrowed);
  }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  explicit Ref(PyObject* owned) : object_(owned) {}
  PyObject* object_ = nullptr;
};

// A Python object of a type whose state is `State`: it has `visit(visitproc, void*)` over its references, and
// its destructor lets go of them. Objects take part in garbage collection.
template <typename State>
struct Object {
  PyObject_HEAD
  State* state;

  static State& of(PyObject* self) { return *reinterpret_cast<Object*>(self)->state; }

  static PyObject* make(PyTypeObject* type, State* state) {
    if (state == nullptr) return PyErr_Occurred() ? nullptr : PyErr_NoMemory();
    const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
    PyObject* self = allocate(type, 0);
    if (self == nullptr) {
      delete state;
      return nullptr;
    }
    reinterpret_cast<Object*>(self)->state = state;
    return self;
  }

  static int traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(reinterpret_cast<PyObject*>(Py_TYPE(self)));
    State* state = reinterpret_cast<Object*>(self)->state;  // null while the object is being made
    return state == nullptr ? 0 : state->visit(visit, arg);
  }

  static int clear(PyObject* self) {
    State* state = reinterpret_cast<Object*>(self)->state;
    if (state != nullptr) state->clear();
    return 0;
  }

  static void finish(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    delete std::exchange(reinterpret_cast<Object*>(self)->state, nullptr);
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(reinterpret_cast<PyObject*>(type));
  }
};

// Visits the references of a state, one after the other; the first that says something ends it.
template <typename... Refs>
int visit_all(visitproc visit, void* arg, const Refs&... refs) {
  int said = 0;
  (void)((refs ? (said = visit(refs.get(), arg)) == 0 : true) && ...);
  return said;
}

// The error that is set, as an object, if it is an Exception. Null otherwise, with the error left set: an
// interruption is nobody's to handle.
inline Ref take_exception() {
  if (PyErr_ExceptionMatches(PyExc_Exception) == 0) return {};
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyErr_NormalizeException(&type, &value, &trace);
  if (trace != nullptr) PyException_SetTraceback(value, trace);
  Py_XDECREF(type);
  Py_XDECREF(trace);
  return Ref::take(value);
}

}  // namespace dks

#endif  // DKS_PYTHON_HPP
