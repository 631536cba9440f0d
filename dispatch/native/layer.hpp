// The call of a prepared layer: the compiled form of dks.dispatch.prepared.PreparedModule.forward.
//
//   Serial()                the number of the generation that serves: get(), set(number)
//   Binding(plan, fused, dtype, device, features, out, row_bits, framework, failed, watch)
//     plan: of calls without a residual, fused: of calls with one, either may be None; device: (kind, index), DLPack's
//     numbers, where the parameters are; framework: (x, weight, bias) -> y, or None;
//     failed: (rule, error, layer, *given) -> y; watch: a Watch of the layer's parameters, one for all its bindings.
//   Layer(serial, parameters, hooks, slow)
//     hooks: the dicts of a module's hooks and of all modules'; slow: the Python form, (layer, x[, residual]) -> y
//   layer.hold(number, binding), layer.release(number): the bindings of a generation
//   layer.call(module, x[, residual]) -> y
//
// Whatever is out of the ordinary goes to the Python form, which decides, counts and explains.
#ifndef DKS_LAYER_HPP
#define DKS_LAYER_HPP

#include "plan.hpp"
#include "thread.hpp"
#include "watch.hpp"

namespace dks {

struct Serial {
  std::int64_t number = 0;

  int visit(visitproc, void*) const { return 0; }
  void clear() {}

  static PyObject* create(PyTypeObject* type, PyObject* args, PyObject*) {
    return PyArg_ParseTuple(args, "") ? Object<Serial>::make(type, new (std::nothrow) Serial) : nullptr;
  }
  static PyObject* get(PyObject* self, PyObject*) { return PyLong_FromLongLong(Object<Serial>::of(self).number); }
  static PyObject* set(PyObject* self, PyObject* number) {
    if (!parse(number, Object<Serial>::of(self).number)) return nullptr;
    Py_RETURN_NONE;
  }
};

struct Binding {
  Ref plan_object, fused_object, watch_object, framework, failed;
  Plan* plan = nullptr;
  Plan* fused = nullptr;
  dlpack::DataType dtype{};
  dlpack::Device device{};
  std::int64_t features = 0, out = 0;
  std::uint64_t row_bits = 0;
  const Watch* watch = nullptr;

  int visit(visitproc visit, void* arg) const {
    return visit_all(visit, arg, plan_object, fused_object, watch_object, framework, failed);
  }
  void clear() {
    failed = Ref();
    framework = Ref();
  }

  static PyTypeObject* type;

  static PyObject* create(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *plan, *fused, *framework, *failed, *watch;
    int code, bits;
    long long features, out;
    unsigned long long row_bits;
    dlpack::Device device{};
    if (!PyArg_ParseTuple(args, "OO(ii)(ii)LLKOOO!", &plan, &fused, &code, &bits, &device.type, &device.index, &features,
                          &out, &row_bits, &framework, &failed, Watch::type, &watch))
      return nullptr;
    for (PyObject* given : {plan, fused}) {
      if (features >= 1 && (given == Py_None || (Py_TYPE(given) == Plan::type && Object<Plan>::of(given).axes.size() == 1)))
        continue;
      PyErr_SetString(PyExc_ValueError, "binding: expected features above zero, and plans of one dim or None");
      return nullptr;
    }
    auto* state = new (std::nothrow) Binding;
    if (state == nullptr) return PyErr_NoMemory();
    if (plan != Py_None) {
      state->plan_object = Ref::share(plan);
      state->plan = &Object<Plan>::of(plan);
    }
    if (fused != Py_None) {
      state->fused_object = Ref::share(fused);
      state->fused = &Object<Plan>::of(fused);
    }
    state->dtype = {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1};
    state->device = device;
    state->features = features;
    state->out = out;
    state->row_bits = row_bits;
    if (framework != Py_None) state->framework = Ref::share(framework);
    state->failed = Ref::share(failed);
    state->watch_object = Ref::share(watch);
    state->watch = &Object<Watch>::of(watch);
    return Object<Binding>::make(type, state);
  }
};

inline PyTypeObject* Binding::type = nullptr;

struct Layer {
  struct Held {
    std::int64_t number;
    Ref object;
  };

  Ref serial_object, parameters, slow;
  const Serial* serial = nullptr;
  std::vector<Ref> hooks;
  std::vector<Held> bindings;

  static PyTypeObject* serial_type;
  static PyObject* weight_name;
  static PyObject* bias_name;

  int visit(visitproc visit, void* arg) const {
    for (const Ref& hook : hooks)
      if (const int said = visit_all(visit, arg, hook)) return said;
    for (const Held& held : bindings)
      if (const int said = visit_all(visit, arg, held.object)) return said;
    return visit_all(visit, arg, serial_object, parameters, slow);
  }
  void clear() {
    hooks.clear();
    bindings.clear();
  }

  static PyObject* create(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *serial, *parameters, *hooks, *slow;
    if (!PyArg_ParseTuple(args, "O!O!O!O", serial_type, &serial, &PyDict_Type, &parameters, &PyTuple_Type, &hooks,
                          &slow))
      return nullptr;
    auto* state = new (std::nothrow) Layer;
    if (state == nullptr) return PyErr_NoMemory();
    state->serial_object = Ref::share(serial);
    state->serial = &Object<Serial>::of(serial);
    state->parameters = Ref::share(parameters);
    state->slow = Ref::share(slow);
    for (Py_ssize_t i = 0; i < PyTuple_Size(hooks); ++i) state->hooks.push_back(Ref::share(PyTuple_GetItem(hooks, i)));
    return Object<Layer>::make(type, state);
  }

