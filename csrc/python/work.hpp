// One step of one rule: its rows by who runs them, and what they are run with.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <limits>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "cpu/engine.hpp"
#include "python/bucket.hpp"
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

// How the rows of dimension 0 lie in the memory of a dense tensor, complex numbers as pairs.
inline void describe_rows(const TensorView& t, TableRow* row) {
  if (t.ndim < 2) return;
  const int64_t width = t.is_complex ? 2 : 1;
  row->n_rows = t.sizes[0];
  row->inner = width * (t.sizes[0] > 1 ? t.strides[0] : t.numel);
}

// All of a row but its gradient, what is saved and hyper-parameters. False when the tensors have no
// kernel together. states: those of the rule, and behind them the master where there is one.
inline bool prepare_row(const Rule& rule,
                        int variant,
                        const TensorView& param,
                        const TensorView* states,
                        bool has_master,
                        TableRow* row,
                        DTypeSet* dtypes) {
  const int n_states = rule.n_states[variant];
  const TensorView& master = states[n_states];
  const DType state_dtype = n_states ? states[0].dtype : param.dtype;
  DTypeSet set = dtype_set(param.dtype, state_dtype);
  if (has_master) set = master.dtype == DType::f32 ? master_set(set) : DTypeSet::count;
  *dtypes = set;
  if (set == DTypeSet::count || !is_usable(param, param) || !is_dense(param)) return false;
  if (has_master && !is_usable(master, param)) return false;
  for (int i = 0; i < n_states; ++i) {
    if (!is_usable(states[i], param) || states[i].dtype != state_dtype) return false;
    row->state[i] = states[i].data;
  }
  const cpu::KernelTable& kernels = cpu::active_kernels();
  row->param = param.data;
  row->master = has_master ? master.data : nullptr;
  row->source = has_master ? master.data : param.data;
  row->numel = param.numel * (param.is_complex ? 2 : 1);
  row->update = kernels.update[static_cast<int>(rule.id)][variant][static_cast<int>(set)];
  row->sum = kernels.sum[static_cast<int>(rule.id)][variant][static_cast<int>(set)];
  if (!row->update) return false;
  if (rule.projects) {
    row->project = &kernels.project[static_cast<int>(rule.id)][variant][static_cast<int>(set)];
    describe_rows(param, row);
  }
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
  // sum_at: where the sum of the rule's terms goes, or null for an update without it.
  void run(const HyperCache& hypers, double inv_scale, bool counts, double* sum_at) const {
    if (sum_at) {
      *sum_at = cpu::update_and_sum_rows(rows, hypers.blocks());
    } else {
      cpu::update_rows(rows, hypers.blocks(), inv_scale);
    }
    for (size_t i = 0; counts && i < counters.size(); ++i) counters[i]->advance();
  }
};

// What a step needs to know of one parameter.
struct StepRow {
  TableRow table_row = {};  // with the addresses of param and states
  StepCounter counter;
  int32_t group = 0;
  int16_t bucket = -1;  // of the work; -1: the CPU engine
  Backend backend = Backend::cpu;
  bool first = false;      // the momentum buffer is new
  bool is_live = false;    // kernels read and advance its counter
  bool is_double = false;  // arithmetic in float64

  // Whether an engine can add up the terms of this row, and save what it reads.
  bool has_sum() const {
    const bool is_kept = table_row.saved || table_row.master || table_row.numel == 0;
    return (bucket >= 0 || table_row.sum) && is_kept;
  }
};

// Where the sum of a rule's terms goes: one float64 number on the device of the rows, or nowhere.
struct SumPlace {
  py::object tensor = py::none();
  double* at = nullptr;
  int32_t device = -1;  // CUDA index, or -1: the CPU's memory

  SumPlace() = default;
  SumPlace(const Rule& rule, const py::object& sum) : tensor(sum) {
    if (sum.is_none()) return;
    TensorView view;
    if (!rule.yields_term || !is_tensor(sum.ptr()) || !view_of(sum.ptr(), &view) ||
        view.dtype != DType::f64 || view.numel != 1 || !(view.is_cpu || view.cuda >= 0) ||
        !view.data) {
      throw py::value_error(
          "sum must be one float64 number on the device of the rows, of a rule that yields terms");
    }
    at = static_cast<double*>(view.data);
    device = view.cuda;
  }
  explicit operator bool() const { return at != nullptr; }
};

