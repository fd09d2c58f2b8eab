// A plan remembers which tensors a step updates together. Every step re-reads and re-checks all of them: addresses are
// never trusted, because a new tensor may live where an old one was.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "cpu/engine.hpp"
#include "python/tensor_access.hpp"

namespace pyoptim {

namespace py = pybind11;

struct Rule {
  RuleId id;
  const char* const* hyper_names;
  int n_hypers;
  bool counts_steps;
  int n_variants;
  const int* n_states;
  const char* const (*state_names)[kMaxStates];
  int (*variant)(const double* raw);
  PrepareHyper prepare32;
  PrepareHyper prepare64;
};

template <template <class> class R, class T>
void prepare_hyper(const double* raw, double step, bool first, void* hyper) {
  static_assert(sizeof(typename R<T>::Hyper) <= kHyperBytes, "raise kHyperBytes");
  *static_cast<typename R<T>::Hyper*>(hyper) = R<T>::prepare(raw, step, first);
}

template <template <class> class R>
Rule make_rule(RuleId id) {
  using F = R<float>;
  static_assert(F::kHypers <= kMaxHypers, "raise kMaxHypers");
  return {id,         F::kHyperNames, F::kHypers,   F::kCountsSteps,         F::kVariants,
          F::kStates, F::kStateNames, F::variant, prepare_hyper<R, float>, prepare_hyper<R, double>};
}

inline const Rule& find_rule(const std::string& name) {
#define PYOPTIM_FIND(R)                                          \
  if (name == R<float>::kName) {                                 \
    static const Rule rule = make_rule<R>(RuleId::R);            \
    return rule;                                                 \
  }
  PYOPTIM_FOR_EACH_RULE(PYOPTIM_FIND)
#undef PYOPTIM_FIND
  throw py::value_error("no rule named '" + name + "'");
}

// Reads one hyper-parameter, "name" or "name.index", out of a param group.
class HyperReader {
 public:
  explicit HyperReader(const std::string& path) {
    const size_t dot = path.find('.');
    key_ = py::reinterpret_steal<py::object>(PyUnicode_InternFromString(path.substr(0, dot).c_str()));
    index_ = dot == std::string::npos ? -1 : path[dot + 1] - '0';
  }

  double read(PyObject* group) const {
    PyObject* value = PyDict_GetItemWithError(group, key_.ptr());
    if (value == nullptr) missing();
    if (index_ < 0) return number(value);
    const auto item = py::reinterpret_steal<py::object>(PySequence_GetItem(value, index_));
    if (!item) throw py::error_already_set();
    return number(item.ptr());
  }

 private:
  [[noreturn]] void missing() const {
    if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key_.ptr());
    throw py::error_already_set();
  }

  static double number(PyObject* value) {
    if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
    const auto converted = py::reinterpret_steal<py::object>(PyNumber_Float(value));
    if (!converted) throw py::error_already_set();
    return PyFloat_AS_DOUBLE(converted.ptr());
  }

  py::object key_;
  int index_;
};

// The raw hyper-parameters of every group, and the blocks prepared from them for the step counts met so far.
class HyperCache {
 public:
  explicit HyperCache(const Rule& rule) : rule_(rule) {}

  void start(std::vector<std::vector<double>> raw) {
    raw_ = std::move(raw);
    blocks_.clear();
    keys_.clear();
    latest_.assign(raw_.size() * 2, -1);
  }

  const std::vector<double>& raw(int group) const { return raw_[group]; }
  const std::vector<HyperBlock>& blocks() const { return blocks_; }

  int32_t index(int group, double step, bool first, bool is_double) {
    const Key key = {group, step, first, is_double};
    int32_t& latest = latest_[group * 2 + is_double];
    if (latest >= 0 && keys_[latest] == key) return latest;
    keys_.push_back(key);
    blocks_.emplace_back();
    (is_double ? rule_.prepare64 : rule_.prepare32)(raw_[group].data(), step, first, blocks_.back().bytes);
    return latest = static_cast<int32_t>(blocks_.size()) - 1;
  }

 private:
  struct Key {
    int group;
    double step;
    bool first, is_double;
    bool operator==(const Key& o) const {
      return group == o.group && step == o.step && first == o.first && is_double == o.is_double;
    }
  };

  const Rule& rule_;
  std::vector<std::vector<double>> raw_;
  std::vector<Key> keys_;
  std::vector<HyperBlock> blocks_;
  std::vector<int32_t> latest_;  // [group][is_double]
};

