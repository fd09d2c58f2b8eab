// Norms, scaling and row sums of torch tensors, on the CPU engine or the CUDA engine.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/reduce.hpp"
#include "python/gpu.hpp"
#include "python/tensor_access.hpp"

namespace pyoptim::reduce_python {

namespace py = pybind11;

// (device, stream) of the CUDA engine; none is the CPU engine.
using Queue = std::optional<std::pair<int32_t, uint64_t>>;

inline gpu::Queue gpu_queue(const Queue& queue) { return {queue->first, queue->second}; }

// Below this many elements the work ends before another thread would get its turn, so the GIL is
// kept. The CUDA engine's queue may be full, and a call then waits.
constexpr int64_t kKeepGil = 1 << 20;

class Unlocked {
 public:
  Unlocked(int64_t elements, const Queue& queue) {
    if (queue || elements >= kKeepGil) released_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> released_;
};

// Reading anything else as a tensor would read wild memory.
inline void check_is_tensor(PyObject* object, const std::string& name) {
  static PyTypeObject* const type = reinterpret_cast<PyTypeObject*>(
      py::object(py::module_::import("torch").attr("Tensor")).release().ptr());
  if (PyObject_TypeCheck(object, type)) return;
  throw py::type_error(name + " is a " + Py_TYPE(object)->tp_name +
                       "; give torch.Tensor objects only");
}

// Whether an engine can read and write the tensor's values where they are, as one block.
inline bool is_fit(PyObject* tensor, TensorView* view) {
  if (!view_of(tensor, view) || view->dtype == DType::unsupported) return false;
  if (!(view->data || view->numel == 0) || !is_dense(*view) || !is_aligned(*view)) return false;
  return !(symbols::enabled() && view->is_cpu) ||
         symbols::holds_all(symbols::tensor_of(tensor), *view);
}

inline bool is_reachable(const TensorView& view, const Queue& queue) {
  const bool wants_cpu = !queue || gpu::api().is_emulated;
  return wants_cpu ? view.is_cpu : view.cuda == queue->first;
}

// A tensor of the caller's that holds n numbers of the engine's.
inline void* number_memory(
    const py::object& tensor, DType dtype, int64_t n, const Queue& queue, const char* name) {
  if (tensor.is_none()) return nullptr;
  check_is_tensor(tensor.ptr(), name);
  TensorView view;
  if (!is_fit(tensor.ptr(), &view) || view.dtype != dtype || view.is_complex || view.numel < n ||
      !is_reachable(view, queue)) {
    throw py::value_error(std::string(name) + " must be a dense " + dtype_name(dtype) +
                          " tensor of at least " + std::to_string(n) +
                          " elements on the device of the engine");
  }
  return view.data;
}

// Tensors of one device, read once. What an engine cannot read in place, or finds on another device
// than the first's, is listed as unfit; nothing can be computed before there is none.
class Spans {
 public:
  // weights: for every tensor None, or one of its layout and dtype for reduce::weigh with the eta
  // beside it; or None.
  Spans(const py::list& tensors,
        bool may_be_complex,
        const py::object& weights,
        const std::vector<double>& etas)
      : tensors_(py::reinterpret_steal<py::tuple>(PyList_AsTuple(tensors.ptr()))) {
    spans_.reserve(tensors_.size());
    ends_.reserve(tensors_.size());
    if (!weights.is_none()) weights_ = py::tuple(weights);
    if (!weights_.empty() && (weights_.size() != tensors_.size() || etas.size() != weights_.size()))
      throw py::value_error("Spans: as many weights and etas as tensors are needed");
    for (size_t i = 0; i < tensors_.size(); ++i) {
      PyObject* const weight = weights_.empty() ? Py_None : PyTuple_GET_ITEM(weights_.ptr(), i);
      add(i, may_be_complex, weight, weight == Py_None ? 0.0 : etas[i]);
    }
  }

  const std::vector<int64_t>& unfit() const { return unfit_; }
  int64_t n_chunks() const { return ends_.empty() ? 0 : ends_.back(); }
  bool has_float64() const { return has_float64_; }

  // Where partial results of one norm end: per tensor, or of all of them.
  std::vector<int64_t> ends(bool per_tensor) const {
    return per_tensor ? ends_ : std::vector<int64_t>{n_chunks()};
  }

  // Tensors with common memory must be scaled one after the other.
  bool share_memory() const {
    std::vector<std::pair<const char*, const char*>> blocks;  // first byte, the one after the last
    for (const gpu::Span& span : spans_) {
      const char* const start = static_cast<const char*>(span.data);
      if (span.numel > 0) blocks.push_back({start, start + span.numel * item_size(span.dtype)});
    }
    std::sort(blocks.begin(), blocks.end());
    for (size_t i = 1; i < blocks.size(); ++i) {
      if (blocks[i].first < blocks[i - 1].second) return true;
    }
    return false;
  }