class Work {
 public:
  // memory: the pyoptim.gpu.Memory of the optimizer.
  Work(const Rule& rule, const py::object& memory) : rule_(rule), hypers_(rule), memory_(memory) {
    for (int i = 0; i < rule_.n_hypers; ++i) readers_.emplace_back(rule_.hyper_names[i]);
  }

  const Rule& rule() const { return rule_; }
  const StepFactors& factors() const { return factors_; }
  const py::object& memory() const { return memory_; }
  int variant(int group) const { return rule_.variant(hypers_.raw()[group].data()); }
  int64_t host_elements() const { return table_.total; }

  // Says of a group what it holds, before start: rows of a GPU engine, for which the host does not
  // wait for tensors on a device, and live rows, for which all tensors stay tensors.
  void expect(size_t group, Backend backend, bool is_live) {
    keeps_.resize(std::max(keeps_.size(), group + 1), Keeps::nothing);
    const Keeps wanted = is_live                   ? Keeps::tensors
                         : backend != Backend::cpu ? Keeps::device_tensors
                                                   : Keeps::nothing;
    keeps_[group] = std::max(keeps_[group], wanted);
  }

  // Forgets the rows of the last step and reads the groups anew. devices: None, or {CUDA index:
  // (grad_scale, found_inf, clip)}, each None or a tensor.
  void start(const py::list& param_groups,
             double inv_scale,
             double clip,
             const py::object& devices) {
    table_.clear();
    n_chunks_ = 0;
    for (Bucket& bucket : buckets_) bucket.clear();
    read_factors(inv_scale, clip, devices);
    read_groups(param_groups);
  }

  // Where rows like this one are gathered. dtypes and device are those of its tensors.
  void place(StepRow* row, DTypeSet dtypes, int32_t device) {
    row->is_double = dtypes == DTypeSet::f64;
    if (row->backend == Backend::cpu) return;
    Bucket bucket = {};
    bucket.backend = row->backend;
    bucket.device = device;
    bucket.variant = variant(row->group);
    bucket.dtypes = dtypes;
    bucket.is_live = row->is_live;
    const auto same = [&](const Bucket& other) { return other.holds(bucket); };
    const auto found = std::find_if(buckets_.begin(), buckets_.end(), same);
    row->bucket = static_cast<int16_t>(found - buckets_.begin());
    if (found == buckets_.end()) buckets_.push_back(bucket);
  }

  // False when the row cannot be stepped as it is, because the host keeps its counter.
  bool add(StepRow* row) {
    if (!row->is_live) {
      if (needs_device_[row->group]) return false;
      row->table_row.hyper = hypers_.index(row->group,
                                           row->counter.next(),
                                           row->first,
                                           row->is_double,
                                           row->backend == Backend::cpu);
    }
    if (row->bucket < 0) {
      table_.add(row->table_row, row->counter);
    } else {
      row->table_row.first_chunk = n_chunks_;
      n_chunks_ += reduce::n_chunks(row->table_row.numel);
      buckets_[row->bucket].add(row->table_row, row->counter, row->group);
    }
    return true;
  }

  // Whether one engine has all rows, on the device of the sum.
  bool can_sum(const SumPlace& sum) const {
    const Bucket* const first = first_bucket();
    if (!first) return sum.device < 0;
    const auto is_elsewhere = [&](const Bucket& bucket) {
      return !bucket.empty() && (bucket.backend != first->backend || bucket.device != sum.device);
    };
    return table_.rows.empty() && std::none_of(buckets_.begin(), buckets_.end(), is_elsewhere);
  }

  bool empty() const {
    const auto is_empty = [](const Bucket& bucket) { return bucket.empty(); };
    return table_.rows.empty() && std::all_of(buckets_.begin(), buckets_.end(), is_empty);
  }