struct Row {
  py::object param;
  Py_hash_t hash = 0;
  int group = 0;
  bool active = false;  // false: no gradient was seen yet, so there is no state
  bool first = false;   // the momentum buffer is new
  py::object entry;     // optimizer.state[param], or none when the rule keeps no state
  py::object step;
  py::object states[kMaxStates];
};

// A step counter as users see it: a 0-dim tensor, float32 as torch's, float64 once float32 can no longer count.
class StepCounter {
 public:
  bool read(const py::object& tensor) {
    TensorView view;
    if (!view_of(tensor.ptr(), &view) || view.numel != 1 || !view.is_cpu || view.is_complex || view.data == nullptr) return false;
    is_double_ = view.dtype == DType::f64;
    if (!is_double_ && view.dtype != DType::f32) return false;
    data_ = view.data;
    next_ = (is_double_ ? *static_cast<double*>(data_) : *static_cast<float*>(data_)) + 1.0;
    return is_double_ || next_ < kFloat32Limit;
  }
  double next() const { return next_; }
  void commit() const {
    if (is_double_) {
      *static_cast<double*>(data_) = next_;
    } else if (data_) {
      *static_cast<float*>(data_) = static_cast<float>(next_);
    }
  }

 private:
  static constexpr double kFloat32Limit = 16777216.0;  // 2^24: float32 holds every integer below
  void* data_ = nullptr;
  double next_ = 0;
  bool is_double_ = false;
};

// The rows of one step, filled under the GIL and run without it.
class Table {
 public:
  explicit Table(const Rule& rule) : rule_(rule) {}

  void clear() {
    rows_.clear();
    counters_.clear();
    total_ = 0;
  }

  // False when the tensors have no kernel together; the table is then not to be run.
  bool add(const TensorView& param, const TensorView& grad, const TensorView* states, int variant,
           const StepCounter& counter, int32_t hyper) {
    const int n_states = rule_.n_states[variant];
    const DType state_dtype = n_states ? states[0].dtype : param.dtype;
    const DTypeSet set = dtype_set(param.dtype, state_dtype);
    if (set == DTypeSet::count || !usable(param, param) || !usable(grad, param) || grad.dtype != param.dtype) {
      return false;
    }
    TableRow row = {};
    for (int i = 0; i < n_states; ++i) {
      if (!usable(states[i], param) || states[i].dtype != state_dtype) return false;
      row.state[i] = states[i].data;
    }
    const cpu::KernelTable& kernels = cpu::active_kernels();
    row.param = param.data;
    row.grad = grad.data;
    row.numel = param.numel * (param.is_complex ? 2 : 1);
    row.update = kernels.update[static_cast<int>(rule_.id)][variant][static_cast<int>(set)];
    row.unscale = kernels.unscale[static_cast<int>(param.dtype)];
    row.hyper = hyper;
    total_ += row.numel;
    rows_.push_back(row);
    counters_.push_back(counter);
    return true;
  }

  void run(const HyperCache& hypers, double inv_scale) const {
    cpu::update_rows(rows_, hypers.blocks(), inv_scale);
    for (const StepCounter& counter : counters_) counter.commit();
  }

  int64_t total() const { return total_; }
  size_t size() const { return rows_.size(); }

 private:
  static bool usable(const TensorView& t, const TensorView& like) {
    return t.is_cpu && (t.data || t.numel == 0) && t.is_complex == like.is_complex && is_aligned(t) &&
           (&t == &like ? is_dense(t) : same_layout(t, like));
  }

  const Rule& rule_;
  std::vector<TableRow> rows_;
  std::vector<StepCounter> counters_;
  int64_t total_ = 0;
};

// Gradients held while the GIL is away, so that another thread's zero_grad cannot free them.
class GradHolder {
 public:
  void hold(symbols::Tensor grad) {
    symbols::Tensor copy = nullptr;
    if (symbols::table().new_handle(grad, &copy) == 0) handles_.push_back(copy);
  }
  void hold(py::object grad) { objects_.push_back(std::move(grad)); }
  void clear() {
    for (const symbols::Tensor handle : handles_) (void)symbols::table().delete_handle(handle);
    handles_.clear();
    objects_.clear();
  }
  ~GradHolder() { clear(); }

 private:
  std::vector<symbols::Tensor> handles_;
  std::vector<py::object> objects_;
};

// Below this many elements a step ends before another thread would get its turn (the interpreter switches every 5 ms),
// so the GIL is kept and the gradients need no holding.
constexpr int64_t kKeepGilElements = 1 << 20;

