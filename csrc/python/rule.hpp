// A rule as the plan sees it: its hyper-parameters read from param groups and prepared for a step,
// and its step counters.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "python/tensor_access.hpp"
#include "rules/all.hpp"
#include "rules/traits.hpp"

namespace pyoptim {

namespace py = pybind11;

struct Rule {
  RuleId id;
  const char* name;
  const char* const* hyper_names;
  int n_hypers;
  bool counts_steps;
  bool projects;  // rows of dimension 0
  bool writes_states;
  bool yields_term;
  bool has_master;
  int n_variants;
  const int* n_states;
  const char* const (*state_names)[kMaxStates];
  int (*variant)(const double* raw);
  PrepareHyper prepare32;
  PrepareHyper prepare64;

  // Whether an update depends on how many came before it.
  bool is_counted(int variant) const { return counts_steps || n_states[variant] > 0; }
};

template <template <class> class R, class T>
void prepare_hyper(const double* raw, double step, bool first, void* hyper) {
  static_assert(sizeof(typename R<T>::Hyper) <= kHyperBytes, "raise kHyperBytes");
  static_assert(offsetof(typename R<T>::Hyper, sign) == 0, "HyperCache multiplies the sign");
  *static_cast<typename R<T>::Hyper*>(hyper) = R<T>::prepare(raw, step, first);
}

template <template <class> class R>
Rule make_rule(RuleId id) {
  using F = R<float>;
  static_assert(F::kHypers <= kMaxHypers, "raise kMaxHypers");
  return {id,
          F::kName,
          F::kHyperNames,
          F::kHypers,
          F::kCountsSteps,
          kProjects<F>,
          kWritesStates<F>,
          kYieldsTerm<F>,
          kHasMaster<F>,
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

// A hyper-parameter as a param group has it: a number, or a tensor that the host does not wait for.
struct HyperValue {
  double number;
  PyObject* tensor = nullptr;  // borrowed from the group; number is then NaN
};

// Which hyper-parameters stay tensors, rather than become numbers that the host waits for.
enum class Keeps : int8_t { nothing = 0, device_tensors, tensors };

// Reads one hyper-parameter, "name" or "name.index", out of a param group.
class HyperReader {
 public:
  explicit HyperReader(const std::string& path) {
    const size_t dot = path.find('.');
    key_ =
        py::reinterpret_steal<py::object>(PyUnicode_InternFromString(path.substr(0, dot).c_str()));
    index_ = dot == std::string::npos ? -1 : path[dot + 1] - '0';
  }

  HyperValue read(PyObject* group, Keeps keeps) const {
    PyObject* const value = PyDict_GetItemWithError(group, key_.ptr());
    if (value == nullptr) missing();
    if (index_ < 0) return number(value, keeps);
    const auto item = py::reinterpret_steal<py::object>(PySequence_GetItem(value, index_));
    if (!item) throw py::error_already_set();
    return number(item.ptr(), keeps);  // the group's tuple still holds it
  }

  const py::object& key() const { return key_; }

 private:
  [[noreturn]] void missing() const {
    if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key_.ptr());
    throw py::error_already_set();
  }

  static HyperValue number(PyObject* value, Keeps keeps) {
    if (PyFloat_CheckExact(value)) return {PyFloat_AS_DOUBLE(value)};
    TensorView view;
    if (keeps != Keeps::nothing && is_tensor(value) && view_of(value, &view) &&
        (keeps == Keeps::tensors || view.cuda >= 0)) {
      return {std::numeric_limits<double>::quiet_NaN(), value};
    }
    const auto converted = py::reinterpret_steal<py::object>(PyNumber_Float(value));
    if (!converted) throw py::error_already_set();
    return {PyFloat_AS_DOUBLE(converted.ptr())};
  }

  py::object key_;
  int index_;
};

using RawHypers = std::vector<std::vector<double>>;  // [group][hyper]

// The raw hyper-parameters of every group, and the blocks prepared from them for the step counts
// met so far.
class HyperCache {
 public:
  explicit HyperCache(const Rule& rule) : rule_(rule) {}

  // Forgets everything; the caller fills the raw values, one empty row per group. clip multiplies
  // the gradients of the blocks that are asked for with it.
  RawHypers* start(size_t n_groups, double clip) {
    raw_.resize(n_groups);
    for (std::vector<double>& of_group : raw_) of_group.clear();
    clip_ = clip;
    blocks_.clear();
    latest_.assign(n_groups * 4, Latest());
    return &raw_;
  }

  const RawHypers& raw() const { return raw_; }
  const std::vector<HyperBlock>& blocks() const { return blocks_; }

  // Rows of one group share a block as long as they share the step count, as nearly all do.
  int32_t index(int group, double step, bool first, bool is_double, bool is_clipped) {
    Latest& latest = latest_[group * 4 + is_double * 2 + is_clipped];
    if (latest.step != step || latest.first != first) {
      blocks_.emplace_back();
      const PrepareHyper prepare = is_double ? rule_.prepare64 : rule_.prepare32;
      prepare(raw_[group].data(), step, first, blocks_.back().bytes);
      if (is_clipped) multiply_sign(is_double);
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

  // Every rule multiplies the gradient by its sign first: the kernels need not know of clipping.
  void multiply_sign(bool is_double) {
    void* const sign = blocks_.back().bytes;
    if (is_double) {
      *static_cast<double*>(sign) *= clip_;
    } else {
      *static_cast<float*>(sign) *= static_cast<float>(clip_);
    }
  }

  const Rule& rule_;
  double clip_ = 1.0;
  RawHypers raw_;
  std::vector<HyperBlock> blocks_;
  std::vector<Latest> latest_;  // [group][is_double][is_clipped]
};

// A step counter as users see it: a 0-dim tensor, float32 as torch's, float64 once float32 can no
// longer count. A live one is read and advanced by kernels only.
struct StepCounter {
  void* data = nullptr;
  bool is_double = false;
  bool is_live = false;

  bool bind(PyObject* tensor, bool live, const TensorView& param) {
    TensorView view;
    if (!view_of(tensor, &view) || view.numel != 1 || view.is_complex || !view.data) return false;
    if (!(live ? same_device(view, param) : view.is_cpu)) return false;
    data = view.data;
    is_double = view.dtype == DType::f64;
    is_live = live;
    return is_double || view.dtype == DType::f32;
  }
  // The number of the step about to be made.
  double next() const {
    if (!data || is_live) return 1.0;
    return (is_double ? *static_cast<double*>(data) : *static_cast<float*>(data)) + 1.0;
  }
  bool can_count() const {
    return is_double || !data || is_live || next() < 16777216.0;
  }  // 2^24: float32 is exact below
  void advance() const {
    if (is_live) return;
    const double value = next();
    if (is_double) {
      *static_cast<double*>(data) = value;
    } else if (data) {
      *static_cast<float*>(data) = static_cast<float>(value);
    }
  }
};

}  // namespace pyoptim
