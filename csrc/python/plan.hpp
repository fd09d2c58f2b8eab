// A plan remembers which tensors a step updates together. Every step re-reads and re-checks all of
// them: addresses are never trusted, because a new tensor may live where an old one was.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "cpu/engine.hpp"
#include "python/held.hpp"
#include "python/work.hpp"

namespace pyoptim {

namespace py = pybind11;

// One parameter as the plan was made for it. Flat, because a step walks thousands and waits for
// memory.
struct Row : StepRow {
  py::object param;
  DictGuard entry;  // optimizer.state[param]; empty when the rule keeps no state
  int16_t n_states = 0;
  int8_t state_width = 0;  // bytes of one element
  bool has_master = false;
  bool active = false;     // false: no gradient was seen yet, so there is no state
  TensorView layout = {};  // of param; sizes and strides point below
  int64_t dims[2 * symbols::kInlineDims];
  std::vector<HeldTensor> held;
  std::vector<int64_t> many_dims;

  void hold(py::object tensor, bool is_counter) {
    held.emplace_back(std::move(tensor), is_counter);
    has_counter_ = has_counter_ || is_counter;
  }

  // False when the tensors cannot run as they are.
  bool bind(const Rule& rule, int variant, DTypeSet* dtypes) {
    n_states = static_cast<int16_t>(rule.n_states[variant]);
    TensorView view, states[kMaxStates + 1];
    const int n_given = static_cast<int>(held.size()) - has_counter_;
    has_master = n_given > n_states;
    if (!view_of(param.ptr(), &view) || n_given < n_states || n_given > n_states + 1) return false;
    for (int i = 0; i < n_given; ++i) {
      if (!view_of(held[i].ptr(), &states[i])) return false;
    }
    if (has_counter_ && !counter.bind(held[n_given].ptr(), is_live, view)) return false;
    remember_layout(view);
    if (n_states > 0) state_width = item_size(states[0].dtype);
    return is_reachable(backend, view) &&
           prepare_row(rule, variant, view, states, has_master, &table_row, dtypes);
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
    if (has_master) {
      const int64_t bytes = table_row.numel * item_size(DType::f32);
      written->add(storage_of(held[n_states].ptr()), table_row.master, bytes);
    }
  }

 private:
  bool has_counter_ = false;

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

// Lists beside the parameters of all groups in order; null: there is none.
struct PlanLists {
  PyObject* sources;  // a copy of the parameter, from which it is read, or None
  PyObject* grads;    // in the place of the parameter's own, or None for no gradient
  PyObject* saved;    // what a sum's update keeps the parameter in, or None where there is a master