  void norms(int kind,
             bool per_tensor,
             const py::object& partials,  // [n_chunks] float64, scratch
             const py::object& results,   // [number of tensors, or 1] float64
             const Queue& queue) const {
    check(queue);
    const std::vector<int64_t> ends = this->ends(per_tensor);
    const int64_t n = static_cast<int64_t>(ends.size());
    const auto chosen = static_cast<reduce::Kind>(kind);
    double* const scratch =
        static_cast<double*>(number_memory(partials, DType::f64, n_chunks(), queue, "partials"));
    double* const to =
        static_cast<double*>(number_memory(results, DType::f64, n, queue, "results"));
    const Unlocked unlocked(total_, queue);  // tensors_ and the caller hold the memory
    if (!queue) {
      cpu::partials(chosen, spans_, scratch);
      for (int64_t i = 0, from = 0; i < n; from = ends[i++]) {
        to[i] = cpu::norm(chosen, scratch + from, ends[i] - from);
      }
      return;
    }
    const gpu::Partials stage1{chosen, spans_.data(), size(), scratch};
    gpu::check(gpu::api().partials(gpu_queue(queue), stage1));
    gpu::check(gpu::api().norms(gpu_queue(queue), {chosen, scratch, ends.data(), n, to}));
  }

  // factor_at, [1] float64 on the device, is read in place of factor unless it is None.
  void scale(double factor, const py::object& factor_at, const Queue& queue) const {
    check(queue);
    const auto* const at =
        static_cast<const double*>(number_memory(factor_at, DType::f64, 1, queue, "factor_at"));
    const Unlocked unlocked(total_, queue);
    if (!queue) {
      cpu::scale(spans_, at ? *at : factor);
    } else {
      gpu::check(gpu::api().scale(gpu_queue(queue), {spans_.data(), size(), factor, at}));
    }
  }

  // Lets autograd notice that scale writes, or raises where torch refuses to write.
  void bump_versions() const {
    if (!symbols::enabled()) {
      py::module_::import("torch.autograd.graph").attr("increment_version")(tensors_);
      return;
    }
    for (const py::handle tensor : tensors_)
      symbols::table().bump_version(symbols::tensor_of(tensor.ptr()));
  }

  // Per dtype (its name, int64 addresses, int64 numels, int64 index of the first chunk of each, and
  // where there are weights int64 addresses, or 0, and float64 etas of them) of the tensors that
  // are not empty, for engines that are called from Python.
  py::list packed() const {
    constexpr const char* kNames[] = {"f64", "f32", "bf16", "f16"};
    py::list groups;
    for (int dtype = 0; dtype < 4; ++dtype) {
      std::vector<int64_t> addresses, numels, firsts, weights;
      std::vector<double> etas;
      for (size_t i = 0; i < spans_.size(); ++i) {
        if (static_cast<int>(spans_[i].dtype) != dtype || spans_[i].numel == 0) continue;
        addresses.push_back(reinterpret_cast<intptr_t>(spans_[i].data));
        numels.push_back(spans_[i].numel);
        firsts.push_back(i == 0 ? 0 : ends_[i - 1]);
        weights.push_back(reinterpret_cast<intptr_t>(spans_[i].weight));
        etas.push_back(spans_[i].eta);
      }
      if (addresses.empty()) continue;
      groups.append(py::make_tuple(kNames[dtype],
                                   bytes_of(addresses),
                                   bytes_of(numels),
                                   bytes_of(firsts),
                                   weights_.empty() ? py::none() : py::object(bytes_of(weights)),
                                   bytes_of(etas)));
    }
    return groups;
  }

 private:
  void add(size_t i, bool may_be_complex, PyObject* weight, double eta) {
    PyObject* const tensor = PyTuple_GET_ITEM(tensors_.ptr(), i);
    check_is_tensor(tensor, "tensors[" + std::to_string(i) + "]");
    TensorView view;
    const void* weight_data = nullptr;
    const bool fits = is_fit(tensor, &view) && (may_be_complex || !view.is_complex) &&
                      is_weight(weight, view, &weight_data);
    if (!fits || !(spans_.empty() || same_device(view, place_))) {
      unfit_.push_back(static_cast<int64_t>(i));
      return;
    }
    if (spans_.empty()) place_ = view;
    has_float64_ = has_float64_ || view.dtype == DType::f64;
    const int64_t numel = view.numel * (view.is_complex ? 2 : 1);
    spans_.push_back({view.data, numel, view.dtype, weight_data, eta});
    total_ += spans_.back().numel;
    ends_.push_back(n_chunks() + reduce::n_chunks(spans_.back().numel));
  }

  static bool is_weight(PyObject* weight, const TensorView& of, const void** data) {
    if (weight == Py_None) return true;
    check_is_tensor(weight, "a weight");
    TensorView view;
    if (!is_fit(weight, &view)) return false;
    *data = view.data;
    return view.dtype == of.dtype && view.is_complex == of.is_complex && same_device(view, of) &&
           same_layout(view, of);
  }

