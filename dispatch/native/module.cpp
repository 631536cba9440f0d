// The extension `_dispatch` of a generated package (stable ABI, CPython 3.10 on): the fast path of serving code.
//
// It holds no table of its own. Python checks a package, makes plans from its table, and hands them over; a
// second package of the same version uses the same extension. dks.codegen.compile compiles it.
//
//   SOURCE    digest of the sources that it was compiled from
//   setup({...})   once: PyTorch's types, functions and probes; see dks/dispatch/native/__init__.py
#include "direct.hpp"
#include "gpu_kernel.hpp"
#include "layer.hpp"

#ifndef DKS_SOURCE
#error "define DKS_SOURCE as a string: the digest of the extension's sources"
#endif

namespace dks {
namespace {

template <typename Function>
PyCFunction method(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

template <typename State>
PyTypeObject* make_type(PyObject* module, const char* name, PyMethodDef* methods, ternaryfunc call = nullptr) {
  PyType_Slot slots[] = {
      {Py_tp_new, reinterpret_cast<void*>(&State::create)},
      {Py_tp_dealloc, reinterpret_cast<void*>(&Object<State>::finish)},
      {Py_tp_traverse, reinterpret_cast<void*>(&Object<State>::traverse)},
      {Py_tp_clear, reinterpret_cast<void*>(&Object<State>::clear)},
      {Py_tp_methods, methods},
      {call == nullptr ? 0 : Py_tp_call, reinterpret_cast<void*>(call)},
      {0, nullptr},
  };
  PyType_Spec spec = {name, sizeof(Object<State>), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};
  PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr) return nullptr;
  Py_INCREF(type);  // one for the module, one for us
  if (PyModule_AddObject(module, std::strrchr(name, '.') + 1, type) != 0) {
    Py_DECREF(type);
    Py_DECREF(type);
    return nullptr;
  }
  return reinterpret_cast<PyTypeObject*>(type);
}

PyMethodDef no_methods[] = {{nullptr, nullptr, 0, nullptr}};
PyMethodDef counts_methods[] = {
    {"read", &Counts::read, METH_NOARGS, "read() -> (exact, bin, nearest)"},
    {nullptr, nullptr, 0, nullptr},
};
PyMethodDef plan_methods[] = {
    {"find", method(&Plan::find_python), METH_FASTCALL, "find(align, *sizes) -> the lookup's number"},
    {"drop", &Plan::drop, METH_O, "drop(rule): its kernel serves no more"},
    {nullptr, nullptr, 0, nullptr},
};
PyMethodDef serial_methods[] = {
    {"get", &Serial::get, METH_NOARGS, "get() -> the number of the generation that serves"},
    {"set", &Serial::set, METH_O, "set(number)"},
    {nullptr, nullptr, 0, nullptr},
};
PyMethodDef watch_methods[] = {
    {"cover", &Watch::cover, METH_O, "cover(spans): look at their bytes from now on"},
    {"changed", method(&Watch::changed_python), METH_FASTCALL, "changed(weight, bias) -> bool: the look of a call"},
    {"differs", method(&Watch::differs), METH_FASTCALL, "differs(weight, bias) -> bool: a look at every byte"},
    {nullptr, nullptr, 0, nullptr},
};
PyMethodDef layer_methods[] = {
    {"hold", &Layer::hold, METH_VARARGS, "hold(number, binding): what serves while that generation does"},
    {"release", &Layer::release, METH_O, "release(number): forget a generation's binding"},
    {"call", method(&Layer::call), METH_FASTCALL, "call(module, x[, residual]) -> y"},
    {nullptr, nullptr, 0, nullptr},
};
PyMethodDef direct_methods[] = {
    {"add", &Direct::add, METH_VARARGS, "add(dtype, has_bias, n, k, plan, failed)"},
    {"call", method(&Direct::call), METH_FASTCALL, "call(x, weight, bias) -> y, or NotImplemented"},
    {"choose", method(&Direct::choose), METH_FASTCALL, "choose(x, weight, bias) -> the lookup's number"},
    {nullptr, nullptr, 0, nullptr},
};

// A new reference that is kept for good, or null with an error.
PyObject* keep(PyObject* from, const char* name) {
  PyObject* value = PyDict_GetItemString(from, name);
  if (value == nullptr) PyErr_Format(PyExc_KeyError, "setup: found no %s", name);
  Py_XINCREF(value);
  return value;
}

// (kind, address, argument, object, key) as dks/dispatch/native/probes.py makes it.
bool parse_probe(PyObject* given, Probe& probe) {
  int kind;
  unsigned long long address;
  long long argument;
  if (!PyArg_ParseTuple(given, "iKLOO", &kind, &address, &argument, &probe.object, &probe.key)) return false;
  probe.kind = static_cast<Probe::Kind>(kind);
  probe.function = reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));
  probe.argument = argument;
  Py_INCREF(probe.object);
  Py_INCREF(probe.key);
  return true;
}

