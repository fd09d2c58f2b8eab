// What a step launches on a GPU: rows that share an engine, a device and a kernel, as one request.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "python/gpu.hpp"
#include "python/rule.hpp"

namespace pyoptim {

namespace py = pybind11;

enum class Backend : int8_t { cpu = 0, cuda, triton };

// What multiplies the gradients of one step: numbers for rows of the CPU engine, and for each
// device of the others tensors on it, or None.
struct StepFactors {
  struct OnDevice {
    int32_t device;
    py::object grad_scale, found_inf, clip;
  };

  double inv_scale = 1.0;
  double clip = 1.0;
  std::vector<OnDevice> devices;

  bool skips() const {
    for (const OnDevice& on : devices) {
      if (!on.found_inf.is_none()) return true;
    }
    return false;
  }
  bool unscales() const {
    for (const OnDevice& on : devices) {
      if (!on.grad_scale.is_none()) return true;
    }
    return inv_scale != 1.0;
  }
  OnDevice on(int32_t device) const {
    for (const OnDevice& found : devices) {
      if (found.device == device) return found;
    }
    return {device, py::none(), py::none(), py::none()};
  }
};

// A hyper-parameter that is a tensor.
struct LiveSource {
  int group, hyper;
  PyObject* tensor;
};

// The live parts of every group, for one device.
struct LiveGroups {
  std::vector<gpu::LiveGroup> groups;
  std::vector<py::object> copies;  // on this device, of tensors on another
};

inline const char* name_of(DTypeSet set) {
  constexpr const char* kNames[] = {"f64",
                                    "f32",
                                    "bf16",
                                    "f16",
                                    "bf16_state32",
                                    "f16_state32",
                                    "bf16_master",
                                    "f16_master",
                                    "bf16_master_state32",
                                    "f16_master_state32"};
  return kNames[static_cast<int>(set)];
}

template <class T>
const T* data_of(const py::object& tensor) {
  TensorView view;
  if (tensor.is_none() || !view_of(tensor.ptr(), &view)) return nullptr;
  return static_cast<const T*>(view.data);
}

template <class T>
py::bytes as_bytes(const std::vector<T>& values) {
  return py::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

class Bucket {
 public:
  Backend backend;
  int32_t device;  // CUDA index, or -1: the CPU's memory, under the emulator or the interpreter
  int variant;
  DTypeSet dtypes;
  bool is_live;

  bool holds(const Bucket& other) const {
    return backend == other.backend && device == other.device && variant == other.variant &&
           dtypes == other.dtypes && is_live == other.is_live;
  }

  void clear() {
    rows_.clear();
    live_rows_.clear();
  }
  bool empty() const { return rows_.empty(); }

  void add(const TableRow& row, const StepCounter& counter, int group) {
    rows_.push_back(&row);
    if (is_live) live_rows_.push_back({counter.data, group, counter.is_double});
  }

  // memory is a pyoptim.gpu.Memory; slot tells this bucket from the others of its plan. sums:
  // memory of the device for the sums of chunks, or None.
  void launch(const Rule& rule,
              const HyperCache& hypers,
              const LiveGroups& live,
              const StepFactors& factors,
              const py::object& memory,
              int slot,
              const py::object& sums) const {
    const StepFactors::OnDevice on = factors.on(device);
    const py::object blocks =
        is_live ? memory.attr("workspace")(slot, rows_.size() * kHyperBytes, device) : py::none();
    if (backend == Backend::cuda) {
      launch_cuda(rule, hypers, live, factors, on, blocks, memory, slot, sums);
    } else {
      launch_triton(rule, hypers, live, factors, on, blocks, memory, slot, sums);
    }
  }

  // total: [1] float64 on the device, the sum of the first n of the float64 numbers in sums.
  void add_up(const py::object& sums,
              int64_t n,
              double* total_at,
              const py::object& total,
              const py::object& memory) const {
    if (backend == Backend::cuda) {
      const gpu::Norms work = {reduce::Kind::magnitudes, data_of<double>(sums), &n, 1, total_at};
      gpu::check(gpu::api().norms(queue(memory), work));
    } else {
      memory.attr("triton").attr("add_up")(sums, n, total);
    }
  }

 private:
  gpu::Queue queue(const py::object& memory) const {
    return {device < 0 ? 0 : device, py::cast<uint64_t>(memory.attr("stream")(device))};
  }

  void launch_cuda(const Rule& rule,
                   const HyperCache& hypers,
                   const LiveGroups& live,
                   const StepFactors& factors,
                   const StepFactors::OnDevice& on,
                   const py::object& blocks,
                   const py::object& memory,
                   int slot,
                   const py::object& sums) const {
    const gpu::Queue queue = this->queue(memory);
    const int64_t n_rows = static_cast<int64_t>(rows_.size());
    const float* const found_inf = data_of<float>(on.found_inf);
    auto* const live_hypers = const_cast<HyperBlock*>(data_of<HyperBlock>(blocks));
    if (is_live) {
      gpu::check(gpu::api().prepare(queue,
                                    {rule.id,
                                     dtypes == DTypeSet::f64,
                                     live.groups.data(),
                                     static_cast<int64_t>(live.groups.size()),
                                     live_rows_.data(),
                                     n_rows,
                                     found_inf,
                                     live_hypers}));
    }
    gpu::Update update = {
        rule.id, variant, dtypes, rows_.data(), n_rows, hypers.blocks().data(), live_hypers, {}};
    update.factors.inv_scale = factors.inv_scale;
    update.factors.grad_scale = data_of<float>(on.grad_scale);
    update.factors.clip = on.clip.is_none() ? factors.clip : 1.0;
    update.factors.clip_at = data_of<double>(on.clip);
    update.factors.found_inf = found_inf;
    const int64_t n_bytes = gpu::api().workspace_bytes(update);
    const py::object workspace =
        n_bytes > 0 ? memory.attr("workspace")(-1 - slot, n_bytes, device) : py::none();
    update.workspace = const_cast<char*>(data_of<char>(workspace));
    update.sums = const_cast<double*>(data_of<double>(sums));
    gpu::check(gpu::api().update(queue, update));
  }

  void launch_triton(const Rule& rule,
                     const HyperCache& hypers,
                     const LiveGroups& live,
                     const StepFactors& factors,
                     const StepFactors::OnDevice& on,
                     const py::object& blocks,
                     const py::object& memory,
                     int slot,
                     const py::object& sums) const {
    const py::object engine = memory.attr("triton"), place = memory.attr("device")(device);
    const py::object cache = memory.attr("cache")(slot);
    if (is_live) prepare_triton(engine, rule, live, on, blocks, place, cache);
    std::vector<int64_t> addresses, numels;
    std::vector<int32_t> indices;
    const bool has_sources = reads_sources();
    list_rows(rule.n_states[variant], has_sources, &addresses, &numels, &indices);
    engine.attr("update")(rule.name,
                          variant,
                          name_of(dtypes),
                          place,
                          as_bytes(addresses),
                          as_bytes(numels),
                          as_bytes(indices),
                          as_bytes(hypers.blocks()),
                          blocks,
                          factors.inv_scale,
                          on.grad_scale,
                          on.clip.is_none() ? factors.clip : 1.0,
                          on.clip,
                          on.found_inf,
                          cache,
                          has_sources,
                          as_bytes(list_dimensions()),
                          rule.yields_term ? as_bytes(list_saved()) : py::bytes(),
                          sums);
  }

  bool reads_sources() const {
    const auto is_copy = [](const TableRow* row) { return row->source != row->param; };
    return std::any_of(rows_.begin(), rows_.end(), is_copy);
  }

  void prepare_triton(const py::object& engine,
                      const Rule& rule,
                      const LiveGroups& live,
                      const StepFactors::OnDevice& on,
                      const py::object& blocks,
                      const py::object& place,
                      const py::object& cache) const {
    std::vector<double> raw;
    std::vector<const void*> sources;
    std::vector<uint8_t> source_is_double, counter_is_double;
    for (const gpu::LiveGroup& group : live.groups) {
      raw.insert(raw.end(), group.raw, group.raw + kMaxHypers);
      sources.insert(sources.end(), group.source, group.source + kMaxHypers);
      source_is_double.insert(
          source_is_double.end(), group.is_double, group.is_double + kMaxHypers);
    }
    std::vector<void*> counters;
    std::vector<int32_t> groups;
    for (const gpu::LiveRow& row : live_rows_) {
      counters.push_back(row.counter);
      counter_is_double.push_back(row.is_double);
      groups.push_back(row.group);
    }
    engine.attr("prepare")(rule.name,
                           dtypes == DTypeSet::f64,
                           place,
                           as_bytes(raw),
                           as_bytes(sources),
                           as_bytes(source_is_double),
                           as_bytes(counters),
                           as_bytes(counter_is_double),
                           as_bytes(groups),
                           on.found_inf,
                           blocks,
                           cache);
  }

  void list_rows(int n_states,
                 bool has_sources,
                 std::vector<int64_t>* addresses,
                 std::vector<int64_t>* numels,
                 std::vector<int32_t>* indices) const {
    const size_t n = rows_.size();
    addresses->resize((2 + n_states + has_sources) * n);
    for (size_t i = 0; i < n; ++i) {
      const TableRow& row = *rows_[i];
      (*addresses)[i] = reinterpret_cast<int64_t>(row.param);
      (*addresses)[n + i] = reinterpret_cast<int64_t>(row.grad);
      for (int k = 0; k < n_states; ++k)
        (*addresses)[(2 + k) * n + i] = reinterpret_cast<int64_t>(row.state[k]);
      if (has_sources) (*addresses)[(2 + n_states) * n + i] = reinterpret_cast<int64_t>(row.source);
      numels->push_back(row.numel);
      indices->push_back(row.hyper);
    }
  }

  // n_rows and inner of all rows.
  std::vector<int64_t> list_dimensions() const {
    std::vector<int64_t> found;
    for (const TableRow* row : rows_) found.push_back(row->n_rows);
    for (const TableRow* row : rows_) found.push_back(row->inner);
    return found;
  }

  // saved, or 0, and first_chunk of all rows.
  std::vector<int64_t> list_saved() const {
    std::vector<int64_t> found;
    for (const TableRow* row : rows_) found.push_back(reinterpret_cast<int64_t>(row->saved));
    for (const TableRow* row : rows_) found.push_back(row->first_chunk);
    return found;
  }

  std::vector<const TableRow*> rows_;
  std::vector<gpu::LiveRow> live_rows_;  // beside rows_ when is_live
};

}  // namespace pyoptim
