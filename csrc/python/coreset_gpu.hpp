// Nearest rows and centres of torch tensors on the CUDA engine's device.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <utility>

#include "python/gpu.hpp"
#include "python/reduce.hpp"
#include "python/tensor_access.hpp"

namespace pyoptim::coreset_gpu {

namespace py = pybind11;
using reduce_python::check_is_tensor;
using reduce_python::gpu_queue;
using reduce_python::is_reachable;
using reduce_python::Queue;
using Device = std::pair<int32_t, uint64_t>;

// The memory of a dense tensor that holds n numbers of so many bytes; None is null. torch's dtypes
// without arithmetic, as int64, are told by the caller.
template <class T>
T* memory(const py::object& tensor, int64_t n, const Device& device, const char* name) {
  if (tensor.is_none()) return nullptr;
  check_is_tensor(tensor.ptr(), name);
  const bool is_cpu = py::cast<bool>(tensor.attr("is_cpu"));
  const bool is_here =
      gpu::api().is_emulated
          ? is_cpu
          : !is_cpu && py::cast<int32_t>(tensor.attr("get_device")()) == device.first;
  const bool fits = is_here && py::cast<bool>(tensor.attr("is_contiguous")()) &&
                    py::cast<int64_t>(tensor.attr("nbytes")) >= n * static_cast<int64_t>(sizeof(T));
  if (!fits) {
    throw py::value_error(std::string(name) + " must be a dense tensor of at least " +
                          std::to_string(n) + " numbers on the device of the engine");
  }
  return reinterpret_cast<T*>(py::cast<uintptr_t>(tensor.attr("data_ptr")()));
}

// Rows that lie on the engine's device, each with its elements side by side.
inline gpu::Matrix matrix(const py::object& tensor,
                          const py::object& rows,  // [n] int64, or None
                          const Device& device,
                          const char* name) {
  check_is_tensor(tensor.ptr(), name);
  TensorView view;
  const bool fits = view_of(tensor.ptr(), &view) && view.dtype != DType::unsupported &&
                    !view.is_complex && view.ndim == 2 && is_aligned(view) &&
                    is_reachable(view, device) && (view.data || view.numel == 0) &&
                    (view.sizes[1] <= 1 || view.strides[1] == 1);
  if (!fits) {
    throw py::value_error(std::string(name) +
                          " must be a real 2-D tensor with dense rows on the engine's device");
  }
  gpu::Matrix x = {view.data, view.dtype, view.strides[0], nullptr, view.sizes[0], view.sizes[1]};
  if (rows.is_none()) return x;
  x.n = py::cast<int64_t>(rows.attr("numel")());
  x.rows = memory<int64_t>(rows, x.n, device, "rows");
  return x;
}

inline gpu::Metric metric_of(int number) {
  if (number < 0 || number > 2) throw py::value_error("there are the metrics 0, 1 and 2");
  return static_cast<gpu::Metric>(number);
}

inline void squares(const py::object& x,
                    const py::object& rows,
                    const py::object& out,  // [n] float64
                    const Device& device) {
  const gpu::Matrix from = matrix(x, rows, device, "x");
  gpu::check(gpu::api().squares(gpu_queue(device),
                                {from, memory<double>(out, from.n, device, "squares")}));
}

inline void pack(const py::object& x,
                 const py::object& rows,
                 int metric,
                 const py::object& about,   // [4] float64
                 const py::object& center,  // [d] float64, or None
                 int64_t width,
                 const py::object& high,        // [n, width] of 16 bits, or None
                 const py::object& low,         // the same, or None: rows are not split
                 const py::object& norms,       // [n] float64
                 const py::object& half_norms,  // [n] float32, or None
                 const Device& device) {
  const gpu::Matrix from = matrix(x, rows, device, "x");
  if (width < from.d || width % 8) throw py::value_error("pack: the width does not fit");
  if (low.is_none() && item_size(from.dtype) != 2)
    throw py::value_error("pack: only 16-bit rows can stay whole");
  gpu::check(gpu::api().pack_rows(gpu_queue(device),
                                  {from,
                                   metric_of(metric),
                                   !low.is_none(),
                                   memory<gpu::About>(about, 1, device, "about"),
                                   memory<double>(center, from.d, device, "center"),
                                   width,
                                   memory<uint16_t>(high, from.n * width, device, "high"),
                                   memory<uint16_t>(low, from.n * width, device, "low"),
                                   memory<double>(norms, from.n, device, "norms"),
                                   memory<float>(half_norms, from.n, device, "half_norms")}));
}

// Packed rows, one matrix of 16-bit elements for each part.
inline gpu::Operand operand(const py::object& high,
                            const py::object& low,
                            int64_t d,
                            const Device& device,
                            const char* name) {
  check_is_tensor(high.ptr(), name);
  const auto sizes = py::cast<py::tuple>(high.attr("shape"));
  const auto strides = py::cast<py::tuple>(high.attr("stride")());
  const auto n = py::cast<int64_t>(sizes[0]), stride = py::cast<int64_t>(strides[0]);
  const auto address = py::cast<uintptr_t>(high.attr("data_ptr")());
  const bool is_cpu = py::cast<bool>(high.attr("is_cpu"));
  const bool fits = py::cast<int64_t>(high.attr("itemsize")) == 2 && sizes.size() == 2 &&
                    py::cast<int64_t>(sizes[1]) >= d && py::cast<int64_t>(strides[1]) == 1 &&
                    stride % 8 == 0 && address % 16 == 0 && is_cpu == gpu::api().is_emulated;
  if (!fits)
    throw py::value_error(std::string(name) + " must have 16-bit rows that lie on 16 bytes");
  return {reinterpret_cast<const void*>(address),
          memory<uint16_t>(low, n * stride, device, name),
          stride,
          n};
}

inline void filter(const py::object& x_high,
                   const py::object& x_low,
                   const py::object& y_high,
                   const py::object& y_low,
                   int64_t d,
                   bool is_half,
                   const py::object& half_norms,  // [m] float32
                   int64_t n_parts,
                   const py::object& least,    // [n_parts, 3, n] float32, or None
                   const py::object& columns,  // [n_parts, 2, n] int32, or None
                   const py::object& values,   // [n, m] float32, or None
                   const Device& device) {
  const gpu::Operand x = operand(x_high, x_low, d, device, "x");
  const gpu::Operand y = operand(y_high, y_low, d, device, "y");
  if (x_low.is_none() != y_low.is_none() || n_parts < 1 || values.is_none() == least.is_none())
    throw py::value_error("filter: the arguments do not fit together");
  gpu::check(gpu::api().filter(gpu_queue(device),
                               {x,
                                y,
                                d,
                                is_half,
                                memory<float>(half_norms, y.n, device, "half_norms"),
                                n_parts,
                                memory<float>(least, n_parts * 3 * x.n, device, "least"),
                                memory<int32_t>(columns, n_parts * 2 * x.n, device, "columns"),
                                memory<float>(values, x.n * y.n, device, "values")}));
}

inline void certify(const py::object& x,
                    const py::object& x_rows,
                    const py::object& y,
                    const py::object& y_rows,
                    int metric,
                    const std::array<double, 4>& slack,
                    const py::object& about,
                    const py::object& norms,
                    int64_t n_parts,
                    const py::object& least,
                    const py::object& columns,
                    int64_t first_index,
                    const py::object& scores,      // [rows of x] float64
                    const py::object& indices,     // [rows of x] int64
                    const py::object& is_settled,  // [n] uint8
                    const Device& device) {
  const gpu::Matrix a = matrix(x, x_rows, device, "x"), b = matrix(y, y_rows, device, "y");
  const int64_t whole = py::cast<int64_t>(x.attr("shape")[py::int_(0)]);
  if (a.dtype != b.dtype || a.d != b.d) throw py::value_error("certify: x and y do not fit");
  gpu::check(gpu::api().certify(gpu_queue(device),
                                {a,
                                 b,
                                 metric_of(metric),
                                 {slack[0], slack[1], slack[2], slack[3]},
                                 memory<gpu::About>(about, 1, device, "about"),
                                 memory<double>(norms, a.n, device, "norms"),
                                 n_parts,
                                 memory<float>(least, n_parts * 3 * a.n, device, "least"),
                                 memory<int32_t>(columns, n_parts * 2 * a.n, device, "columns"),
                                 first_index,
                                 memory<double>(scores, whole, device, "scores"),
                                 memory<int64_t>(indices, whole, device, "indices"),
                                 memory<uint8_t>(is_settled, a.n, device, "is_settled")}));
}

inline void scores(const py::object& x,
                   const py::object& x_rows,
                   const py::object& y,
                   const py::object& y_rows,
                   int metric,
                   const py::object& columns,  // [n, k] int64, or None: all
                   const py::object& out,      // [n, k] float64
                   const Device& device) {
  const gpu::Matrix a = matrix(x, x_rows, device, "x"), b = matrix(y, y_rows, device, "y");
  if (a.dtype != b.dtype || a.d != b.d) throw py::value_error("scores: x and y do not fit");
  const int64_t k = columns.is_none() ? b.n : py::cast<int64_t>(columns.attr("shape")[py::int_(1)]);
  gpu::check(gpu::api().scores(gpu_queue(device),
                               {a,
                                b,
                                metric_of(metric),
                                memory<int64_t>(columns, a.n * k, device, "columns"),
                                k,
                                memory<double>(out, a.n * k, device, "scores")}));
}

inline void step_center(const py::object& x,
                        const py::object& center,      // [d] float64, or None: found's row
                        const py::object& min_sqdist,  // [n] float64
                        const py::object& partials,    // 2048 times 24 bytes
                        const py::object& found,       // 24 bytes
                        const Device& device) {
  const gpu::Matrix rows = matrix(x, py::none(), device, "x");
  auto* const to = memory<gpu::Farthest>(found, 1, device, "found");
  gpu::check(gpu::api().step_center(
      gpu_queue(device),
      {rows,
       memory<double>(center, rows.d, device, "center"),
       to,
       memory<double>(min_sqdist, rows.n, device, "min_sqdist"),
       memory<gpu::Farthest>(partials, gpu::kFarthestParts, device, "partials"),
       to}));
}

inline void center_sqdist(const py::object& x,
                          const py::object& labels,   // [n] int64
                          const py::object& centers,  // [classes, d] float64
                          const py::object& out,      // [n] float64
                          const Device& device) {
  const gpu::Matrix rows = matrix(x, py::none(), device, "x");
  const int64_t n_classes = py::cast<int64_t>(centers.attr("shape")[py::int_(0)]);
  gpu::check(
      gpu::api().center_sqdist(gpu_queue(device),
                               {rows,
                                memory<int64_t>(labels, rows.n, device, "labels"),
                                memory<double>(centers, n_classes * rows.d, device, "centers"),
                                memory<double>(out, rows.n, device, "out")}));
}

inline void bind(py::module_& m) {
  m.def("coreset_gpu_squares", &squares);
  m.def("coreset_gpu_pack", &pack);
  m.def("coreset_gpu_filter", &filter);
  m.def("coreset_gpu_certify", &certify);
  m.def("coreset_gpu_scores", &scores);
  m.def("coreset_gpu_step_center", &step_center);
  m.def("coreset_gpu_center_sqdist", &center_sqdist);
}

}  // namespace pyoptim::coreset_gpu
