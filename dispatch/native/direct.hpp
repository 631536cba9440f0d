// A call without preparation, linear(x, weight, bias): the compiled form of dks.dispatch.ops.linear.serve.
//
//   Direct(framework, kind)      framework: (x, weight, bias) -> y; kind: of device, DLPack's number
//   direct.add(dtype, has_bias, n, k, plan, failed)
//   direct.call(x, weight, bias or None) -> y, or NotImplemented where Python must decide
//   direct.choose(x, weight, bias or None) -> the lookup's number; NotImplemented likewise
#ifndef DKS_DIRECT_HPP
#define DKS_DIRECT_HPP

#include "plan.hpp"
#include "thread.hpp"

namespace dks {

struct Direct {
  struct Key {
    std::int64_t n, k;
    std::uint32_t dtype_and_bias;

    bool operator==(const Key& other) const {
      return n == other.n && k == other.k && dtype_and_bias == other.dtype_and_bias;
    }
    std::size_t hash() const {
      // Fibonacci hashing (Knuth, The Art of Computer Programming, 6.4): the upper bits are the mixed ones.
      const std::uint64_t mixed = static_cast<std::uint64_t>(n) * 0x9E3779B97F4A7C15u ^
                                  static_cast<std::uint64_t>(k) * 0xC2B2AE3D27D4EB4Fu ^ dtype_and_bias;
      return static_cast<std::size_t>(mixed * 0x9E3779B97F4A7C15u >> 32);
    }
  };
  struct Slot {
    Key key{};
    Plan* plan = nullptr;
    std::uint64_t row_bits = 0;
    Ref plan_object, failed;
  };

  Ref framework;
  std::int32_t kind = 0;
  std::vector<Slot> slots = std::vector<Slot>(16);  // a power of two, at most half of them taken
  std::size_t taken = 0;

  int visit(visitproc visit, void* arg) const {
    for (const Slot& slot : slots)
      if (const int said = visit_all(visit, arg, slot.plan_object, slot.failed)) return said;
    return visit_all(visit, arg, framework);
  }
  void clear() {
    slots = std::vector<Slot>(16);
    taken = 0;
  }

  static PyObject* create(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject* framework;
    int kind;
    if (!PyArg_ParseTuple(args, "Oi", &framework, &kind)) return nullptr;
    auto* state = new (std::nothrow) Direct;
    if (state == nullptr) return PyErr_NoMemory();
    state->framework = Ref::share(framework);
    state->kind = kind;
    return Object<Direct>::make(type, state);
  }

  static PyObject* add(PyObject* self, PyObject* args) {
    int code, bits, has_bias;
    long long n, k;
    PyObject *plan, *failed;
    if (!PyArg_ParseTuple(args, "(ii)pLLO!O", &code, &bits, &has_bias, &n, &k, Plan::type, &plan, &failed))
      return nullptr;
    if (Object<Plan>::of(plan).axes.size() != 1) {
      PyErr_SetString(PyExc_ValueError, "direct: expected a plan of one dim");
      return nullptr;
    }
    Direct& direct = Object<Direct>::of(self);
    if (2 * (direct.taken + 1) > direct.slots.size()) direct.grow();
    Slot slot;
    slot.key = key_of(static_cast<std::uint32_t>(code), static_cast<std::uint32_t>(bits), has_bias != 0, n, k);
    slot.plan = &Object<Plan>::of(plan);
    slot.row_bits = static_cast<std::uint64_t>(n | k) * static_cast<std::uint64_t>(bits / 8);
    slot.plan_object = Ref::share(plan);
    slot.failed = Ref::share(failed);
    Slot& place = direct.slot(slot.key);
    if (place.plan == nullptr) ++direct.taken;
    place = std::move(slot);
    Py_RETURN_NONE;
  }

  static PyObject* choose(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Found found;
    if (!Object<Direct>::of(self).look(args, count, found)) Py_RETURN_NOTIMPLEMENTED;
    return PyLong_FromLong(found.code);
  }

