// A plan remembers which tensors a step updates together. Every step re-reads and re-checks all of
// them: addresses are never trusted, because a new tensor may live where an old one was.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "cpu/engine.hpp"
#include "python/bucket.hpp"
#include "python/held.hpp"
#include "python/rule.hpp"

namespace pyoptim {

namespace py = pybind11;

inline bool is_usable(const TensorView& t, const TensorView& like) {
  return (t.data || t.numel == 0) && same_device(t, like) && t.is_complex == like.is_complex &&
         is_aligned(t) && same_layout(t, like);
}

// Whether the engine reaches the tensor's memory.
inline bool is_reachable(Backend backend, const TensorView& t) {
  if (backend == Backend::cuda && gpu::loaded_api() && gpu::api().is_emulated) return t.is_cpu;
  if (backend == Backend::cuda) return gpu::loaded_api() && t.cuda >= 0;
  return backend == Backend::cpu ? t.is_cpu : t.is_cpu || t.cuda >= 0;
}

// All of a row but its gradient and hyper-parameters. False when the tensors have no kernel
// together.
inline bool prepare_row(const Rule& rule,
                        int variant,
                        const TensorView& param,
                        const TensorView* states,
                        TableRow* row,
                        DTypeSet* dtypes) {
  const int n_states = rule.n_states[variant];
  const DType state_dtype = n_states ? states[0].dtype : param.dtype;
  const DTypeSet set = *dtypes = dtype_set(param.dtype, state_dtype);
  if (set == DTypeSet::count || !is_usable(param, param) || !is_dense(param)) return false;
  for (int i = 0; i < n_states; ++i) {
    if (!is_usable(states[i], param) || states[i].dtype != state_dtype) return false;
    row->state[i] = states[i].data;
  }
  const cpu::KernelTable& kernels = cpu::active_kernels();
  row->param = param.data;
  row->numel = param.numel * (param.is_complex ? 2 : 1);
  row->update = kernels.update[static_cast<int>(rule.id)][variant][static_cast<int>(set)];
  row->unscale = kernels.unscale[static_cast<int>(param.dtype)];
  return true;
}

// The CPU engine's rows of one step, filled under the GIL and run without it.
struct Table {
  std::vector<const TableRow*> rows;
  std::vector<const StepCounter*> counters;
  int64_t total = 0;

  void clear() {
    rows.clear();
    counters.clear();
    total = 0;
  }
  void add(const TableRow& row, const StepCounter& counter) {
    total += row.numel;
    rows.push_back(&row);
    counters.push_back(&counter);
  }
  void run(const HyperCache& hypers, double inv_scale) const {
    cpu::update_rows(rows, hypers.blocks(), inv_scale);
    for (const StepCounter* counter : counters) counter->advance();
  }
};

// One parameter as the plan was made for it. Flat and hot fields first: a step walks thousands and
// waits for memory.
struct Row {
  py::object param;
  DictGuard entry;  // optimizer.state[param]; empty when the rule keeps no state
  int32_t group = 0;
  int16_t n_states = 0;
  int16_t bucket = -1;     // of the plan; -1: the CPU engine
  int8_t state_width = 0;  // bytes of one element
  Backend backend = Backend::cpu;
  bool active = false;     // false: no gradient was seen yet, so there is no state
  bool first = false;      // the momentum buffer is new
  bool is_live = false;    // kernels read and advance its counter
  TensorView layout = {};  // of param; sizes and strides point below
  int64_t dims[2 * symbols::kInlineDims];
  TableRow table_row = {};  // with the addresses of param and states
  StepCounter counter;
  std::vector<HeldTensor> held;
  std::vector<int64_t> many_dims;

  void hold(py::object tensor, bool is_counter) {
    held.emplace_back(std::move(tensor), is_counter);
  }

