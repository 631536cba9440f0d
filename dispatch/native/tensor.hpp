// Reading a PyTorch tensor from C: address, shape, strides, dtype and device, through the DLPack exchange table
// that torch.Tensor shows as __dlpack_c_exchange_api__ (torch 2.11 on). No header and no symbol of PyTorch is
// needed, so one binary serves every version that has the table.
#ifndef DKS_TENSOR_HPP
#define DKS_TENSOR_HPP

#include <cstdint>

#include "python.hpp"

namespace dks {

// The layouts of DLPack 1.x, as https://dmlc.github.io/dlpack/latest/c_api.html gives them.
namespace dlpack {

struct Device {
  std::int32_t type, index;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct Header {
  std::uint32_t major, minor;
  Header* previous;
};

struct Exchange {
  Header header;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*view)(void* object, Tensor* out);
  int (*stream)(std::int32_t device_type, std::int32_t device, void** out);
};

inline constexpr Device cpu = {1, 0};
inline constexpr std::uint32_t version = 1;

}  // namespace dlpack

// How tensors are read and made in this process; set once, by `setup`.
struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  int (*view)(void*, dlpack::Tensor*) = nullptr;
  int (*stream)(std::int32_t, std::int32_t, void**) = nullptr;  // the current one of a device
  PyObject* new_empty = nullptr;   // torch.Tensor.new_empty
  PyObject* empty_like = nullptr;  // torch.empty_like
  PyObject* is_neg = nullptr;      // torch.Tensor.is_neg
  PyObject* declined = nullptr;    // the exception of a kernel outside its domain
  PyObject* bytes = nullptr;       // torch.uint8
  PyObject* requires_grad = nullptr;  // names of attributes
  PyObject* version = nullptr;
};

inline Torch torch;

// A tensor's memory, valid while the tensor lives unchanged.
struct View : dlpack::Tensor {
  // False where `object` is no plain tensor with memory: a subclass, a transform's wrapper, sparse, meta. No
  // Python error is left.
  bool read(PyObject* object) {
    const PyTypeObject* type = Py_TYPE(object);
    if (type != torch.tensor && type != torch.parameter) return false;
    if (torch.view(object, this) != 0) {
      PyErr_Clear();
      return false;
    }
    return true;
  }

  const char* address() const { return static_cast<const char*>(data) + byte_offset; }

  bool is(dlpack::DataType wanted) const { return dtype.code == wanted.code && dtype.bits == wanted.bits; }

  // Number of elements if they lie row by row with nothing between; -1 otherwise.
  std::int64_t dense() const {
    std::int64_t count = 1;
    for (std::int32_t dim = ndim - 1; dim >= 0; --dim) {
      if (shape[dim] != 1 && strides[dim] != count) return -1;
      count *= shape[dim];
    }
    return count;
  }

  // The same if they lie on that very device; -1 otherwise. A tensor
  // of zeros that autograd made has no memory, and is none; one without elements needs none. The address of what
  // lies on a GPU is compared and handed on, never read here.
  std::int64_t packed(dlpack::Device where = dlpack::cpu) const {
    const std::int64_t count = dense();
    return device == where && (data != nullptr || count == 0) ? count : -1;
  }

  // Whether this has the same leading dims as `other`, and a last one of `last`.
  bool same_rows(const View& other, std::int64_t last) const {
    if (ndim != other.ndim || ndim < 1 || shape[ndim - 1] != last) return false;
    for (std::int32_t dim = 0; dim + 1 < ndim; ++dim)
      if (shape[dim] != other.shape[dim]) return false;
    return true;
  }
};

// Whether a bool attribute or method's answer is true; an error counts as true, which sends the call to Python.
inline bool truth(Ref answer) {
  if (!answer) PyErr_Clear();
  return answer.get() != Py_False;
}

inline bool requires_grad(PyObject* t) {
  return t != nullptr && t != Py_None && truth(Ref::take(PyObject_GetAttr(t, torch.requires_grad)));
}

inline bool is_neg(PyObject* t) {
  return truth(Ref::take(PyObject_CallFunctionObjArgs(torch.is_neg, t, nullptr)));
}

}  // namespace dks

#endif  // DKS_TENSOR_HPP
