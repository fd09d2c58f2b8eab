// A plan remembers which tensors a step updates together. Every step re-reads and re-checks all of
// them: addresses are never trusted, because a new tensor may live where an old one was.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
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
  return {id,
          F::kHyperNames,
          F::kHypers,
          F::kCountsSteps,
          F::kVariants,
          F::kStates,
          F::kStateNames,
          F::variant,
          prepare_hyper<R, float>,
          prepare_hyper<R, double>};
}

inline const Rule& find_rule(const std::string& name) {
#define PYOPTIM_FIND(R)                               \
  if (name == R<float>::kName) {                      \
    static const Rule rule = make_rule<R>(RuleId::R); \
    return rule;                                      \
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
    key_ =
        py::reinterpret_steal<py::object>(PyUnicode_InternFromString(path.substr(0, dot).c_str()));
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

// The raw hyper-parameters of every group, and the blocks prepared from them for the step counts
// met so far.
class HyperCache {
 public:
  explicit HyperCache(const Rule& rule) : rule_(rule) {}

  void start(std::vector<std::vector<double>> raw) {
    raw_ = std::move(raw);
    blocks_.clear();
    latest_.assign(raw_.size() * 2, Latest());
  }

  const std::vector<double>& raw(int group) const { return raw_[group]; }
  const std::vector<HyperBlock>& blocks() const { return blocks_; }

  // Rows of one group share a block as long as they share the step count, as nearly all do.
  int32_t index(int group, double step, bool first, bool is_double) {
    Latest& latest = latest_[group * 2 + is_double];
    if (latest.step != step || latest.first != first) {
      blocks_.emplace_back();
      const PrepareHyper prepare = is_double ? rule_.prepare64 : rule_.prepare32;
      prepare(raw_[group].data(), step, first, blocks_.back().bytes);
      latest = {step, first, static_cast<int32_t>(blocks_.size()) - 1};
    }
    return latest.index;
  }

 private:
  struct Latest {
    double step = -1;  // no step has this number: they start at 1
    bool first = false;
    int32_t index = -1;
  };

  const Rule& rule_;
  std::vector<std::vector<double>> raw_;
  std::vector<HyperBlock> blocks_;
  std::vector<Latest> latest_;  // [group][is_double]
};

// A step counter as users see it: a 0-dim tensor, float32 as torch's, float64 once float32 can no
// longer count.
struct StepCounter {
  void* data = nullptr;
  bool is_double = false;

  bool bind(PyObject* tensor) {
    TensorView view;
    if (!view_of(tensor, &view) || view.numel != 1 || !view.is_cpu || view.is_complex || !view.data)
      return false;
    data = view.data;
    is_double = view.dtype == DType::f64;
    return is_double || view.dtype == DType::f32;
  }
  double next() const {
    if (!data) return 1.0;
    return (is_double ? *static_cast<double*>(data) : *static_cast<float*>(data)) + 1.0;
  }
  bool can_count() const {
    return is_double || !data || next() < 16777216.0;
  }  // 2^24: float32 is exact below
  void advance() const {
    const double value = next();
    if (is_double) {
      *static_cast<double*>(data) = value;
    } else if (data) {
      *static_cast<float*>(data) = static_cast<float>(value);
    }
  }
};

inline bool is_usable(const TensorView& t, const TensorView& like) {
  return t.is_cpu && (t.data || t.numel == 0) && t.is_complex == like.is_complex && is_aligned(t) &&
         same_layout(t, like);
}

// All of a row but its gradient and hyper-parameters. False when the tensors have no kernel
// together.
inline bool prepare_row(const Rule& rule,
                        int variant,
                        const TensorView& param,
                        const TensorView* states,
                        TableRow* row) {
  const int n_states = rule.n_states[variant];
  const DType state_dtype = n_states ? states[0].dtype : param.dtype;
  const DTypeSet set = dtype_set(param.dtype, state_dtype);
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

// The rows of one step, filled under the GIL and run without it.
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

constexpr int kMaxHeld = kMaxStates + 1;  // state tensors and the step counter

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

inline bool is_lazy(const py::object& tensor) {
  if (symbols::enabled()) return is_lazy(symbols::tensor_of(tensor.ptr()));
  return py::cast<bool>(tensor.attr("is_neg")()) || py::cast<bool>(tensor.attr("is_conj")());
}

// One parameter as the plan was made for it. Flat and hot fields first: a step walks thousands and
// waits for memory.
struct Row {
  py::object param;
  DictGuard entry;  // optimizer.state[param]; empty when the rule keeps no state
  int32_t group = 0;
  int16_t n_states = 0;
  int8_t state_width = 0;  // bytes of one element
  bool active = false;     // false: no gradient was seen yet, so there is no state
  bool first = false;      // the momentum buffer is new
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
  bool bind(const Rule& rule, int variant) {
    n_states = static_cast<int16_t>(rule.n_states[variant]);
    TensorView view, states[kMaxStates];
    if (!view_of(param.ptr(), &view)) return false;
    for (int i = 0; i < n_states; ++i) {
      if (!view_of(held[i].ptr(), &states[i])) return false;
    }
    if (rule.counts_steps && !counter.bind(held[n_states].ptr())) return false;
    remember_layout(view);
    if (n_states > 0) state_width = item_size(states[0].dtype);
    return prepare_row(rule, variant, view, states, &table_row);
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
  // rows: (group, param, state dict or None, (states...), first, active) for every parameter of
  // every group in order; an inactive row is a parameter without a gradient so far. No two
  // parameters may share memory. guards: group keys whose truth is fixed while the plan lives.
  Plan(const std::string& rule,
       const py::list& param_groups,
       const py::dict& state,
       const py::list& rows,
       const py::list& guards)
      : rule_(find_rule(rule)),
        hypers_(rule_),
        kernels_(&cpu::active_kernels()),
        state_(state.ptr()) {
    for (int i = 0; i < rule_.n_hypers; ++i) readers_.emplace_back(rule_.hyper_names[i]);
    for (const py::handle guard : guards)
      guards_.push_back(py::reinterpret_borrow<py::object>(guard));
    hypers_.start(read_groups(param_groups));
    for (size_t g = 0; g < param_groups.size(); ++g) {
      variants_.push_back(rule_.variant(hypers_.raw(static_cast<int>(g)).data()));
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

  // One step over everything that has a gradient, or nothing at all: false, and nothing has
  // changed, when parameters, state, options or gradients are not those the plan was made for.
  bool step(const py::list& param_groups, const py::object& state, double inv_scale) {
    if (running_)
      throw std::runtime_error("step() of this optimizer is already running in another thread");
    const bool collected = collect(param_groups, state.ptr());
    if (collected && !table_.rows.empty()) launch(inv_scale);
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
    const py::object entry = fields[2];
    if (!entry.is_none()) {
      row.entry = DictGuard(entry.ptr());
      if (rule_.counts_steps)
        row.hold(py::reinterpret_borrow<py::object>(PyDict_GetItemString(entry.ptr(), "step")),
                 true);
    }
    row.first = py::cast<bool>(fields[4]);
    row.active = py::cast<bool>(fields[5]);
    if (!row.active) return;
    is_usable_ = row.bind(rule_, variants_[row.group]) && is_usable_;
    row.list_memory(&written_);
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
    for (const py::object& key : guards_) {
      PyObject* const value = PyDict_GetItemWithError(group, key.ptr());
      values.push_back(value && PyObject_IsTrue(value) == 1);
    }
    return values;
  }

  bool collect(const py::list& param_groups, PyObject* state) {
    table_.clear();
    stepped_.clear();
    live_grads_.clear();
    if (!is_usable_ || kernels_ != &cpu::active_kernels() ||
        param_groups.size() != variants_.size())
      return false;
    if (!state_.holds(state)) return false;
    hypers_.start(read_groups(param_groups));
    size_t row = 0;
    for (size_t g = 0; g < variants_.size(); ++g) {
      PyObject* const group = param_groups[g].ptr();
      if (rule_.variant(hypers_.raw(static_cast<int>(g)).data()) != variants_[g]) return false;
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
    row.table_row.grad = grad.data;
    row.table_row.hyper =
        hypers_.index(row.group, row.counter.next(), row.first, row.layout.dtype == DType::f64);
    table_.add(row.table_row, row.counter);
    stepped_.push_back(&row);
    return true;
  }

  void launch(double inv_scale) {
    const bool keeps_gil = table_.total < kKeepGilElements;
    for (size_t i = 0; !keeps_gil && i < live_grads_.size(); ++i) grads_.hold(live_grads_[i]);
    bump_versions(inv_scale != 1.0);
    running_ = true;
    if (keeps_gil) {
      table_.run(hypers_, inv_scale);
    } else {
      const py::gil_scoped_release unlocked;
      table_.run(hypers_, inv_scale);
    }
    running_ = false;
    for (Row* row : stepped_) row->first = false;
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
  GradHolder grads_;
  const cpu::KernelTable* const kernels_;
  bool is_usable_ = true;
  bool running_ = false;
  std::vector<HyperReader> readers_;
  std::vector<py::object> guards_;
  std::vector<int> variants_;                    // [group]
  std::vector<std::vector<bool>> guard_values_;  // [group][guard]
  DictGuard state_;  // optimizer.state, which holds the dicts of the rows' guards
  std::vector<Row> rows_;
  WrittenMemory written_;
  std::vector<Row*> stepped_;
  std::vector<symbols::Tensor> live_grads_;  // borrowed from the parameters
  const py::object params_key_ =
      py::reinterpret_steal<py::object>(PyUnicode_InternFromString("params"));
};

}  // namespace pyoptim
