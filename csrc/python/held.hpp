// What a plan holds between steps, and how it notices that any of it has changed.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "python/tensor_access.hpp"

namespace pyoptim {

namespace py = pybind11;

// Gradients held while the GIL is away, so that another thread's zero_grad cannot free them.
class GradHolder {
 public:
  void hold(symbols::Tensor grad) {
    symbols::Tensor copy = nullptr;
    if (symbols::table().new_handle(grad, &copy) != 0) throw std::bad_alloc();
    handles_.push_back(copy);
  }
  void hold(py::object grad) { objects_.push_back(std::move(grad)); }
  void clear() {
    for (const symbols::Tensor handle : handles_)
      (void)symbols::table().delete_handle(handle);  // frees; cannot fail
    handles_.clear();
    objects_.clear();
  }
  ~GradHolder() { clear(); }

 private:
  std::vector<symbols::Tensor> handles_;
  std::vector<py::object> objects_;
};

using Items = std::vector<std::pair<py::object, py::object>>;

// Says whether a dict is the same object and holds the same objects in the same order.
class DictGuard {
 public:
  DictGuard() = default;
  explicit DictGuard(PyObject* dict) : dict_(dict), version_(version_of(dict)) {
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value);) {
      items_.emplace_back(py::reinterpret_borrow<py::object>(key),
                          py::reinterpret_borrow<py::object>(value));
    }
  }

  explicit operator bool() const { return dict_ != nullptr; }

  bool holds(PyObject* dict) {
    if (dict != dict_) return false;
    if (kHasVersions && version_of(dict) == version_) return true;
    if (!holds_items()) return false;
    version_ = version_of(dict);
    return true;
  }
  bool holds() { return holds(dict_); }

  int visit(visitproc visit_object, void* arg) const {
    for (const auto& [key, value] : items_) {
      if (const int stop = visit_object(key.ptr(), arg)) return stop;
      if (const int stop = visit_object(value.ptr(), arg)) return stop;
    }
    return 0;
  }

 private:
  // CPython before 3.14 gives a dict a new version at every change: one cache line instead of
  // three.
#if PY_VERSION_HEX < 0x030E0000
  static constexpr bool kHasVersions = true;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  static uint64_t version_of(PyObject* dict) {
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
  }
#pragma GCC diagnostic pop
#else
  static constexpr bool kHasVersions = false;
  static uint64_t version_of(PyObject*) { return 0; }
#endif

  bool holds_items() const {
    if (PyDict_GET_SIZE(dict_) != static_cast<Py_ssize_t>(items_.size())) return false;
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t position = 0;
    for (const auto& item : items_) {
      if (!PyDict_Next(dict_, &position, &key, &value)) return false;
      if (key != item.first.ptr() || value != item.second.ptr()) return false;
    }
    return true;
  }

  PyObject* dict_ = nullptr;  // held by the optimizer, or by the items of its state's guard
  uint64_t version_ = 0;
  Items items_;
};

constexpr int kMaxHeld = kMaxStates + 2;  // state tensors, the master and the step counter

// The memory that a plan writes. A gradient that lies over some of it would be read before or after
// that is written as the threads happen to run; torch's order matters then.
class WrittenMemory {
 public:
  void add(const void* storage, const void* begin, int64_t bytes) {
    const auto from = reinterpret_cast<uintptr_t>(begin);
    if (bytes > 0) spans_.push_back({from, from + bytes});
    mark(storage);
  }

  void sort() { std::sort(spans_.begin(), spans_.end()); }

  // Tensors over common memory nearly always have a common storage: a small table of storages
  // spares most gradients the search.
  bool overlaps(const void* storage, const void* begin, int64_t bytes) const {
    if (storage && !(marks_[bit(storage) / 64] >> (bit(storage) % 64) & 1u)) return false;
    const auto from = reinterpret_cast<uintptr_t>(begin);
    const auto after =
        std::upper_bound(spans_.begin(), spans_.end(), Span{from + bytes - 1, ~uintptr_t{0}});
    return bytes > 0 && after != spans_.begin() && std::prev(after)->second > from;
  }

 private:
  using Span = std::pair<uintptr_t, uintptr_t>;  // first byte, the one after the last

