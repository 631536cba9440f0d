// GPU programs with a call's recipe: a Python callable that reads tensors, allocates outputs and launches.
//
//   GpuKernel(device, inputs, slots, buffers, most, program, function, otherwise, settle, keep)
//     device: DLPack's device type of every tensor; inputs: (DLPack code, bits) of each argument, (-1, 0) for a
//     number or None, (-2, 0) for None; slots: (kind, index, dim, default, is_float), see dks/dispatch/gpu/call.py;
//     buffers: (like, last or -1, dtype or None, returned, leading, swapped); most: (slot of an input, the largest
//     number that the steps are right for); program: (dks_gpu_launch, dks_gpu_scratch or 0, steps, count), zeros for
//     none; function: (run, workspace, constant, count, settle) of what is launched after the program, or None: its
//     values are the last `count` slots; otherwise: what is called where the call is above `most`, or outside the
//     alignment class, or None; settle: (code), raises; keep: what addresses point to.
//   kernel(*inputs) -> the outputs, enqueued on the current stream of the inputs' device
#ifndef DKS_GPU_KERNEL_HPP
#define DKS_GPU_KERNEL_HPP

#include <cstring>
#include <vector>

#include "gpu.h"
#include "tensor.hpp"

namespace dks {

struct GpuKernel {
  enum Kind : std::int32_t { input, buffer, size, stride, rows, number, buffer_stride, constant };
  static constexpr std::int32_t max_inputs = 8, max_buffers = 8, is_number = -1, is_none = -2;

  // gpu.h's functions: of a library that Python opened.
  using Launch = decltype(&dks_gpu_launch);
  using Scratch = decltype(&dks_gpu_scratch);

  // A C function that launches by itself, as dks/dispatch/gpu/call.py describes it.
  struct Function {
    static constexpr std::int32_t misaligned = 1;
    int (*run)(const void* constant, const std::int64_t* values) = nullptr;
    std::int64_t (*workspace)(const void* constant, const std::int64_t* values) = nullptr;
    const void* constant = nullptr;
    std::int32_t count = 0;
    Ref settle;
  };

  struct Input {
    std::int32_t code, bits;
  };
  struct Slot {
    std::int32_t kind, index, dim;
    double fallback;
    int real;
  };
  struct Buffer {
    std::int32_t like;
    long long last;
    PyObject* dtype;  // held by `types`
    int returned, leading, swapped;
  };
  struct Most {
    Slot slot;
    long long value;
  };

  std::int32_t device = 0;
  std::vector<Input> inputs;
  std::vector<Slot> slots;
  std::vector<Buffer> buffers;
  std::vector<Most> most;
  std::vector<Ref> types;
  Launch launch = nullptr;
  Scratch scratch = nullptr;
  const dks_gpu_step* steps = nullptr;
  std::int32_t step_count = 0;
  Function function;
  Ref otherwise, settle, keep;

  int visit(visitproc visit, void* arg) const {
    return visit_all(visit, arg, function.settle, otherwise, settle, keep);
  }
  void clear() {}  // what it holds are kernels, tensors and a library: part of no cycle

  static PyObject* create(PyTypeObject* type, PyObject* args, PyObject*) {
    int device, count;
    PyObject *inputs, *slots, *buffers, *most, *function, *otherwise, *settle, *keep;
    unsigned long long launch, scratch, steps;
    if (!PyArg_ParseTuple(args, "iO!O!O!O!(KKKi)OOOO", &device, &PyTuple_Type, &inputs, &PyTuple_Type, &slots,
                          &PyTuple_Type, &buffers, &PyTuple_Type, &most, &launch, &scratch, &steps, &count, &function,
                          &otherwise, &settle, &keep))
      return nullptr;
    auto* state = new (std::nothrow) GpuKernel;
    if (state == nullptr) return PyErr_NoMemory();
    state->device = device;
    state->launch = reinterpret_cast<Launch>(static_cast<std::uintptr_t>(launch));
    state->scratch = reinterpret_cast<Scratch>(static_cast<std::uintptr_t>(scratch));
    state->steps = reinterpret_cast<const dks_gpu_step*>(static_cast<std::uintptr_t>(steps));
    state->step_count = count;
    if (otherwise != Py_None) state->otherwise = Ref::share(otherwise);
    state->settle = Ref::share(settle);
    state->keep = Ref::share(keep);
    if (state->take(function) && state->fill(inputs, slots, buffers, most)) return Object<GpuKernel>::make(type, state);
    delete state;
    return nullptr;
  }