  // False when the tensors cannot run as they are.
  bool bind(const Rule& rule, int variant, DTypeSet* dtypes) {
    n_states = static_cast<int16_t>(rule.n_states[variant]);
    TensorView view, states[kMaxStates];
    if (!view_of(param.ptr(), &view)) return false;
    for (int i = 0; i < n_states; ++i) {
      if (!view_of(held[i].ptr(), &states[i])) return false;
    }
    const bool has_counter = held.size() > static_cast<size_t>(n_states);
    if (has_counter && !counter.bind(held[n_states].ptr(), is_live, view)) return false;
    remember_layout(view);
    if (n_states > 0) state_width = item_size(states[0].dtype);
    return is_reachable(backend, view) &&
           prepare_row(rule, variant, view, states, &table_row, dtypes);
  }

  // The tensors are where they were, so what was checked for them still holds.
  bool is_current() {
    TensorView view;
    const bool readable = symbols::enabled()
                              ? symbols::view_memory(symbols::tensor_of(param.ptr()), &view)
                              : dlpack::view(param.ptr(), &view);
    if (!readable || is_lazy(param) || view.data != layout.data || view.dtype != layout.dtype ||
        !same_layout(view, layout))
      return false;
    if (view.is_complex != layout.is_complex || (entry && !entry.holds())) return false;
    for (const HeldTensor& tensor : held) {
      if (!tensor.is_current(layout)) return false;
    }
    return counter.can_count();
  }

  // Adds all that a step of this row writes.
  void list_memory(WrittenMemory* written) const {
    const int64_t width = item_size(layout.dtype);
    written->add(storage_of(param.ptr()), table_row.param, table_row.numel * width);
    for (int i = 0; i < n_states; ++i) {
      written->add(storage_of(held[i].ptr()), table_row.state[i], table_row.numel * state_width);
    }
  }

 private:
  void remember_layout(const TensorView& view) {
    int64_t* to = dims;
    if (view.ndim > symbols::kInlineDims) {
      many_dims.resize(2 * view.ndim);
      to = many_dims.data();
    }
    std::copy(view.sizes, view.sizes + view.ndim, to);
    std::copy(view.strides, view.strides + view.ndim, to + view.ndim);
    layout = view;
    layout.sizes = to;
    layout.strides = to + view.ndim;
  }
};

// Below this many elements a step ends before another thread would get its turn (the interpreter
// switches every 5 ms), so the GIL is kept and the gradients need no holding.
constexpr int64_t kKeepGilElements = 1 << 20;

class Plan {
 public:
  // rows: (group, param, state dict or None, (states...), step or None, first, active, backend,
  // live) for every parameter of every group in order; an inactive row is a parameter without a
  // gradient so far. No two parameters may share memory. guards: group keys whose truth is fixed
  // while the plan lives. memory: the pyoptim.gpu.Memory of the optimizer.
  Plan(const std::string& rule,
       const py::list& param_groups,
       const py::dict& state,
       const py::list& rows,
       const py::list& guards,
       const py::object& memory)
      : rule_(find_rule(rule)),
        hypers_(rule_),
        kernels_(&cpu::active_kernels()),
        api_(gpu::loaded_api()),
        memory_(memory),
        state_(state.ptr()) {
    for (int i = 0; i < rule_.n_hypers; ++i) readers_.emplace_back(rule_.hyper_names[i]);
    for (const py::handle guard : guards)
      guards_.push_back(py::reinterpret_borrow<py::object>(guard));
    find_live_groups(rows, param_groups.size());
    const RawHypers raw = read_groups(param_groups);
    for (size_t g = 0; g < param_groups.size(); ++g) {
      variants_.push_back(rule_.variant(raw[g].data()));
      guard_values_.push_back(read_guards(param_groups[g].ptr()));
    }
    rows_.reserve(rows.size());  // rows point into themselves and must not move
    for (const py::handle row : rows) add_row(py::reinterpret_borrow<py::tuple>(row));
    written_.sort();
  }

  // What the garbage collector needs to see: a hook on a parameter may hold the optimizer that owns
  // this plan.
  int visit(visitproc visit_object, void* arg) const {
    if (const int stop = state_.visit(visit_object, arg)) return stop;
    for (const Row& row : rows_) {
      if (const int stop = visit_object(row.param.ptr(), arg)) return stop;
      if (const int stop = row.entry.visit(visit_object, arg)) return stop;
      for (const HeldTensor& tensor : row.held) {
        if (const int stop = visit_object(tensor.ptr(), arg)) return stop;
      }
    }
    return 0;
  }

