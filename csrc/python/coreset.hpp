// Nearest rows, k-center steps, class centres of torch tensors in the CPU's memory.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "coreset/centers.hpp"
#include "coreset/nearest.hpp"
#include "python/reduce.hpp"
#include "python/tensor_access.hpp"

namespace pyoptim::coreset_python {

namespace py = pybind11;
using reduce_python::check_is_tensor;

// A matrix of the CPU's whose rows have their elements side by side.
inline bool read_matrix(const py::object& tensor, TensorView* view) {
  if (!view_of(tensor.ptr(), view) || view->dtype == DType::unsupported) return false;
  if (view->is_complex || !view->is_cpu || view->ndim != 2 || !is_aligned(*view)) return false;
  if (!view->data && view->numel > 0) return false;
  return view->sizes[1] <= 1 || view->strides[1] == 1;
}

inline bool has_row_layout(const py::object& tensor) {
  check_is_tensor(tensor.ptr(), "matrix");
  TensorView view;
  return read_matrix(tensor, &view);
}

inline TensorView matrix(const py::object& tensor, const char* name) {
  check_is_tensor(tensor.ptr(), name);
  TensorView view;
  if (!read_matrix(tensor, &view)) {
    throw py::value_error(std::string(name) + " must be a real 2-D CPU tensor with dense rows");
  }
  return view;
}

// The int64 numbers of a dense tensor; torch's own dtype is told by the caller.
inline int64_t* numbers(const py::object& tensor, int64_t n, const char* name) {
  check_is_tensor(tensor.ptr(), name);
  const bool fits = py::cast<bool>(tensor.attr("is_contiguous")()) &&
                    py::cast<int64_t>(tensor.attr("numel")()) >= n &&
                    py::cast<int64_t>(tensor.attr("itemsize")) == 8 &&
                    py::cast<bool>(tensor.attr("is_cpu"));
  if (!fits) throw py::value_error(std::string(name) + " must be a dense int64 CPU tensor");
  return reinterpret_cast<int64_t*>(py::cast<uintptr_t>(tensor.attr("data_ptr")()));
}

inline double* doubles(const py::object& tensor, int64_t n, const char* name) {
  return static_cast<double*>(reduce_python::number_memory(tensor, DType::f64, n, {}, name));
}

inline coreset::Rows rows_of(const TensorView& view, const py::object& rows, const char* name) {
  coreset::Rows found = {view.data, view.dtype, view.strides[0], nullptr, view.sizes[0]};
  if (rows.is_none()) return found;
  found.n = py::cast<int64_t>(rows.attr("numel")());
  found.rows = numbers(rows, found.n, name);
  for (int64_t i = 0; i < found.n; ++i) {
    if (found.rows[i] < 0 || found.rows[i] >= view.sizes[0])
      throw py::value_error(std::string(name) + " holds a row that does not exist");
  }
  return found;
}

inline void check_together(const TensorView& x, const TensorView& y, const char* what) {
  if (x.dtype == y.dtype && x.sizes[1] == y.sizes[1]) return;
  throw py::value_error(std::string(what) + ": x and y must have one dtype and as many columns");
}

// (first row of x, first row of y) with a NaN, -1 where there is none.
inline std::pair<int64_t, int64_t> nearest(const py::object& x,
                                           const py::object& y,
                                           const py::object& x_rows,
                                           const py::object& y_rows,
                                           int64_t k,
                                           int metric,
                                           int64_t first_index,
                                           const py::object& scores,     // [rows of x, k] float64
                                           const py::object& indices) {  // [rows of x, k] int64
  const TensorView x_view = matrix(x, "x"), y_view = matrix(y, "y");
  check_together(x_view, y_view, "nearest");
  if (k < 1 || metric < 0 || metric > 2) throw py::value_error("nearest: k or metric is wrong");
  const int64_t n = x_view.sizes[0] * k;
  const coreset::Search search = {rows_of(x_view, x_rows, "x_rows"),
                                  rows_of(y_view, y_rows, "y_rows"),
                                  x_view.sizes[1],
                                  k,
                                  static_cast<coreset::Metric>(metric),
                                  first_index,
                                  doubles(scores, n, "scores"),
                                  numbers(indices, n, "indices")};
  const py::gil_scoped_release unlocked;  // the caller holds the tensors
  const coreset::Problem problem = coreset::nearest(search);
  return {problem.x_row, problem.y_row};
}

// Squared distances of all pairs, rounded once to the dtype of `out`.
inline void pairwise(const py::object& x, const py::object& y, const py::object& out) {
  const TensorView x_view = matrix(x, "x"), y_view = matrix(y, "y"), to = matrix(out, "out");
  check_together(x_view, y_view, "pairwise");
  const bool fits = to.sizes[0] == x_view.sizes[0] && to.sizes[1] == y_view.sizes[0] &&
                    (to.dtype == DType::f32 || to.dtype == DType::f64);
  if (!fits) throw py::value_error("pairwise: out must be [rows of x, rows of y], float32 or 64");
  const coreset::Rows a = rows_of(x_view, py::none(), "x"), b = rows_of(y_view, py::none(), "y");
  const py::gil_scoped_release unlocked;
  coreset::pairwise({a, b, x_view.sizes[1], to.data, to.dtype, to.strides[0]});
}

// (row with the largest distance or -1, that distance, first row whose distance is NaN or -1).
inline py::tuple step_center(const py::object& x,
                             const py::object& center,        // [d] float64
                             const py::object& min_sqdist) {  // [n] float64, updated
  const TensorView view = matrix(x, "x");
  const coreset::Rows rows = rows_of(view, py::none(), "x");
  const double* const at = doubles(center, view.sizes[1], "center");
  double* const distances = doubles(min_sqdist, rows.n, "min_sqdist");
  coreset::Farthest found;
  {
    const py::gil_scoped_release unlocked;
    found = coreset::step_center(rows, view.sizes[1], at, distances);
  }
  return py::make_tuple(found.row, found.sqdist, found.nan_row);
}

// Squared distance of every row to the centre of its label.
inline void center_sqdist(const py::object& x,
                          const py::object& labels,   // [n] int64
                          const py::object& centers,  // [classes, d] float64
                          int64_t n_classes,
                          const py::object& out) {  // [n] float64
  const TensorView view = matrix(x, "x");
  const coreset::Rows rows = rows_of(view, py::none(), "x");
  const int64_t d = view.sizes[1];
  const int64_t* const classes = numbers(labels, rows.n, "labels");
  for (int64_t i = 0; i < rows.n; ++i) {
    if (classes[i] < 0 || classes[i] >= n_classes)
      throw py::value_error("center_sqdist: a label has no centre");
  }
  const double* const at = doubles(centers, n_classes * d, "centers");
  double* const to = doubles(out, rows.n, "out");
  const py::gil_scoped_release unlocked;
  coreset::center_sqdist(rows, d, classes, at, to);
}

// Medians of each column over groups of rows; the first row with a NaN, or -1.
inline int64_t medians(const py::object& x,
                       const py::object& rows,   // [n] int64: row numbers, group after group
                       const py::object& ends,   // [groups] int64: where each group ends
                       const py::object& out) {  // [groups, d] float64
  const TensorView view = matrix(x, "x");
  const coreset::Rows grouped = rows_of(view, rows, "rows");
  const int64_t n_groups = py::cast<int64_t>(ends.attr("numel")());
  const int64_t* const stops = numbers(ends, n_groups, "ends");
  for (int64_t g = 0, from = 0; g < n_groups; from = stops[g++]) {
    if (stops[g] < from || stops[g] > grouped.n)
      throw py::value_error("medians: ends must ascend to the number of rows");
  }
  double* const to = doubles(out, n_groups * view.sizes[1], "out");
  const py::gil_scoped_release unlocked;
  return coreset::medians({grouped, view.sizes[1], stops, n_groups, to});
}

inline void bind(py::module_& m) {
  m.def("coreset_has_row_layout", &has_row_layout);
  m.def("coreset_nearest", &nearest);
  m.def("coreset_pairwise", &pairwise);
  m.def("coreset_step_center", &step_center);
  m.def("coreset_center_sqdist", &center_sqdist);
  m.def("coreset_medians", &medians);
  m.def("coreset_n_scored", &coreset::n_scored, "pairs that nearest scored in float64 so far");
  m.def(
      "coreset_multiply_registers",
      [](int64_t rounds) {
        const py::gil_scoped_release unlocked;
        return coreset::active_kernels().multiply_registers(rounds);
      },
      "runs that many rounds of float32 multiply-adds and returns their number");
  m.def("coreset_isa", [] { return coreset::active_kernels().isa; });
}

}  // namespace pyoptim::coreset_python