  static PyObject* call(PyObject* self, PyObject* args, PyObject* named) {
    if (named != nullptr && PyDict_Size(named) != 0) {
      PyErr_SetString(PyExc_TypeError, "a kernel takes its arguments by position");
      return nullptr;
    }
    return Object<GpuKernel>::of(self).run(args);
  }

 private:
  bool take(PyObject* given) {
    if (given == Py_None) return true;
    unsigned long long run, workspace, constant;
    PyObject* settle;
    if (!PyArg_ParseTuple(given, "KKKiO", &run, &workspace, &constant, &function.count, &settle)) return false;
    function.run = reinterpret_cast<decltype(function.run)>(static_cast<std::uintptr_t>(run));
    function.workspace = reinterpret_cast<decltype(function.workspace)>(static_cast<std::uintptr_t>(workspace));
    function.constant = reinterpret_cast<const void*>(static_cast<std::uintptr_t>(constant));
    function.settle = Ref::share(settle);
    return true;
  }

  bool fill(PyObject* given_inputs, PyObject* given_slots, PyObject* given_buffers, PyObject* given_most) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(given_inputs); ++i) {
      Input each;
      if (!PyArg_ParseTuple(PyTuple_GetItem(given_inputs, i), "ii", &each.code, &each.bits)) return false;
      inputs.push_back(each);
    }
    for (Py_ssize_t i = 0; i < PyTuple_Size(given_buffers); ++i) {
      Buffer each;
      if (!PyArg_ParseTuple(PyTuple_GetItem(given_buffers, i), "iLOppp", &each.like, &each.last, &each.dtype,
                            &each.returned, &each.leading, &each.swapped))
        return false;
      if (!is_tensor(each.like)) return wrong("a buffer is like an input that is no tensor");
      if (each.dtype == Py_None) each.dtype = nullptr;
      types.push_back(Ref::share(each.dtype));
      buffers.push_back(each);
    }
    for (Py_ssize_t i = 0; i < PyTuple_Size(given_slots); ++i) {
      Slot each;
      if (!fill_slot(PyTuple_GetItem(given_slots, i), each)) return false;
      slots.push_back(each);
    }
    for (Py_ssize_t i = 0; i < PyTuple_Size(given_most); ++i) {
      Most each;
      PyObject* slot;
      if (!PyArg_ParseTuple(PyTuple_GetItem(given_most, i), "O!L", &PyTuple_Type, &slot, &each.value) ||
          !fill_slot(slot, each.slot))
        return false;
      if (each.slot.kind != size && each.slot.kind != stride && each.slot.kind != rows)
        return wrong("only sizes, strides and rows of inputs have a largest number");
      most.push_back(each);
    }
    if (size_of(inputs) > max_inputs || size_of(buffers) > max_buffers || size_of(slots) > DKS_GPU_MAX_INPUTS)
      return wrong("too many inputs, buffers or slots");
    const bool launches = launch != nullptr && steps != nullptr && step_count > 0;
    const bool calls = function.run != nullptr && function.workspace != nullptr;
    if (!is_tensor(0) || (!launches && (step_count != 0 || !calls)))
      return wrong("expected a tensor first, and something to launch");
    if (function.count < 0 || function.count > size_of(slots) || calls != static_cast<bool>(function.settle))
      return wrong("the function contradicts its description");
    return true;
  }

  bool fill_slot(PyObject* given, Slot& each) const {
    if (!PyArg_ParseTuple(given, "iiidp", &each.kind, &each.index, &each.dim, &each.fallback, &each.real))
      return false;
    bool known = each.kind >= input && each.kind < number && is_tensor(each.index);
    if (each.kind == number) known = each.index >= 0 && each.index < size_of(inputs) && !is_tensor(each.index);
    if (each.kind == buffer || each.kind == buffer_stride) known = each.index >= 0 && each.index < size_of(buffers);
    return known || each.kind == constant || wrong("a slot names no input or buffer");
  }

  template <typename Item>
  static std::int32_t size_of(const std::vector<Item>& items) {
    return static_cast<std::int32_t>(items.size());
  }

  bool is_tensor(std::int32_t index) const {
    return index >= 0 && index < size_of(inputs) && inputs[static_cast<std::size_t>(index)].code >= 0;
  }

  static bool wrong(const char* why) {
    PyErr_SetString(PyExc_ValueError, why);
    return false;
  }

  PyObject* run(PyObject* args) const {
    View views[max_inputs];
    PyObject* objects[max_inputs] = {};
    if (!read(args, objects, views)) return nullptr;
    for (const Most& each : most) {
      std::int64_t found;
      if (!value(each.slot, objects, views, nullptr, found)) return nullptr;
      if (found > each.value) return above(each, args);
    }
    Ref made[max_buffers];
    View spaces[max_buffers];
    for (std::size_t i = 0; i < buffers.size(); ++i) {
      const auto like = static_cast<std::size_t>(buffers[i].like);
      made[i] = Ref::take(allocate(objects[like], views[like], buffers[i]));
      if (!made[i]) return nullptr;
      if (!spaces[i].read(made[i].get())) return unreadable();
    }
    std::int64_t values[DKS_GPU_MAX_INPUTS + 4];
    for (std::size_t i = 0; i < slots.size(); ++i)
      if (!value(slots[i], objects, views, spaces, values[i])) return nullptr;

    dks_gpu_call call{};
    call.steps = steps;
    call.slots = values;
    call.step_count = step_count;
    call.slot_count = size_of(slots) - function.count;
    call.device = views[0].device.index;
    if (torch.stream == nullptr || torch.stream(device, call.device, &call.stream) != 0) {
      if (PyErr_Occurred() == nullptr) PyErr_SetString(PyExc_RuntimeError, "PyTorch names no current stream");
      return nullptr;
    }
    // What may refuse the call is asked before anything is launched.
    Ref room, own_room;
    const std::int64_t* own = values + call.slot_count;
    if (function.run != nullptr) {
      std::int64_t* last = values + slots.size();
      last[0] = last[1] = 0;
      last[2] = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(call.stream));
      last[3] = call.device;
      PyThreadState* state = PyEval_SaveThread();
      last[1] = function.workspace(function.constant, own);
      PyEval_RestoreThread(state);
      if (last[1] < 0) return refused(static_cast<std::int32_t>(-last[1]), args);
      if (last[1] > 0 && !(own_room = bytes(objects[0], last[1], last[0]))) return nullptr;
    }
    if (scratch != nullptr) {
      call.scratch_bytes = scratch(&call);
      if (call.scratch_bytes < 0) return fail(static_cast<std::int32_t>(-call.scratch_bytes), args);
      std::int64_t address = 0;
      if (call.scratch_bytes > 0 && !(room = bytes(objects[0], call.scratch_bytes, address))) return nullptr;
      call.scratch = reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));
    }
    PyThreadState* state = PyEval_SaveThread();  // the first launch on a device loads code
    const std::int32_t code = step_count > 0 ? launch(&call) : DKS_GPU_OK;
    const int own_code = code == DKS_GPU_OK && function.run != nullptr ? function.run(function.constant, own) : 0;
    PyEval_RestoreThread(state);
    if (code != DKS_GPU_OK) return fail(code, args);
    if (own_code != 0) return refused(own_code, args);
    return outputs(made);
  }

  bool read(PyObject* args, PyObject** objects, View* views) const {
    const Py_ssize_t count = PyTuple_Size(args);
    if (count > size_of(inputs)) {
      PyErr_Format(PyExc_TypeError, "found %zd arguments, expected at most %zu", count, inputs.size());
      return false;
    }
    for (std::int32_t i = 0; i < size_of(inputs); ++i) {
      PyObject* object = i < count ? PyTuple_GetItem(args, i) : Py_None;
      objects[i] = object;
      const Input& wanted = inputs[static_cast<std::size_t>(i)];
      if (wanted.code < 0) {
        if (wanted.code == is_none && object != Py_None) return misfit(i);
        continue;
      }
      View& view = views[i];
      if (!view.read(object) || view.dtype.code != wanted.code || view.dtype.bits != wanted.bits ||
          view.device.type != device || view.device.index != views[0].device.index)
        return misfit(i);
    }
    return true;
  }

  static bool misfit(std::int32_t index) {
    PyErr_Format(torch.declined, "argument %d: of another dtype, or not on the first one's device", index);
    return false;
  }

  PyObject* above(const Most& each, PyObject* args) const {
    if (otherwise) return PyObject_Call(otherwise.get(), args, nullptr);
    const char* what = each.slot.kind == size ? "size" : each.slot.kind == stride ? "stride" : "rows";
    PyErr_Format(torch.declined, "a %s above %lld, which is the most that the programs take", what, each.value);
    return nullptr;
  }

  static PyObject* allocate(PyObject* like, const View& view, const Buffer& wanted) {
    const bool swaps = wanted.swapped != 0 && view.ndim - (wanted.last == 0 ? 1 : 0) > 2;
    if (wanted.last < 0 && wanted.dtype == nullptr && !swaps && view.dense() >= 0)  // half of the time of the other
      return PyObject_CallFunctionObjArgs(torch.empty_like, like, nullptr);
    if (wanted.leading == 0) {
      const Ref length = Ref::take(Py_BuildValue("(L)", wanted.last));
      return length ? empty(like, length.get(), wanted.dtype) : nullptr;
    }
    const std::int32_t dims = view.ndim - (wanted.last == 0 ? 1 : 0);
    Ref sizes = Ref::take(PyTuple_New(dims));
    if (!sizes) return nullptr;
    for (std::int32_t dim = 0; dim < dims; ++dim) {
      const bool replaced = dim + 1 == view.ndim && wanted.last > 0;
      PyObject* length = PyLong_FromLongLong(replaced ? wanted.last : view.shape[dim]);
      if (length == nullptr) return nullptr;
      PyTuple_SetItem(sizes.get(), swaps && (dim == 1 || dim == 2) ? 3 - dim : dim, length);
    }
    if (!swaps) return empty(like, sizes.get(), wanted.dtype);
    const Ref made = Ref::take(empty(like, sizes.get(), wanted.dtype));
    return made ? PyObject_CallMethod(made.get(), "transpose", "ii", 1, 2) : nullptr;
  }

  static PyObject* empty(PyObject* like, PyObject* sizes, PyObject* dtype) {
    if (dtype == nullptr) return PyObject_CallFunctionObjArgs(torch.new_empty, like, sizes, nullptr);
    Ref arguments = Ref::take(PyTuple_Pack(2, like, sizes)), named = Ref::take(PyDict_New());
    if (!arguments || !named || PyDict_SetItemString(named.get(), "dtype", dtype) != 0) return nullptr;
    return PyObject_Call(torch.new_empty, arguments.get(), named.get());
  }

  // Device memory, and its address.
  static Ref bytes(PyObject* like, std::int64_t count, std::int64_t& address) {
    Ref sizes = Ref::take(Py_BuildValue("(L)", static_cast<long long>(count)));
    Ref room = sizes ? Ref::take(empty(like, sizes.get(), torch.bytes)) : Ref();
    View view;
    if (room && !view.read(room.get())) {
      unreadable();
      return {};
    }
    if (room) address = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(view.address()));
    return room;
  }

  bool value(const Slot& slot, PyObject* const* objects, const View* views, const View* spaces,
             std::int64_t& out) const {
    if (slot.kind == number) return parse_number(objects[slot.index], slot, out);
    if (slot.kind == constant) {
      out = static_cast<std::int64_t>(slot.fallback);
      return true;
    }
    if (slot.kind == buffer) {
      out = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(spaces[slot.index].address()));
      return true;
    }
    const View& view = slot.kind == buffer_stride ? spaces[slot.index] : views[slot.index];
    const std::int32_t dim = slot.dim < 0 ? slot.dim + view.ndim : slot.dim;
    if (slot.kind != input && slot.kind != rows && (dim < 0 || dim >= view.ndim)) return misfit(slot.index);
    switch (slot.kind) {
      case input: out = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(view.address())); break;
      case size: out = view.shape[dim]; break;
      case stride:
      case buffer_stride: out = view.shape[dim] == 1 ? 0 : view.strides[dim]; break;
      default:
        out = 1;
        for (std::int32_t i = 0; i + 1 < view.ndim; ++i) out *= view.shape[i];
    }
    return true;
  }

  static bool parse_number(PyObject* object, const Slot& slot, std::int64_t& out) {
    if (slot.real == 0 && PyLong_Check(object)) {  // to the last digit, which a double may not have
      out = PyLong_AsLongLong(object);
      return out != -1 || PyErr_Occurred() == nullptr;
    }
    double found = slot.fallback;
    if (object != Py_None) {
      found = PyFloat_AsDouble(object);
      if (found == -1.0 && PyErr_Occurred() != nullptr) return false;
    }
    if (slot.real == 0) {
      out = static_cast<std::int64_t>(found);
      return true;
    }
    const auto narrow = static_cast<float>(found);
    std::uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    out = bits;
    return true;
  }

  PyObject* outputs(Ref* made) const {
    Ref found[max_buffers];
    Py_ssize_t count = 0;
    for (std::size_t i = 0; i < buffers.size(); ++i)
      if (buffers[i].returned != 0) found[count++] = std::move(made[i]);
    if (count == 1) return found[0].release();
    Ref all = Ref::take(PyTuple_New(count));
    for (Py_ssize_t i = 0; all && i < count; ++i) PyTuple_SetItem(all.get(), i, found[i].release());
    return all.release();
  }

  PyObject* fail(std::int32_t code, PyObject* args) const {
    return fail(code, code == DKS_GPU_MISALIGNED, settle, args);
  }

  PyObject* refused(std::int32_t code, PyObject* args) const {
    return fail(code, code == Function::misaligned, function.settle, args);
  }

  PyObject* fail(std::int32_t code, bool misaligned, const Ref& raise, PyObject* args) const {
    if (misaligned && otherwise) return PyObject_Call(otherwise.get(), args, nullptr);
    const Ref number = Ref::take(PyLong_FromLong(code));
    const Ref said = number ? Ref::take(PyObject_CallFunctionObjArgs(raise.get(), number.get(), nullptr)) : Ref();
    if (said) PyErr_Format(PyExc_RuntimeError, "the launcher answered the unknown code %d", static_cast<int>(code));
    return nullptr;
  }

  static PyObject* unreadable() {
    PyErr_SetString(PyExc_RuntimeError, "the memory that PyTorch allocated can't be read");
    return nullptr;
  }
};

}  // namespace dks

#endif  // DKS_GPU_KERNEL_HPP