bool parse_probes(PyObject* given, std::vector<Probe>& probes) {
  if (!PyTuple_Check(given)) {
    PyErr_SetString(PyExc_TypeError, "setup: expected a tuple of probes");
    return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_Size(given); ++i) {
    probes.emplace_back();
    if (!parse_probe(PyTuple_GetItem(given, i), probes.back())) return false;
  }
  return true;
}

PyObject* setup(PyObject*, PyObject* given) {
  if (!PyDict_Check(given)) {
    PyErr_SetString(PyExc_TypeError, "setup: expected a dict");
    return nullptr;
  }
  Torch made;
  Thread threads;
  const Ref capsule = Ref::take(keep(given, "exchange"));
  if (!capsule) return nullptr;
  const auto* exchange =
      static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
  if (exchange == nullptr) return nullptr;
  if (exchange->header.major != dlpack::version || exchange->view == nullptr) {
    PyErr_Format(PyExc_RuntimeError, "found DLPack %u.%u, expected 1.x with tensor views", exchange->header.major,
                 exchange->header.minor);
    return nullptr;
  }
  made.view = exchange->view;
  made.stream = exchange->stream;
  made.tensor = reinterpret_cast<PyTypeObject*>(keep(given, "tensor"));
  made.parameter = reinterpret_cast<PyTypeObject*>(keep(given, "parameter"));
  made.new_empty = keep(given, "new_empty");
  made.empty_like = keep(given, "empty_like");
  made.is_neg = keep(given, "is_neg");
  made.declined = keep(given, "declined");
  made.bytes = keep(given, "bytes");
  made.requires_grad = PyUnicode_InternFromString("requires_grad");
  made.version = PyUnicode_InternFromString("_version");
  const Ref special = Ref::take(keep(given, "special")), autocast = Ref::take(keep(given, "autocast"));
  const Ref gradients = Ref::take(keep(given, "gradients"));
  if (PyErr_Occurred() != nullptr) return nullptr;
  if (!parse_probes(special.get(), threads.special) || !parse_probes(autocast.get(), threads.autocast) ||
      !parse_probe(gradients.get(), threads.gradients))
    return nullptr;
  if (threads.autocast.size() != 2) {
    PyErr_SetString(PyExc_ValueError, "setup: expected two probes of autocast");
    return nullptr;
  }
  torch = made;
  thread = std::move(threads);
  Py_RETURN_NONE;
}

int fill(PyObject* module) {
  Layer::weight_name = PyUnicode_InternFromString("weight");
  Layer::bias_name = PyUnicode_InternFromString("bias");
  const bool made = (Plan::counts_type = make_type<Counts>(module, "_dispatch.Counts", counts_methods)) &&
                    (Plan::kernel_type = make_type<Kernel>(module, "_dispatch.Kernel", no_methods, &Kernel::call)) &&
                    make_type<GpuKernel>(module, "_dispatch.GpuKernel", no_methods, &GpuKernel::call) &&
                    (Plan::type = make_type<Plan>(module, "_dispatch.Plan", plan_methods)) &&
                    (Layer::serial_type = make_type<Serial>(module, "_dispatch.Serial", serial_methods)) &&
                    (Watch::type = make_type<Watch>(module, "_dispatch.Watch", watch_methods)) &&
                    (Binding::type = make_type<Binding>(module, "_dispatch.Binding", no_methods)) &&
                    make_type<Layer>(module, "_dispatch.Layer", layer_methods) &&
                    make_type<Direct>(module, "_dispatch.Direct", direct_methods);
  return made ? PyModule_AddStringConstant(module, "SOURCE", DKS_SOURCE) : -1;
}

PyMethodDef functions[] = {
    {"setup", &setup, METH_O, "setup(given): how tensors are read and threads are asked; before anything else"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(&fill)},
    {0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_dispatch", nullptr, 0, functions, slots, nullptr, nullptr, nullptr,
};

}  // namespace
}  // namespace dks

PyMODINIT_FUNC PyInit__dispatch() { return PyModuleDef_Init(&dks::definition); }