  // Needs the GIL; the devices work on after it.
  void launch_gpu(const SumPlace& sum) const {
    const Bucket* const first = first_bucket();
    if (!first) return;
    const size_t n_bytes = sizeof(double) * std::max<int64_t>(n_chunks_, 1);
    const py::object sums =
        sum ? memory_.attr("workspace")(kSumSlot, n_bytes, sum.device) : py::none();
    for (size_t slot = 0; slot < buckets_.size(); ++slot) {
      const Bucket& bucket = buckets_[slot];
      if (bucket.empty()) continue;
      const LiveGroups live = bucket.is_live ? live_groups(bucket.device) : LiveGroups();
      bucket.launch(rule_, hypers_, live, factors_, memory_, static_cast<int>(slot), sums);
    }
    if (sum) first->add_up(sums, n_chunks_, sum.at, sum.tensor, memory_);
  }

  // Does not need the GIL.
  void run_cpu(const SumPlace& sum) const {
    double* const sum_at = first_bucket() ? nullptr : sum.at;
    table_.run(hypers_, factors_.inv_scale, rule_.writes_states, sum_at);
  }

  // CUDA indices of the GPU engines' rows, -1 for those in the CPU's memory.
  std::vector<int32_t> devices() const {
    std::vector<int32_t> found;
    for (const Bucket& bucket : buckets_) {
      if (std::find(found.begin(), found.end(), bucket.device) == found.end())
        found.push_back(bucket.device);
    }
    return found;
  }

 private:
  // Of the workspaces; buckets have those from 0 on, and from -1 down.
  static constexpr int kSumSlot = std::numeric_limits<int>::min();

  // One with rows of this step, null without rows of a GPU engine.
  const Bucket* first_bucket() const {
    for (const Bucket& bucket : buckets_) {
      if (!bucket.empty()) return &bucket;
    }
    return nullptr;
  }

  void read_factors(double inv_scale, double clip, const py::object& devices) {
    factors_.inv_scale = inv_scale;
    factors_.clip = clip;
    factors_.devices.clear();
    if (devices.is_none()) return;
    for (const auto& [device, tensors] : py::cast<py::dict>(devices)) {
      const auto fields = py::reinterpret_borrow<py::tuple>(tensors);
      factors_.devices.push_back({py::cast<int32_t>(device), fields[0], fields[1], fields[2]});
    }
  }

  void read_groups(const py::list& param_groups) {
    const size_t n = param_groups.size();
    RawHypers& raw = *hypers_.start(n, factors_.clip);
    keeps_.resize(n, Keeps::nothing);
    needs_device_.assign(n, false);
    sources_.clear();
    for (size_t g = 0; g < n; ++g) {
      PyObject* const group = PyList_GET_ITEM(param_groups.ptr(), static_cast<Py_ssize_t>(g));
      for (size_t i = 0; i < readers_.size(); ++i) {
        const HyperValue value = readers_[i].read(group, keeps_[g]);
        raw[g].push_back(value.number);
        if (!value.tensor) continue;
        sources_.push_back({static_cast<int>(g), static_cast<int>(i), value.tensor});
        needs_device_[g] = true;
      }
    }
    // What the host counts cannot be taken back when the device finds an infinity.
    for (size_t g = 0; factors_.skips() && g < n; ++g) {
      needs_device_[g] |= rule_.is_counted(variant(static_cast<int>(g)));
    }
  }

  LiveGroups live_groups(int32_t device) const {
    LiveGroups live;
    for (const std::vector<double>& raw : hypers_.raw()) {
      live.groups.emplace_back();
      std::copy(raw.begin(), raw.end(), live.groups.back().raw);
    }
    for (const LiveSource& source : sources_) {
      // A copy, where it is on another device, in the order of the streams.
      live.copies.push_back(memory_.attr("on_device")(
          py::handle(source.tensor), readers_[source.hyper].key(), device));
      TensorView view;
      if (!view_of(live.copies.back().ptr(), &view)) throw std::bad_alloc();
      live.groups[source.group].source[source.hyper] = view.data;
      live.groups[source.group].is_double[source.hyper] = view.dtype == DType::f64;
    }
    return live;
  }