  void drop_references() {
    rows_.clear();
    state_ = DictGuard();
  }

  // Whether no row needs the host to know a loss scale or a clip factor.
  bool is_on_gpu() const { return is_on_gpu_; }

  // CUDA indices of the GPU engines' rows, -1 for those in the CPU's memory.
  std::vector<int32_t> devices() const {
    std::vector<int32_t> found;
    for (const Bucket& bucket : buckets_) {
      if (std::find(found.begin(), found.end(), bucket.device) == found.end())
        found.push_back(bucket.device);
    }
    return found;
  }

  // One step over everything that has a gradient, or nothing at all: false, and nothing has
  // changed, when parameters, state, options or gradients are not those the plan was made for.
  // devices: None, or {CUDA index: (grad_scale, found_inf, clip)}, each None or a tensor.
  bool step(const py::list& param_groups,
            const py::object& state,
            double inv_scale,
            double clip,
            const py::object& devices,
            bool bumps_versions) {
    if (running_)
      throw std::runtime_error("step() of this optimizer is already running in another thread");
    read_factors(inv_scale, clip, devices);
    const bool collected = collect(param_groups, state.ptr());
    if (collected && has_work()) launch(bumps_versions);
    grads_.clear();
    return collected;
  }

 private:
  void add_row(const py::tuple& fields) {
    rows_.emplace_back();
    Row& row = rows_.back();
    row.group = py::cast<int>(fields[0]);
    row.param = fields[1];
    row.held.reserve(kMaxHeld);
    for (const py::handle state : py::tuple(fields[3]))
      row.hold(py::reinterpret_borrow<py::object>(state), false);
    const py::object entry = fields[2], counter = fields[4];
    if (!entry.is_none()) row.entry = DictGuard(entry.ptr());
    if (!counter.is_none()) row.hold(counter, true);
    row.first = py::cast<bool>(fields[5]);
    row.active = py::cast<bool>(fields[6]);
    row.backend = static_cast<Backend>(py::cast<int>(fields[7]));
    row.is_live = py::cast<bool>(fields[8]);
    if (row.active) bind_row(row);
  }

  void bind_row(Row& row) {
    DTypeSet dtypes = DTypeSet::count;
    const int variant = variants_[row.group];
    is_usable_ = row.bind(rule_, variant, &dtypes) && is_usable_;
    row.list_memory(&written_);
    is_on_gpu_ = is_on_gpu_ && row.backend != Backend::cpu;
    if (row.backend == Backend::cpu || !is_usable_) return;
    Bucket bucket = {};
    bucket.backend = row.backend;
    bucket.device = row.layout.cuda;
    bucket.variant = variant;
    bucket.dtypes = dtypes;
    bucket.is_live = row.is_live;
    const auto same = [&](const Bucket& other) { return other.holds(bucket); };
    const auto found = std::find_if(buckets_.begin(), buckets_.end(), same);
    row.bucket = static_cast<int16_t>(found - buckets_.begin());
    if (found == buckets_.end()) buckets_.push_back(bucket);
  }

  void find_live_groups(const py::list& rows, size_t n_groups) {
    is_live_group_.assign(n_groups, false);
    for (const py::handle fields : rows) {
      const auto row = py::reinterpret_borrow<py::tuple>(fields);
      if (py::cast<bool>(row[8])) is_live_group_[py::cast<size_t>(row[0])] = true;
    }
  }

  RawHypers read_groups(const py::list& param_groups) {
    RawHypers raw(param_groups.size());
    sources_.clear();
    for (size_t g = 0; g < raw.size(); ++g) {
      for (size_t i = 0; i < readers_.size(); ++i) {
        const HyperValue value = readers_[i].read(param_groups[g].ptr(), is_live_group_[g]);
        raw[g].push_back(value.number);
        if (value.tensor)
          sources_.push_back({static_cast<int>(g), static_cast<int>(i), value.tensor});
      }
    }
    return raw;
  }