  static constexpr int kBits = 15;
  static size_t bit(const void* storage) {
    return reinterpret_cast<uintptr_t>(storage) * 0x9e3779b97f4a7c15u >> (64 - kBits);
  }
  void mark(const void* storage) { marks_[bit(storage) / 64] |= uint64_t{1} << bit(storage) % 64; }

  std::vector<Span> spans_;  // disjoint: no two tensors of a plan share memory
  std::vector<uint64_t> marks_ = std::vector<uint64_t>((size_t{1} << kBits) / 64);
};

// A state tensor or step counter, as the plan was made for it.
//
// With the symbols in use its TensorImpl and its storage are owned, so that no other can take their
// addresses, and a check costs three cache lines. What it compares: the storage, where that lies in
// memory, the shape and strides. Where the storage has room for more than the tensor, or is seen
// through DLPack, everything is compared.
class HeldTensor {
 public:
  HeldTensor(py::object object, bool is_counter)
      : object_(std::move(object)), is_counter_(is_counter) {
    TensorView view = {};
    if (!view_of(object_.ptr(), &view)) return;
    if (symbols::enabled()) own(view);
    fingerprint_ = is_roomy_ ? fingerprint() : 0;
  }
  HeldTensor(const HeldTensor&) = delete;
  HeldTensor(HeldTensor&& other) = default;

  PyObject* ptr() const { return object_.ptr(); }

  // Still where it was, as it was.
  bool is_current(const TensorView& layout) const {
    if (impl_) {
      if (symbols::storage_of(impl_) != storage_ || storage_[symbols::kPointer] != memory_) {
        return false;
      }
      if (!is_counter_ && !same_layout(symbols::inline_layout(impl_), layout)) return false;
    }
    return !is_roomy_ || fingerprint() == fingerprint_;
  }

 private:
  struct DeleteHandle {
    void operator()(void* handle) const { (void)symbols::table().delete_handle(handle); }
  };

  void own(const TensorView& view) {
    if (view.ndim > symbols::kInlineDims) return;
    symbols::Tensor handle = nullptr;
    if (symbols::table().new_handle(symbols::tensor_of(object_.ptr()), &handle) != 0) {
      throw std::bad_alloc();
    }
    handle_.reset(handle);
    impl_ = *static_cast<void* const* const*>(handle);
    storage_owner_ = object_.attr("untyped_storage")();
    storage_ = symbols::storage_of(impl_);
    memory_ = storage_[symbols::kPointer];
    int64_t size = 0;
    const int64_t width = item_size(view.dtype) * (view.is_complex ? 2 : 1);
    is_roomy_ = symbols::table().get_storage_size(handle, &size) != 0 || size > view.numel * width;
  }

  uint64_t fingerprint() const {
    constexpr uint64_t kMix = 0x9e3779b97f4a7c15u;
    TensorView view = {};
    if (!view_of(object_.ptr(), &view)) return 0;
    uint64_t hash = static_cast<uint64_t>(view.dtype) * 2 + view.is_complex;
    for (int32_t d = 0; d < view.ndim; ++d) {
      hash = (hash * kMix + view.sizes[d]) * kMix + view.strides[d];
    }
    return hash * kMix + reinterpret_cast<uintptr_t>(view.data);
  }

  void* const* impl_ = nullptr;
  void* const* storage_ = nullptr;
  void* memory_ = nullptr;
  uint64_t fingerprint_ = 0;
  py::object object_;
  bool is_counter_;
  bool is_roomy_ = true;
  py::object storage_owner_;
  std::unique_ptr<void, DeleteHandle> handle_;
};

// Null when unknown.
inline const void* storage_of(PyObject* tensor) {
  if (!symbols::enabled()) return nullptr;
  return symbols::storage_of(*static_cast<void* const* const*>(symbols::tensor_of(tensor)));
}

inline bool is_lazy(py::handle tensor) {
  if (symbols::enabled()) return is_lazy(symbols::tensor_of(tensor.ptr()));
  return py::cast<bool>(tensor.attr("is_neg")()) || py::cast<bool>(tensor.attr("is_conj")());
}

}  // namespace pyoptim