  static PyObject* hold(PyObject* self, PyObject* args) {
    long long number;
    PyObject* binding;
    if (!PyArg_ParseTuple(args, "LO!", &number, Binding::type, &binding)) return nullptr;
    Layer& layer = Object<Layer>::of(self);
    layer.drop(number);
    layer.bindings.push_back({number, Ref::share(binding)});
    Py_RETURN_NONE;
  }

  static PyObject* release(PyObject* self, PyObject* number) {
    std::int64_t parsed = 0;
    if (!parse(number, parsed)) return nullptr;
    Object<Layer>::of(self).drop(parsed);
    Py_RETURN_NONE;
  }

  static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    if (count < 2 || count > 3) {
      PyErr_Format(PyExc_TypeError, "found %zd arguments, expected layer, x and perhaps a residual", count);
      return nullptr;
    }
    const Layer& layer = Object<Layer>::of(self);
    PyObject* residual = count == 3 ? args[2] : nullptr;
    bool served = false;
    PyObject* y = layer.serve(args[0], args[1], residual, served);
    if (served) return y;
    return PyObject_CallFunctionObjArgs(layer.slow.get(), args[0], args[1], residual, nullptr);
  }

 private:
  void drop(std::int64_t number) {
    for (std::size_t i = 0; i < bindings.size(); ++i) {
      if (bindings[i].number != number) continue;
      Held held = std::move(bindings[i]);  // its references go last: what they run may look at this layer
      bindings.erase(bindings.begin() + static_cast<std::ptrdiff_t>(i));
      return;
    }
  }

  PyObject* binding() const {
    const std::int64_t now = serial->number;
    for (const Held& held : bindings)
      if (held.number == now) return held.object.get();
    return nullptr;
  }

  bool hooked() const {
    for (const Ref& hook : hooks)
      if (PyDict_Size(hook.get()) != 0) return true;
    return false;
  }

  PyObject* serve(PyObject* module, PyObject* x_object, PyObject* r_object, bool& served) const {
    const Ref held = Ref::share(binding());
    if (!held || hooked()) return nullptr;
    const Binding& bound = Object<Binding>::of(held.get());
    if (!thread.plain(bound.device.type)) return nullptr;
    const Plan* plan = r_object == nullptr ? bound.plan : bound.fused;
    View x, residual;
    if (plan == nullptr || !x.read(x_object) || !x.is(bound.dtype)) return nullptr;
    if (x.ndim < 1 || x.shape[x.ndim - 1] != bound.features) return nullptr;
    const std::int64_t elements = x.packed(bound.device);
    if (elements < 0) return nullptr;
    std::uint64_t bits = bound.row_bits | reinterpret_cast<std::uintptr_t>(x.address());
    if (r_object != nullptr) {
      if (!residual.read(r_object) || !residual.is(bound.dtype) || residual.packed(bound.device) < 0 ||
          !residual.same_rows(x, bound.out))
        return nullptr;
      bits |= reinterpret_cast<std::uintptr_t>(residual.address());
    }
    const std::int64_t rows = elements / bound.features;
    const std::int32_t code = plan->choose(&rows, alignment(bits));
    if (code < 0 || nearest(code)) return nullptr;
    const Entry& entry = plan->entry(code);
    if (entry.kind == Entry::none) return nullptr;

    PyObject* weight = PyDict_GetItemWithError(parameters.get(), weight_name);  // borrowed, like the bias
    PyObject* bias = PyDict_GetItemWithError(parameters.get(), bias_name);
    if (PyErr_Occurred() != nullptr) PyErr_Clear();
    if (entry.kind == Entry::framework) {
      if (!bound.framework || weight == nullptr) return nullptr;
      served = true;
      const Ref keep_weight = Ref::share(weight), keep_bias = Ref::share(bias == nullptr ? Py_None : bias);
      PyObject* y = PyObject_CallFunctionObjArgs(bound.framework.get(), x_object, weight, keep_bias.get(), nullptr);
      if (y != nullptr) ++plan->counts->served[code & 3];
      return y;
    }
    if (thread.gradients() && (requires_grad(x_object) || requires_grad(weight) || requires_grad(bias) ||
                               requires_grad(r_object)))
      return nullptr;
    if (is_neg(x_object) || (r_object != nullptr && is_neg(r_object)) || bound.watch->changed(weight, bias))
      return nullptr;
    served = true;
    const Ref call = Ref::share(entry.call.get());  // the entry may be dropped while this runs
    PyObject* y = entry.kind == Entry::native
                      ? entry.kernel->launch(x_object, x, r_object == nullptr ? nullptr : &residual, rows)
                      : PyObject_CallFunctionObjArgs(call.get(), x_object, r_object, nullptr);
    if (y == nullptr) return failure(bound, code >> 2, module, x_object, r_object);
    ++plan->counts->served[code & 3];
    return y;
  }

  static PyObject* failure(const Binding& bound, std::int32_t rule, PyObject* module, PyObject* x, PyObject* r) {
    const Ref error = take_exception();
    const Ref number = Ref::take(error ? PyLong_FromLong(rule) : nullptr);
    if (!number) return nullptr;
    const Ref failed = Ref::share(bound.failed.get());
    return PyObject_CallFunctionObjArgs(failed.get(), number.get(), error.get(), module, x, r, nullptr);
  }
};

inline PyTypeObject* Layer::serial_type = nullptr;
inline PyObject* Layer::weight_name = nullptr;
inline PyObject* Layer::bias_name = nullptr;

}  // namespace dks

#endif  // DKS_LAYER_HPP