  std::vector<bool> read_guards(PyObject* group) const {
    std::vector<bool> values;
    for (const py::object& key : guards_) {
      PyObject* const value = PyDict_GetItemWithError(group, key.ptr());
      values.push_back(value && PyObject_IsTrue(value) == 1);
    }
    return values;
  }

  void read_factors(double inv_scale, double clip, const py::object& devices) {
    factors_ = {inv_scale, clip, {}};
    if (devices.is_none()) return;
    for (const auto& [device, tensors] : py::cast<py::dict>(devices)) {
      const auto fields = py::reinterpret_borrow<py::tuple>(tensors);
      factors_.devices.push_back({py::cast<int32_t>(device), fields[0], fields[1], fields[2]});
    }
  }

  bool has_work() const {
    return !table_.rows.empty() ||
           std::any_of(
               buckets_.begin(), buckets_.end(), [](const Bucket& b) { return !b.empty(); });
  }

  bool collect(const py::list& param_groups, PyObject* state) {
    table_.clear();
    for (Bucket& bucket : buckets_) bucket.clear();
    stepped_.clear();
    live_grads_.clear();
    if (!is_usable_ || kernels_ != &cpu::active_kernels() || api_ != gpu::loaded_api() ||
        param_groups.size() != variants_.size())
      return false;
    if (!state_.holds(state)) return false;
    hypers_.start(read_groups(param_groups), factors_.clip);
    waits_for_device_.assign(variants_.size(), false);
    for (const LiveSource& source : sources_) waits_for_device_[source.group] = true;
    size_t row = 0;
    for (size_t g = 0; g < variants_.size(); ++g) {
      PyObject* const group = param_groups[g].ptr();
      if (rule_.variant(hypers_.raw()[g].data()) != variants_[g]) return false;
      if (read_guards(group) != guard_values_[g] ||
          !collect_group(group, static_cast<int>(g), &row))
        return false;
    }
    return row == rows_.size();
  }

  bool collect_group(PyObject* group, int index, size_t* next_row) {
    PyObject* const params = PyDict_GetItemWithError(group, params_key_.ptr());
    if (params == nullptr || !PyList_CheckExact(params)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
      if (*next_row == rows_.size()) return false;
      Row& row = rows_[(*next_row)++];
      if (row.param.ptr() != PyList_GET_ITEM(params, i) || row.group != index) return false;
      if (!(symbols::enabled() ? collect_row(row) : collect_row_by_dlpack(row))) return false;
    }
    return true;
  }

  bool collect_row(Row& row) {
    const symbols::Tensor grad = symbols::grad_of(symbols::tensor_of(row.param.ptr()));
    if (grad == nullptr) return true;
    TensorView view;
    if (!symbols::view(grad, &view) || is_lazy(grad)) return false;
    if (!symbols::holds_all(grad, view)) return false;
    live_grads_.push_back(grad);
    return add(row, view, symbols::storage_of(*static_cast<void* const* const*>(grad)));
  }

  bool collect_row_by_dlpack(Row& row) {
    py::object grad = row.param.attr("grad");
    if (grad.is_none()) return true;
    TensorView view;
    if (!dlpack::view(grad.ptr(), &view) || is_lazy(grad)) return false;
    grads_.hold(std::move(grad));
    return add(row, view, nullptr);
  }

  bool add(Row& row, const TensorView& grad, const void* storage) {
    if (!row.active || !row.is_current()) return false;
    if (grad.dtype != row.layout.dtype || !is_usable(grad, row.layout)) return false;
    const int64_t bytes = row.table_row.numel * item_size(grad.dtype);
    if (written_.overlaps(storage, grad.data, bytes)) return false;
    if (!row.is_live && waits_for_device_[row.group]) return false;
    // What the host counts cannot be taken back when the device finds an infinity.
    if (!row.is_live && factors_.skips() && rule_.is_counted(variants_[row.group])) return false;
    row.table_row.grad = grad.data;
    if (!row.is_live) {
      row.table_row.hyper = hypers_.index(row.group,
                                          row.counter.next(),
                                          row.first,
                                          row.layout.dtype == DType::f64,
                                          row.backend == Backend::cpu);
    }
    if (row.bucket < 0) {
      table_.add(row.table_row, row.counter);
    } else {
      buckets_[row.bucket].add(row.table_row, row.counter, row.group);
    }
    stepped_.push_back(&row);
    return true;
  }