  bool all_of(size_t n) const {
    for (PyObject* const list : {sources, grads, saved}) {
      if (list && !(PyList_CheckExact(list) && static_cast<size_t>(PyList_GET_SIZE(list)) == n))
        return false;
    }
    return true;
  }
  static PyObject* or_null(const py::object& list) { return list.is_none() ? nullptr : list.ptr(); }
};

// Below this many elements a step ends before another thread would get its turn (the interpreter
// switches every 5 ms), so the GIL is kept and the gradients need no holding.
constexpr int64_t kKeepGilElements = 1 << 20;

class Plan {
 public:
  // rows: (param, (states..., master if any), step or None, group, first, engine, live, state dict
  // or None, active) for every parameter of every group in order; an inactive row is a parameter
  // without a gradient so far. No two parameters may share memory. guards: group keys whose truth
  // is fixed while the plan lives. memory: the pyoptim.gpu.Memory of the optimizer.
  Plan(const std::string& rule,
       const py::list& param_groups,
       const py::dict& state,
       const std::vector<py::tuple>& rows,
       const py::list& guards,
       const py::object& memory)
      : work_(find_rule(rule), memory),
        kernels_(&cpu::active_kernels()),
        api_(gpu::loaded_api()),
        state_(state.ptr()) {
    for (const py::handle guard : guards)
      guards_.push_back(py::reinterpret_borrow<py::object>(guard));
    for (const py::tuple& row : rows) {
      const auto backend = static_cast<Backend>(py::cast<int>(row[5]));
      work_.expect(py::cast<size_t>(row[3]), backend, py::cast<bool>(row[6]));
    }
    work_.start(param_groups, 1.0, 1.0, py::none());
    for (size_t g = 0; g < param_groups.size(); ++g) {
      variants_.push_back(work_.variant(static_cast<int>(g)));
      guard_values_.push_back(read_guards(param_groups[g].ptr()));
    }
    rows_.reserve(rows.size());  // rows point into themselves and must not move
    for (const py::tuple& row : rows) add_row(row);
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

  std::vector<int32_t> devices() const { return work_.devices(); }

  // One step over everything that has a gradient, or nothing at all: false, and nothing has
  // changed, when parameters, state, options, gradients or lists are not such as the plan was made
  // for. sources, grads, saved: as in PlanLists, or None.
  bool step(const py::list& param_groups, const py::object& state, const py::object& sources) {
    const py::none none;
    return scaled_step(param_groups, state, 1.0, 1.0, none, sources, none, none, none);
  }

  // The factors are as in Work::start; sum as in SumPlace.
  bool scaled_step(const py::list& param_groups,
                   const py::object& state,
                   double inv_scale,
                   double clip,
                   const py::object& devices,
                   const py::object& sources,
                   const py::object& grads,
                   const py::object& saved,
                   const py::object& sum) {
    if (running_)
      throw std::runtime_error("step() of this optimizer is already running in another thread");
    if (counts_for_gpu_) work_.memory().attr("check_not_capturing")();
    stepped_.clear();
    live_grads_.clear();
    lists_ = {PlanLists::or_null(sources), PlanLists::or_null(grads), PlanLists::or_null(saved)};
    sum_ = SumPlace(work_.rule(), sum);
    const bool collected = is_valid(param_groups, state.ptr()) &&
                           collect(param_groups, inv_scale, clip, devices) &&
                           (!sum_ || work_.can_sum(sum_));
    if (collected && (sum_ || !work_.empty())) launch();
    sum_ = SumPlace();
    grads_.clear();
    return collected;
  }

 private:
  void add_row(const py::tuple& fields) {
    rows_.emplace_back();
    Row& row = rows_.back();
    row.param = fields[0];
    row.held.reserve(kMaxHeld);
    for (const py::handle state : py::tuple(fields[1]))
      row.hold(py::reinterpret_borrow<py::object>(state), false);
    const py::object counter = fields[2], entry = fields[7];
    if (!counter.is_none()) row.hold(counter, true);
    row.group = py::cast<int>(fields[3]);
    row.first = py::cast<bool>(fields[4]);
    row.backend = static_cast<Backend>(py::cast<int>(fields[5]));
    row.is_live = py::cast<bool>(fields[6]);
    if (!entry.is_none()) row.entry = DictGuard(entry.ptr());
    row.active = py::cast<bool>(fields[8]);
    if (!row.active) return;
    DTypeSet dtypes = DTypeSet::count;
    is_usable_ = row.bind(work_.rule(), variants_[row.group], &dtypes) && is_usable_;
    if (is_usable_) work_.place(&row, dtypes, row.layout.cuda);
    row.list_memory(&written_);
    is_on_gpu_ = is_on_gpu_ && row.backend != Backend::cpu;
    counts_for_gpu_ |= row.layout.cuda >= 0 && work_.rule().counts_steps && !row.is_live;
  }

  std::vector<bool> read_guards(PyObject* group) const {
    std::vector<bool> values;
    for (const py::object& key : guards_) {
      PyObject* const value = PyDict_GetItemWithError(group, key.ptr());
      values.push_back(value && PyObject_IsTrue(value) == 1);
    }
    return values;
  }

  bool is_valid(const py::list& param_groups, PyObject* state) {
    return is_usable_ && kernels_ == &cpu::active_kernels() && api_ == gpu::loaded_api() &&
           param_groups.size() == variants_.size() && state_.holds(state) &&
           lists_.all_of(rows_.size());
  }

  bool collect(const py::list& param_groups,
               double inv_scale,
               double clip,
               const py::object& devices) {
    work_.start(param_groups, inv_scale, clip, devices);
    size_t row = 0;
    for (size_t g = 0; g < variants_.size(); ++g) {
      PyObject* const group = param_groups[g].ptr();
      const int index = static_cast<int>(g);
      if (work_.variant(index) != variants_[g] || read_guards(group) != guard_values_[g] ||
          !collect_group(group, index, &row))
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
      const bool is_collected = lists_.grads         ? collect_row_from_list(row)
                                : symbols::enabled() ? collect_row(row)
                                                     : collect_row_by_dlpack(row);
      if (!is_collected) return false;
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

  PyObject* listed(PyObject* list, const Row& row) const {
    return list ? PyList_GET_ITEM(list, &row - rows_.data()) : Py_None;
  }

  // The caller's list holds the gradients.
  bool collect_row_from_list(Row& row) {
    PyObject* const grad = listed(lists_.grads, row);
    if (grad == Py_None) return true;
    TensorView view;
    if (!is_tensor(grad) || !view_of(grad, &view) || is_lazy(py::handle(grad))) return false;
    if (symbols::enabled() && !symbols::holds_all(symbols::tensor_of(grad), view)) return false;
    return add(row, view, storage_of(grad));
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
    if (written_.overlaps(storage, grad.data, bytes) || !find_source(row, bytes)) return false;
    row.table_row.saved = nullptr;
    if (sum_ && !find_copy(listed(lists_.saved, row), row, bytes, &row.table_row.saved))
      return false;
    row.table_row.grad = grad.data;
    stepped_.push_back(&row);
    return work_.add(&row) && (!sum_ || row.has_sum());
  }

  bool find_source(Row& row, int64_t bytes) const {
    TableRow& to = row.table_row;
    to.source = row.has_master ? to.master : to.param;
    PyObject* const source = listed(lists_.sources, row);
    if (source == Py_None) return true;
    if (row.has_master) return false;  // which is a copy of its own
    void* found = nullptr;
    if (!find_copy(source, row, bytes, &found)) return false;
    to.source = found;
    return true;
  }

  // Where a copy of the row's parameter lies; null for None. False where the kernels cannot use it.
  bool find_copy(PyObject* copy, const Row& row, int64_t bytes, void** found) const {
    *found = nullptr;
    if (copy == Py_None) return true;
    TensorView view;
    if (!is_tensor(copy) || !view_of(copy, &view) || is_lazy(py::handle(copy)) ||
        view.dtype != row.layout.dtype || !is_usable(view, row.layout) ||
        (symbols::enabled() && !symbols::holds_all(symbols::tensor_of(copy), view)) ||
        written_.overlaps(storage_of(copy), view.data, bytes)) {
      return false;
    }
    *found = view.data;
    return true;
  }

  void launch() {
    const bool keeps_gil = work_.host_elements() < kKeepGilElements;
    for (size_t i = 0; !keeps_gil && i < live_grads_.size(); ++i) grads_.hold(live_grads_[i]);
    bump_versions(work_.factors().unscales());
    work_.launch_gpu(sum_);
    running_ = true;
    if (keeps_gil) {
      work_.run_cpu(sum_);
    } else {
      const py::gil_scoped_release unlocked;
      work_.run_cpu(sum_);
    }
    running_ = false;
    for (Row* row : stepped_) {
      row->first = false;
      if (row->bucket >= 0 && work_.rule().writes_states) row->counter.advance();
    }
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

  Work work_;
  GradHolder grads_;
  const cpu::KernelTable* const kernels_;
  const gpu::Api* const api_;
  bool is_usable_ = true;
  bool is_on_gpu_ = true;
  bool counts_for_gpu_ = false;  // a graph would make the same step number again and again
  bool running_ = false;
  std::vector<py::object> guards_;
  std::vector<int> variants_;                    // [group]
  std::vector<std::vector<bool>> guard_values_;  // [group][guard]
  DictGuard state_;  // optimizer.state, which holds the dicts of the rows' guards
  std::vector<Row> rows_;
  WrittenMemory written_;
  std::vector<Row*> stepped_;
  std::vector<symbols::Tensor> live_grads_;  // borrowed from the parameters
  PlanLists lists_ = {};                     // of this step; the caller's
  SumPlace sum_;                             // of this step
  const py::object params_key_ =
      py::reinterpret_steal<py::object>(PyUnicode_InternFromString("params"));
};

}  // namespace pyoptim