  static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    const Direct& direct = Object<Direct>::of(self);
    Found found;
    if (!thread.plain(direct.kind) || !direct.look(args, count, found) || found.code < 0 || nearest(found.code))
      Py_RETURN_NOTIMPLEMENTED;
    PyObject *x = args[0], *weight = args[1], *bias = args[2];
    const Ref plan_object = Ref::share(found.slot->plan_object.get());
    const Ref failed = Ref::share(found.slot->failed.get());
    Counts& counts = *found.slot->plan->counts;
    const Entry& entry = found.slot->plan->entry(found.code);
    if (entry.kind == Entry::framework) {
      PyObject* y = PyObject_CallFunctionObjArgs(direct.framework.get(), x, weight, bias, nullptr);
      if (y != nullptr) ++counts.served[found.code & 3];
      return y;
    }
    if (entry.kind == Entry::none ||
        (thread.gradients() && (requires_grad(x) || requires_grad(weight) || requires_grad(bias))) || is_neg(x) ||
        is_neg(weight) || (bias != Py_None && is_neg(bias)))
      Py_RETURN_NOTIMPLEMENTED;
    const Ref kernel = Ref::share(entry.call.get());
    PyObject* y = PyObject_CallFunctionObjArgs(kernel.get(), x, weight, bias, nullptr);
    if (y == nullptr) return failure(failed.get(), found.code >> 2, x, weight, bias);
    ++counts.served[found.code & 3];
    return y;
  }

 private:
  struct Found {
    const Slot* slot = nullptr;
    std::int32_t code = 0;
  };

  static Key key_of(std::uint32_t code, std::uint32_t bits, bool has_bias, std::int64_t n, std::int64_t k) {
    return {n, k, code << 16 | bits << 8 | (has_bias ? 1u : 0u)};
  }

  Slot& slot(const Key& key) {
    std::size_t at = key.hash();
    while (true) {
      Slot& found = slots[at++ & (slots.size() - 1)];
      if (found.plan == nullptr || found.key == key) return found;
    }
  }

  void grow() {
    std::vector<Slot> old = std::exchange(slots, std::vector<Slot>(2 * slots.size()));
    for (Slot& moved : old)
      if (moved.plan != nullptr) slot(moved.key) = std::move(moved);
  }

  // Reads the tensors and looks the call up; false where Python must decide.
  bool look(PyObject* const* args, Py_ssize_t count, Found& found) const {
    View x, weight, bias;
    if (count != 3 || !x.read(args[0]) || !weight.read(args[1])) return false;
    const bool has_bias = args[2] != Py_None;
    if (x.ndim < 1 || weight.ndim != 2 || !weight.is(x.dtype) || x.device.type != kind) return false;
    const std::int64_t n = weight.shape[0], k = weight.shape[1];
    const std::int64_t elements = x.packed(x.device);
    if (elements < 0 || k < 1 || x.shape[x.ndim - 1] != k || weight.packed(x.device) < 0) return false;
    std::uint64_t bits = bits_of(x) | bits_of(weight);
    if (has_bias) {
      if (!bias.read(args[2]) || !bias.is(x.dtype) || bias.ndim != 1 || bias.shape[0] != n ||
          bias.packed(x.device) < 0)
        return false;
      bits |= bits_of(bias);
    }
    const Slot& slot = const_cast<Direct*>(this)->slot(key_of(x.dtype.code, x.dtype.bits, has_bias, n, k));
    if (slot.plan == nullptr) return false;
    const std::int64_t rows = elements / k;
    found.slot = &slot;
    found.code = slot.plan->choose(&rows, alignment(bits | slot.row_bits));
    return true;
  }

  static std::uint64_t bits_of(const View& view) { return reinterpret_cast<std::uintptr_t>(view.address()); }

  static PyObject* failure(PyObject* failed, std::int32_t rule, PyObject* x, PyObject* weight, PyObject* bias) {
    const Ref error = take_exception();
    const Ref number = Ref::take(error ? PyLong_FromLong(rule) : nullptr);
    if (!number) return nullptr;
    return PyObject_CallFunctionObjArgs(failed, number.get(), error.get(), x, weight, bias, nullptr);
  }
};

}  // namespace dks

#endif  // DKS_DIRECT_HPP