  void check(const Queue& queue) const {
    if (!unfit_.empty()) throw py::value_error("Spans: there are unfit tensors");
    if (!spans_.empty() && !is_reachable(place_, queue)) {
      throw py::value_error("Spans: the tensors are not on the device of the engine");
    }
  }

  int64_t size() const { return static_cast<int64_t>(spans_.size()); }

  template <class T>
  static py::bytes bytes_of(const std::vector<T>& numbers) {
    return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(T)};
  }

  py::tuple tensors_, weights_;  // hold the memory
  std::vector<gpu::Span> spans_;
  std::vector<int64_t> ends_;  // chunks up to and with each tensor
  std::vector<int64_t> unfit_;
  TensorView place_ = {};  // the first tensor: its sizes are not read again
  int64_t total_ = 0;      // elements
  bool has_float64_ = false;
};

// The clip factor for a norm on a device.
inline void clip(const py::object& norm,
                 double max_norm,
                 double inv_scale,
                 const py::object& grad_scale,
                 const py::object& out,
                 const std::pair<int32_t, uint64_t>& device_queue) {
  const Queue queue = device_queue;
  const gpu::Clip work{
      static_cast<const double*>(number_memory(norm, DType::f64, 1, queue, "norm")),
      max_norm,
      inv_scale,
      static_cast<const float*>(number_memory(grad_scale, DType::f32, 1, queue, "grad_scale")),
      static_cast<double*>(number_memory(out, DType::f64, 1, queue, "out"))};
  gpu::check(gpu::api().clip(gpu_queue(queue), work));
}

// Dense tensors of one layout, dtype and device as the rows of dimension 0; sums stays null.
inline bool rows_of(const py::object& a, const py::object& b, gpu::RowSums* rows) {
  check_is_tensor(a.ptr(), "a");
  check_is_tensor(b.ptr(), "b");
  TensorView x, y;
  if (!is_fit(a.ptr(), &x) || !is_fit(b.ptr(), &y) || x.ndim == 0) return false;
  if (x.dtype != y.dtype || x.is_complex || y.is_complex) return false;
  if (!same_device(x, y) || !same_layout(x, y)) return false;
  int64_t row_size = 1;
  for (int32_t d = 1; d < x.ndim; ++d) row_size *= x.sizes[d];
  // The stride of a dense tensor's dimension is the number of elements inside it.
  const bool is_one_block = x.sizes[0] <= 1 || row_size == 0;
  *rows = {x.data,
           y.data,
           x.dtype,
           x.sizes[0],
           row_size,
           is_one_block ? row_size : x.strides[0],
           nullptr};
  return true;
}

// (n_rows, row_size, inner) of gpu::RowSums, or None when they have to be copied first.
inline py::object row_layout(const py::object& a, const py::object& b) {
  gpu::RowSums rows;
  if (!rows_of(a, b, &rows)) return py::none();
  return py::make_tuple(rows.n_rows, rows.row_size, rows.inner);
}

inline void row_sums(const py::object& a,
                     const py::object& b,
                     const py::object& sums,  // [n_rows, 3] float64
                     const Queue& queue) {
  gpu::RowSums rows;
  TensorView place;
  if (!rows_of(a, b, &rows) || !view_of(a.ptr(), &place) || !is_reachable(place, queue)) {
    throw py::value_error("row_sums: the tensors have no kernel together");
  }
  rows.sums = static_cast<double*>(number_memory(sums, DType::f64, 3 * rows.n_rows, queue, "sums"));
  const Unlocked unlocked(rows.n_rows * rows.row_size, queue);  // the caller holds the tensors
  if (!queue) {
    cpu::row_sums(rows);
  } else {
    gpu::check(gpu::api().row_sums(gpu_queue(queue), rows));
  }
}

inline void bind(py::module_& m) {
  py::class_<Spans>(m, "Spans")
      .def(py::init<const py::list&, bool, const py::object&, const std::vector<double>&>(),
           py::arg("tensors"),
           py::arg("may_be_complex"),
           py::arg("weights") = py::none(),
           py::arg("etas") = std::vector<double>())
      .def_property_readonly("unfit", &Spans::unfit)
      .def_property_readonly("n_chunks", &Spans::n_chunks)
      .def_property_readonly("has_float64", &Spans::has_float64)
      .def("ends", &Spans::ends)
      .def("share_memory", &Spans::share_memory)
      .def("norms", &Spans::norms)
      .def("scale", &Spans::scale)
      .def("bump_versions", &Spans::bump_versions)
      .def("packed", &Spans::packed);
  m.def("clip", &clip);
  m.def("row_layout", &row_layout);
  m.def("row_sums", &row_sums);
}

}  // namespace pyoptim::reduce_python