class Plan {
 public:
  // rows: (group, param, entry or None, step or None, (states...), first, active) for every parameter of every group
  // in order; an inactive row is a parameter without a gradient so far. No two parameters may share memory.
  // guards: group keys whose truth is fixed while the plan lives.
  Plan(const std::string& rule, const py::list& param_groups, const py::list& rows, const py::list& guards)
      : rule_(find_rule(rule)), table_(rule_), hypers_(rule_) {
    for (int i = 0; i < rule_.n_hypers; ++i) readers_.emplace_back(rule_.hyper_names[i]);
    for (const py::handle guard : guards) guards_.emplace_back(py::cast<std::string>(guard));
    for (int v = 0; v < rule_.n_variants; ++v) {
      for (int i = 0; i < rule_.n_states[v]; ++i) state_keys_[v][i] = intern(rule_.state_names[v][i]);
    }
    for (const py::handle row : rows) add_row(py::reinterpret_borrow<py::tuple>(row));
    hypers_.start(read_groups(param_groups));
    for (size_t g = 0; g < param_groups.size(); ++g) {
      variants_.push_back(rule_.variant(hypers_.raw(static_cast<int>(g)).data()));
      guard_values_.push_back(read_guards(param_groups[g].ptr()));
    }
  }

  // What the garbage collector needs to see: a hook on a parameter may hold the optimizer that owns this plan.
  int visit(visitproc visit_object, void* arg) const {
    for (const Row& row : rows_) {
      for (const py::object* object : {&row.param, &row.entry, &row.step}) {
        if (const int stop = visit_if(object->ptr(), visit_object, arg)) return stop;
      }
      for (const py::object& state : row.states) {
        if (const int stop = visit_if(state.ptr(), visit_object, arg)) return stop;
      }
    }
    return 0;
  }

  void drop_references() { rows_.clear(); }

  // One step over everything that has a gradient, or nothing at all.
  // False, and nothing has changed, when parameters, state, options or gradients are not those the plan can run.
  bool step(const py::list& param_groups, const py::object& state, double inv_scale) {
    if (running_) throw std::runtime_error("step() of this optimizer is already running in another thread");
    const bool collected = collect(param_groups, state.ptr());
    if (collected && table_.size() > 0) launch(inv_scale);
    grads_.clear();
    return collected;
  }

 private:
  static int visit_if(PyObject* object, visitproc visit_object, void* arg) {
    return object ? visit_object(object, arg) : 0;
  }

