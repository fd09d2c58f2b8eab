// pyoptim._C: unwraps, checks, releases the GIL and raises. The only translation unit that includes
// Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "python/coreset.hpp"
#include "python/gpu.hpp"
#include "python/plan.hpp"
#include "python/reduce.hpp"

namespace pyoptim {
namespace {

py::dict rule_info(const std::string& name) {
  const Rule& rule = find_rule(name);
  py::list hypers, variants;
  for (int i = 0; i < rule.n_hypers; ++i) hypers.append(rule.hyper_names[i]);
  for (int v = 0; v < rule.n_variants; ++v) {
    py::list names;
    for (int i = 0; i < rule.n_states[v]; ++i) names.append(rule.state_names[v][i]);
    variants.append(py::tuple(names));
  }
  py::dict info;
  info["hyper_names"] = py::tuple(hypers);
  info["state_names"] = py::tuple(variants);
  info["counts_steps"] = rule.counts_steps;
  info["has_master"] = rule.has_master;
  return info;
}

// NaN where the host would have to wait for a device.
std::vector<double> read_hypers(const std::string& rule_name, const py::dict& group) {
  const Rule& rule = find_rule(rule_name);
  std::vector<double> raw;
  for (int i = 0; i < rule.n_hypers; ++i)
    raw.push_back(HyperReader(rule.hyper_names[i]).read(group.ptr(), Keeps::device_tensors).number);
  return raw;
}

// (data pointer, sizes, strides, dtype name, is_complex, is_cpu), or None without strided memory.
py::object describe(bool readable, const TensorView& view) {
  if (!readable) return py::none();
  const std::vector<int64_t> sizes(view.sizes, view.sizes + view.ndim),
      strides(view.strides, view.strides + view.ndim);
  return py::make_tuple(reinterpret_cast<uintptr_t>(view.data),
                        sizes,
                        strides,
                        dtype_name(view.dtype),
                        view.is_complex,
                        view.is_cpu);
}

// capsule holds torch's own at::Tensor* for the tensor: where the same TensorImpl lies in the
// Python object, or 0.
size_t find_tensor_offset(const py::object& tensor, const py::capsule& capsule) {
  void** const owned = static_cast<void**>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
  if (owned == nullptr) throw py::error_already_set();
  const size_t size = static_cast<size_t>(Py_TYPE(tensor.ptr())->tp_basicsize);
  size_t found = 0;
  for (size_t at = sizeof(PyObject); !found && at + sizeof(void*) <= size; at += sizeof(void*)) {
    if (*reinterpret_cast<void**>(reinterpret_cast<char*>(tensor.ptr()) + at) == *owned) found = at;
  }
  if (symbols::table().delete_handle) (void)symbols::table().delete_handle(owned);
  return found;
}

// What the symbols say about a tensor, for the self-test: (itself, its gradient or None, neg bit,
// conj bit, start of its storage, where its shape lies).
py::tuple probe_symbols(const py::object& tensor, size_t offset) {
  const symbols::Tensor handle = reinterpret_cast<char*>(tensor.ptr()) + offset;
  TensorView view;
  const bool readable = symbols::view(handle, &view);
  const py::object self = describe(readable, view);
  py::object grad = py::none();
  if (const symbols::Tensor g = symbols::grad_of(handle)) {
    TensorView grad_view;
    const bool grad_readable = symbols::view(g, &grad_view);
    grad = describe(grad_readable, grad_view);
  }
  void* const* const impl = *static_cast<void* const* const*>(handle);
  return py::make_tuple(self,
                        grad,
                        symbols::table().is_neg(handle),
                        symbols::table().is_conj(handle),
                        reinterpret_cast<uintptr_t>(symbols::storage_memory(impl)),
                        symbols::find_metadata(handle));
}

void bump_by_symbol(const py::object& tensor, size_t offset) {
  symbols::table().bump_version(reinterpret_cast<char*>(tensor.ptr()) + offset);
}

py::tuple layout_facts(const py::object& tensor) {
  TensorView view;
  if (!dlpack::view(tensor.ptr(), &view)) return py::make_tuple(false, false);
  return py::make_tuple(is_dense(view), is_aligned(view));
}

bool has_memory(const py::object& tensor) {
  TensorView view;
  return dlpack::view(tensor.ptr(), &view) && (view.is_cpu || view.cuda >= 0) &&
         (view.data || view.numel == 0);
}

bool same_layout_of(const py::object& a, const py::object& b) {
  TensorView va, vb;
  return dlpack::view(a.ptr(), &va) && dlpack::view(b.ptr(), &vb) && same_layout(va, vb);
}

void stream(const std::vector<uintptr_t>& read_only,
            const std::vector<uintptr_t>& read_write,
            int64_t numel,
            int itemsize,
            int num_threads) {
  if (read_only.size() > 2 || read_write.empty() || read_write.size() > 4) {
    throw py::value_error("stream: at most 2 read-only arrays and 1 to 4 read-write arrays");
  }
  if (itemsize != 2 && itemsize != 4 && itemsize != 8)
    throw py::value_error("stream: itemsize must be 2, 4 or 8");
  std::vector<void*> in, out;
  for (const uintptr_t p : read_only) in.push_back(reinterpret_cast<void*>(p));
  for (const uintptr_t p : read_write) out.push_back(reinterpret_cast<void*>(p));
  const py::gil_scoped_release unlocked;
  cpu::stream(itemsize, in, out, numel, num_threads == 1);
}

// Makes the plan visible to the garbage collector.
void make_collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject* const type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    return py::detail::is_holder_constructed(self)
               ? py::cast<Plan&>(py::handle(self)).visit(visit, arg)
               : 0;
  };
  type->tp_clear = [](PyObject* self) {
    py::cast<Plan&>(py::handle(self)).drop_references();
    return 0;
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyoptim's compiled kernels and the walk over parameters";
  if (!cpu::watch_for_fork()) throw std::runtime_error("pyoptim: pthread_atfork failed");

  py::class_<Plan>(m, "Plan", py::custom_type_setup(make_collectable))
      .def(py::init<const std::string&,
                    const py::list&,
                    const py::dict&,
                    const std::vector<py::tuple>&,
                    const py::list&,
                    const py::object&>())
      .def("step",
           &Plan::step,
           py::arg("param_groups"),
           py::arg("state"),
           py::arg("sources") = py::none(),
           "True when the step was made, False when the general path has to make it")
      .def("scaled_step",
           &Plan::scaled_step,
           py::arg("param_groups"),
           py::arg("state"),
           py::arg("inv_scale"),
           py::arg("clip"),
           py::arg("devices"),
           py::arg("sources") = py::none(),
           py::arg("grads") = py::none(),
           py::arg("saved") = py::none(),
           py::arg("sum") = py::none())
      .def_property_readonly("is_on_gpu", &Plan::is_on_gpu)
      .def_property_readonly("devices", &Plan::devices);

  m.def("run_rows",
        &run_rows,
        py::arg("rule"),
        py::arg("param_groups"),
        py::arg("rows"),
        py::arg("inv_scale"),
        py::arg("clip"),
        py::arg("devices"),
        py::arg("memory"),
        py::arg("sum") = py::none());
  m.def("rules", [] {
    std::vector<std::string> names;
#define PYOPTIM_NAME(R) names.push_back(R<float>::kName);
    PYOPTIM_FOR_EACH_RULE(PYOPTIM_NAME)
#undef PYOPTIM_NAME
    return names;
  });
  m.def("rule_info", &rule_info);
  m.def("read_hypers", &read_hypers);
  m.def("layout_facts", &layout_facts, "(is dense, is aligned) of a strided tensor");
  m.def("same_layout", &same_layout_of);
  m.def("has_memory", &has_memory);

  m.def("find_dlpack_api",
        [](const py::object& tensor_type) { return dlpack::find_api(tensor_type.ptr()); });
  symbols::loaded = symbols::load();
  m.def("symbols_found", [] { return symbols::table().complete; });
  m.def("find_tensor_offset", &find_tensor_offset);
  m.def("probe_symbols", &probe_symbols);
  m.def("bump_by_symbol", &bump_by_symbol);
  m.def("use_symbols", [](size_t offset) { symbols::offset() = offset; });
  m.def("set_metadata", [](size_t bytes) { symbols::metadata() = bytes; });
  m.def("access_path", [] { return symbols::enabled() ? "libtorch symbols" : "dlpack"; });

  m.def("built_isas", &cpu::built_isas);
  m.def("isas", &cpu::supported_isas);
  m.def("active_isa", [] { return cpu::active_kernels().isa; });
  m.def("set_isa", [](const std::string& name) {
    if (!cpu::set_isa(name))
      throw py::value_error("this processor or build has no instruction set '" + name + "'");
  });
  m.def(
      "count_wrong_roots",
      [](uint32_t first, uint32_t last) {
        return cpu::active_kernels().count_wrong_roots(first, last);
      },
      "float32 bit patterns in [first, last] whose vector square root is not correctly rounded");
  m.def("num_threads", &cpu::num_threads);
  coreset_python::bind(m);
  reduce_python::bind(m);
  m.def("load_cuda", &gpu::load, py::arg("path"), "why the engine cannot be used, or nothing");
  m.def("cuda_is_loaded", [] { return gpu::loaded_api() != nullptr; });
  m.def("is_emulated", [] { return gpu::loaded_api() && gpu::api().is_emulated; });
  m.def("cuda_launches", [] { return gpu::api().launches(); });
  m.def(
      "tune_cuda",
      [](int64_t chunk, int64_t rows_per_launch) { gpu::api().tune(chunk, rows_per_launch); },
      py::arg("chunk") = 0,
      py::arg("rows_per_launch") = 0,
      "elements per block, tensors per launch; 0: the engine's choice");
  m.def("stream",
        &stream,
        py::arg("read_only"),
        py::arg("read_write"),
        py::arg("numel"),
        py::arg("itemsize"),
        py::arg("num_threads"));
}

}  // namespace pyoptim