  const Rule& rule_;
  HyperCache hypers_;
  py::object memory_;
  std::vector<HyperReader> readers_;
  Table table_;
  std::vector<Bucket> buckets_;
  int64_t n_chunks_ = 0;  // of the buckets' rows
  StepFactors factors_;
  std::vector<Keeps> keeps_;         // [group]
  std::vector<char> needs_device_;   // [group]: only a live row can be stepped
  std::vector<LiveSource> sources_;  // of this step
};

// What run_rows keeps of one row.
struct GivenRow : StepRow {
  bool read(const py::tuple& fields, Work* work) {
    TensorView param, grad, states[kMaxStates + 1];
    const int variant = work->variant(group);
    const py::tuple given = fields[2];
    const int n_states = work->rule().n_states[variant], n_given = static_cast<int>(given.size());
    if (n_given < n_states || n_given > n_states + 1) return false;
    if (!dlpack::view(py::object(fields[0]).ptr(), &param) ||
        !dlpack::view(py::object(fields[1]).ptr(), &grad)) {
      return false;
    }
    for (size_t i = 0; i < given.size(); ++i) {
      if (!dlpack::view(py::object(given[i]).ptr(), &states[i])) return false;
    }
    const py::object step = fields[3];
    if (!step.is_none() && !(counter.bind(step.ptr(), is_live, param) && counter.can_count()))
      return false;
    // A rule that does not count steps uses a counter to tell a new buffer.
    if (!work->rule().counts_steps && counter.data && !is_live) first = counter.next() == 1.0;
    DTypeSet dtypes = DTypeSet::count;
    if (!is_reachable(backend, param) || grad.dtype != param.dtype || !is_usable(grad, param) ||
        !prepare_row(
            work->rule(), variant, param, states, n_given > n_states, &table_row, &dtypes)) {
      return false;
    }
    table_row.grad = grad.data;
    void* source = const_cast<void*>(table_row.source);
    if (!read_copy(fields[8], param, &source) || !read_copy(fields[9], param, &table_row.saved)) {
      return false;
    }
    table_row.source = source;
    work->place(this, dtypes, param.cuda);
    return work->add(this);
  }

 private:
  // Of the parameter, unless it is None.
  static bool read_copy(const py::object& copy, const TensorView& param, void** data) {
    if (copy.is_none()) return true;
    TensorView view;
    if (!dlpack::view(copy.ptr(), &view) || view.dtype != param.dtype || !is_usable(view, param))
      return false;
    *data = view.data;
    return true;
  }
};

// One update of tensors given explicitly, all of one memory layout per row and no memory shared
// between rows. rows: (param, grad, (states..., master if any), step or None, group, first, engine,
// live, source or None, saved or None); the rest as Plan::step.
inline void run_rows(const std::string& rule_name,
                     const py::list& param_groups,
                     const std::vector<py::tuple>& rows,
                     double inv_scale,
                     double clip,
                     const py::object& devices,
                     const py::object& memory,
                     const py::object& sum) {
  Work work(find_rule(rule_name), memory);
  const SumPlace to(work.rule(), sum);
  std::vector<GivenRow> given(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    given[i].group = py::cast<int>(rows[i][4]);
    given[i].first = py::cast<bool>(rows[i][5]);
    given[i].backend = static_cast<Backend>(py::cast<int>(rows[i][6]));
    given[i].is_live = py::cast<bool>(rows[i][7]);
    work.expect(given[i].group, given[i].backend, given[i].is_live);
  }
  work.start(param_groups, inv_scale, clip, devices);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!given[i].read(rows[i], &work)) {
      throw py::value_error("run_rows: the tensors of a row have no kernel together");
    }
    if (to && !given[i].has_sum()) {
      throw py::value_error("run_rows: a row has no kernel that adds up, or nothing to save into");
    }
  }
  if (to && !work.can_sum(to)) {
    throw py::value_error("run_rows: the sum is not where all rows are");
  }
  work.launch_gpu(to);
  for (const GivenRow& row : given) {
    if (row.bucket >= 0 && work.rule().writes_states) row.counter.advance();
  }
  const py::gil_scoped_release unlocked;  // the caller's tuples hold the tensors
  work.run_cpu(to);
}

}  // namespace pyoptim