  static py::object intern(const char* text) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text));
  }

  void add_row(const py::tuple& fields) {
    Row row;
    row.group = py::cast<int>(fields[0]);
    row.param = fields[1];
    row.entry = fields[2];
    row.step = fields[3];
    const py::tuple states = fields[4];
    for (size_t i = 0; i < states.size(); ++i) row.states[i] = states[i];
    row.first = py::cast<bool>(fields[5]);
    row.active = py::cast<bool>(fields[6]);
    row.hash = PyObject_Hash(row.param.ptr());
    rows_.push_back(std::move(row));
  }

  std::vector<std::vector<double>> read_groups(const py::list& param_groups) const {
    std::vector<std::vector<double>> raw;
    for (const py::handle group : param_groups) {
      raw.emplace_back();
      for (const HyperReader& reader : readers_) raw.back().push_back(reader.read(group.ptr()));
    }
    return raw;
  }

  std::vector<bool> read_guards(PyObject* group) const {
    std::vector<bool> values;
    for (const std::string& key : guards_) {
      PyObject* const value = PyDict_GetItemString(group, key.c_str());
      values.push_back(value && PyObject_IsTrue(value) == 1);
    }
    return values;
  }

  bool collect(const py::list& param_groups, PyObject* state) {
    table_.clear();
    stepped_.clear();
    live_grads_.clear();
    if (param_groups.size() != variants_.size() || !PyDict_Check(state)) return false;
    hypers_.start(read_groups(param_groups));
    size_t row = 0;
    for (size_t g = 0; g < variants_.size(); ++g) {
      PyObject* const group = param_groups[g].ptr();
      if (rule_.variant(hypers_.raw(static_cast<int>(g)).data()) != variants_[g]) return false;
      if (read_guards(group) != guard_values_[g]) return false;
      if (!collect_group(group, static_cast<int>(g), state, &row)) return false;
    }
    return row == rows_.size();
  }

  bool collect_group(PyObject* group, int index, PyObject* state, size_t* next_row) {
    PyObject* const params = PyDict_GetItemWithError(group, params_key_.ptr());
    if (params == nullptr || !PyList_CheckExact(params)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
      if (*next_row == rows_.size()) return false;
      Row& row = rows_[(*next_row)++];
      if (row.param.ptr() != PyList_GET_ITEM(params, i) || row.group != index) return false;
      if (!(symbols::enabled() ? collect_row(row, state) : collect_row_by_dlpack(row, state))) return false;
    }
    return true;
  }

  bool collect_row(Row& row, PyObject* state) {
    const symbols::Tensor grad = symbols::grad_of(symbols::tensor_of(row.param.ptr()));
    if (grad == nullptr) return true;
    TensorView view;
    if (!symbols::view(grad, &view) || symbols::table().is_neg(grad)) return false;
    if (view.is_complex && symbols::table().is_conj(grad)) return false;
    live_grads_.push_back(grad);
    return add(row, view, state);
  }

  bool collect_row_by_dlpack(Row& row, PyObject* state) {
    py::object grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(row.param.ptr(), grad_key_.ptr()));
    if (!grad) throw py::error_already_set();
    if (grad.is_none()) return true;
    TensorView view;
    if (!dlpack::view(grad.ptr(), &view)) return false;
    if (py::cast<bool>(grad.attr("is_neg")()) || (view.is_complex && py::cast<bool>(grad.attr("is_conj")()))) {
      return false;
    }
    grads_.hold(std::move(grad));
    return add(row, view, state);
  }

  bool add(Row& row, const TensorView& grad, PyObject* state) {
    if (!row.active) return false;
    TensorView param, states[kMaxStates];
    if (!view_of(row.param.ptr(), &param)) return false;
    const int variant = variants_[row.group];
    StepCounter counter;
    if (!row.entry.is_none()) {
      if (!entry_is_current(row, variant, state)) return false;
      if (rule_.counts_steps && !counter.read(row.step)) return false;
    }
    for (int i = 0; i < rule_.n_states[variant]; ++i) {
      if (!view_of(row.states[i].ptr(), &states[i])) return false;
    }
    const int32_t hyper = hypers_.index(row.group, counter.next(), row.first, param.dtype == DType::f64);
    if (!table_.add(param, grad, states, variant, counter, hyper)) return false;
    stepped_.push_back(&row);
    return true;
  }

  // optimizer.state[param] and what it holds are still the objects of the plan.
  bool entry_is_current(const Row& row, int variant, PyObject* state) const {
    if (_PyDict_GetItem_KnownHash(state, row.param.ptr(), row.hash) != row.entry.ptr()) return false;
    PyObject* const entry = row.entry.ptr();
    if (rule_.counts_steps && PyDict_GetItemWithError(entry, step_key_.ptr()) != row.step.ptr()) return false;
    for (int i = 0; i < rule_.n_states[variant]; ++i) {
      if (PyDict_GetItemWithError(entry, state_keys_[variant][i].ptr()) != row.states[i].ptr()) return false;
    }
    return true;
  }

  void launch(double inv_scale) {
    bump_versions(inv_scale != 1.0);
    running_ = true;
    if (table_.total() < kKeepGilElements) {
      table_.run(hypers_, inv_scale);
    } else {
      for (const symbols::Tensor grad : live_grads_) grads_.hold(grad);
      const py::gil_scoped_release unlocked;
      table_.run(hypers_, inv_scale);
    }
    running_ = false;
    for (Row* row : stepped_) row->first = false;
  }

  // Before anything is written, because torch refuses some tensors here (inference tensors) by an exception.
  void bump_versions(bool with_grads) const {
    if (symbols::enabled()) {
      for (const Row* row : stepped_) symbols::table().bump_version(symbols::tensor_of(row->param.ptr()));
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
  Table table_;
  HyperCache hypers_;
  GradHolder grads_;
  bool running_ = false;
  std::vector<HyperReader> readers_;
  std::vector<std::string> guards_;
  std::vector<int> variants_;                   // [group]
  std::vector<std::vector<bool>> guard_values_;  // [group][guard]
  std::vector<Row> rows_;
  std::vector<Row*> stepped_;
  std::vector<symbols::Tensor> live_grads_;  // borrowed from the parameters
  py::object state_keys_[kMaxVariants][kMaxStates];
  const py::object params_key_ = intern("params"), grad_key_ = intern("grad"), step_key_ = intern("step");
};

}  // namespace pyoptim