  void launch(bool bumps_versions) {
    const bool keeps_gil = table_.total < kKeepGilElements;
    for (size_t i = 0; !keeps_gil && i < live_grads_.size(); ++i) grads_.hold(live_grads_[i]);
    if (bumps_versions) bump_versions(factors_.unscales());
    running_ = true;
    try {
      launch_buckets();
    } catch (...) {
      running_ = false;
      throw;
    }
    if (keeps_gil) {
      table_.run(hypers_, factors_.inv_scale);
    } else {
      const py::gil_scoped_release unlocked;
      table_.run(hypers_, factors_.inv_scale);
    }
    running_ = false;
    for (Row* row : stepped_) row->first = false;
  }

  void launch_buckets() {
    for (size_t slot = 0; slot < buckets_.size(); ++slot) {
      const Bucket& bucket = buckets_[slot];
      if (bucket.empty()) continue;
      const LiveGroups live = bucket.is_live ? live_groups(bucket.device) : LiveGroups();
      bucket.launch(rule_, hypers_, live, factors_, memory_, static_cast<int>(slot));
    }
    for (const Row* row : stepped_) {
      if (row->bucket >= 0) row->counter.advance();
    }
  }

  LiveGroups live_groups(int32_t device) const {
    LiveGroups live;
    for (const std::vector<double>& raw : hypers_.raw()) {
      live.groups.emplace_back();
      std::copy(raw.begin(), raw.end(), live.groups.back().raw);
    }
    for (const LiveSource& source : sources_) {
      // A tensor of another device, or dtype: its copy is in the order of the streams.
      live.copies.push_back(memory_.attr("on_device")(
          py::handle(source.tensor), readers_[source.hyper].key(), device));
      TensorView view;
      if (!view_of(live.copies.back().ptr(), &view)) throw std::bad_alloc();
      live.groups[source.group].source[source.hyper] = view.data;
      live.groups[source.group].is_double[source.hyper] = view.dtype == DType::f64;
    }
    return live;
  }

  // Before anything is written, because torch refuses some tensors here (inference tensors) by an
  // exception.
  void bump_versions(bool with_grads) const {
    if (symbols::enabled()) {
      for (const Row* row : stepped_)
        symbols::table().bump_version(symbols::tensor_of(row->param.ptr()));
      if (!with_grads) return;
      for (const symbols::Tensor grad : live_grads_) symbols::table().bump_version(grad);
      return;
    }
    py::list written;
    for (const Row* row : stepped_) written.append(row->param);
    if (with_grads) {
      for (const Row* row : stepped_) written.append(row->param.attr("grad"));
    }
    py::module_::import("torch.autograd.graph").attr("increment_version")(written);
  }

  const Rule& rule_;
  HyperCache hypers_;
  Table table_;
  std::vector<Bucket> buckets_;
  StepFactors factors_;
  GradHolder grads_;
  const cpu::KernelTable* const kernels_;
  const gpu::Api* const api_;
  py::object memory_;
  bool is_usable_ = true;
  bool is_on_gpu_ = true;
  bool running_ = false;
  std::vector<HyperReader> readers_;
  std::vector<py::object> guards_;
  std::vector<int> variants_;                    // [group]
  std::vector<bool> is_live_group_;              // [group]: some row of it is live
  std::vector<std::vector<bool>> guard_values_;  // [group][guard]
  std::vector<LiveSource> sources_;              // of this step
  std::vector<bool> waits_for_device_;           // [group]: has such a source
  DictGuard state_;  // optimizer.state, which holds the dicts of the rows' guards
  std::vector<Row> rows_;
  WrittenMemory written_;
  std::vector<Row*> stepped_;
  std::vector<symbols::Tensor> live_grads_;  // borrowed from the parameters
  const py::object params_key_ =
      py::reinterpret_steal<py::object>(PyUnicode_InternFromString("params"));
};

}  // namespace pyoptim
