// The kernels of one rule, PYOPTIM_RULE: every variant and set of dtypes over a table of tensors.
#include "cuda/project.hpp"

namespace pyoptim::gpu {
namespace {

constexpr int kHypers = 8;  // blocks of hyper-parameters in one launch

// The tensors of one launch, by value. Arrays: param, grad, states. Where parameters are read from
// copies, those lie in the upper half of the first array, and a launch takes half as many rows.
template <int kArrays>
struct Table {
  static constexpr int kHeader = sizeof(HyperBlock) * kHypers + sizeof(GradFactors) + 64;
  static constexpr int kRows = (kParameterBytes - kHeader) /
                               (sizeof(void*) * kArrays + sizeof(int64_t) + 2 * sizeof(int32_t));

  HyperBlock hypers[kHypers];
  const HyperBlock* live_hypers;  // device memory; read in place of hypers unless null
  GradFactors factors;
  int64_t chunk;
  int32_t n_rows;
  bool unscales;
  bool has_sources;
  int32_t first_block[kRows];
  int32_t hyper[kRows];  // index into hypers or live_hypers
  int64_t numel[kRows];
  void* arrays[kArrays][kRows];

  PYOPTIM_HD int source(int row) const { return has_sources ? row + kRows / 2 : row; }
};

// -- device ---------------------------------------------------------------------------------------

// The factors of a gradient in the type of the arithmetic.
template <class T>
struct Multiplier {
  bool unscales, clips;
  T inverse, clip;

  template <int kArrays>
  __device__ __forceinline__ explicit Multiplier(const Table<kArrays>& table) {
    const GradFactors& f = table.factors;
    unscales = table.unscales;
    clips = f.clip_at != nullptr || f.clip != 1.0;
    inverse = static_cast<T>(f.grad_scale ? 1.0 / static_cast<double>(*f.grad_scale) : f.inv_scale);
    clip = static_cast<T>(f.clip_at ? *f.clip_at : f.clip);
  }

  // The element keeps the unscaled value, rounded; what the rule reads is computed from that.
  template <class G>
  __device__ __forceinline__ T read(G& grad) const {
    if (unscales) store(grad, load(grad) * inverse);
    const T g = load(grad);
    return clips ? g * clip : g;
  }
};

template <class P, class S, int kStates>
struct Arrays {
  P* param;
  const P* source;  // where param is read
  P* grad;
  S* state[kStates > 0 ? kStates : 1];

  __device__ __forceinline__ Arrays(const Table<2 + kStates>& table, int row)
      : param(static_cast<P*>(table.arrays[0][row])),
        source(static_cast<const P*>(table.arrays[0][table.source(row)])),
        grad(static_cast<P*>(table.arrays[1][row])) {
#pragma unroll
    for (int n = 0; n < kStates; ++n) state[n] = static_cast<S*>(table.arrays[2 + n][row]);
  }

  template <int W>
  __device__ __forceinline__ bool are_aligned() const {
    bool aligned = is_aligned<P, W>(param) && is_aligned<P, W>(source) && is_aligned<P, W>(grad);
#pragma unroll
    for (int n = 0; n < kStates; ++n) aligned = aligned && is_aligned<S, W>(state[n]);
    return aligned;
  }
};

// W elements of every array, in registers.
template <class Rule, int V, class P, class S, int W>
struct Slice {
  using T = typename Compute<P>::type;
  static constexpr int kStates = Rule::kStates[V];

  Pack<P, W> param, grad;
  Pack<S, W> state[kStates > 0 ? kStates : 1];

  __device__ __forceinline__ void read(const Arrays<P, S, kStates>& from, int64_t i) {
    param = *reinterpret_cast<const Pack<P, W>*>(from.source + i);
    grad = *reinterpret_cast<const Pack<P, W>*>(from.grad + i);
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      state[n] = *reinterpret_cast<const Pack<S, W>*>(from.state[n] + i);
    }
  }

  __device__ __forceinline__ void update(const typename Rule::Hyper& h, const Multiplier<T>& by) {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      T p = load(param.x[k]), s[kMaxStates] = {};
#pragma unroll
      for (int n = 0; n < kStates; ++n) s[n] = load(state[n].x[k]);
      Rule::template update<V, T>(h, p, by.read(grad.x[k]), s[0], s[1], s[2]);
      store(param.x[k], p);
#pragma unroll
      for (int n = 0; n < kStates; ++n) store(state[n].x[k], s[n]);
    }
  }

  __device__ __forceinline__ void write(const Arrays<P, S, kStates>& to,
                                        int64_t i,
                                        bool with_grad) {
    *reinterpret_cast<Pack<P, W>*>(to.param + i) = param;
    if (with_grad) *reinterpret_cast<Pack<P, W>*>(to.grad + i) = grad;
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      *reinterpret_cast<Pack<S, W>*>(to.state[n] + i) = state[n];
    }
  }
};

// Vectors of every array that a thread loads before it computes. Two of 8 elements took 120
// registers for Adam (sm_90): half the warps were left, each with twice the bytes on their way.
template <int W>
constexpr int kInFlight = W > 4 ? 1 : 2;

// Elements [begin, end), W at a time; their number is a multiple of W.
template <class Rule, int V, class P, class S, int W>
__device__ __forceinline__ void update_range(const Arrays<P, S, Rule::kStates[V]>& arrays,
                                             const typename Rule::Hyper& h,
                                             const Multiplier<typename Compute<P>::type>& by,
                                             int64_t begin,
                                             int64_t end) {
  constexpr int64_t kStride = static_cast<int64_t>(kThreads) * W;
  for (int64_t i = begin + threadIdx.x * W; i < end; i += kInFlight<W> * kStride) {
    Slice<Rule, V, P, S, W> slices[kInFlight<W>];
#pragma unroll
    for (int u = 0; u < kInFlight<W>; ++u) {
      if (i + u * kStride < end) slices[u].read(arrays, i + u * kStride);
    }
#pragma unroll
    for (int u = 0; u < kInFlight<W>; ++u) {
      if (i + u * kStride >= end) break;
      slices[u].update(h, by);
      slices[u].write(arrays, i + u * kStride, by.unscales);
    }
  }
}

template <class Hyper, int kArrays>
__device__ __forceinline__ Hyper read_hyper(const Table<kArrays>& table, int row) {
  const int index = table.hyper[row];
  if (table.live_hypers) return *reinterpret_cast<const Hyper*>(table.live_hypers + index);
  return *reinterpret_cast<const Hyper*>(table.hypers + index);
}

// Blocks that ptxas is to make room for; 0 leaves it the choice, which takes fewer registers in
// most kernels, but gave one over 5 arrays of 16-bit elements (RMSprop, sm_90) a stack frame.
template <class S, int kStates>
constexpr int kMinBlocks = sizeof(S) == 2 && kStates == 3 ? 2 : 0;

template <class Rule, int V, class P, class S>
__global__ void __launch_bounds__(kThreads, kMinBlocks<S, Rule::kStates[V]>)
    update_kernel(const Table<2 + Rule::kStates[V]> __grid_constant__ table) {
  constexpr int kVector = 16 / (sizeof(P) > sizeof(S) ? sizeof(P) : sizeof(S));
  if (table.factors.found_inf && *table.factors.found_inf != 0) return;
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  const int row = find_row(table.first_block, table.n_rows, block);
  const int64_t begin = (block - table.first_block[row]) * table.chunk;
  const int64_t left = table.numel[row] - begin;
  const int64_t end = begin + (left < table.chunk ? left : table.chunk);
  const Arrays<P, S, Rule::kStates[V]> arrays(table, row);
  const Multiplier<typename Compute<P>::type> by(table);
  const auto h = read_hyper<typename Rule::Hyper>(table, row);
  int64_t rest = begin;
  if (arrays.template are_aligned<kVector>()) {
    rest = end - (end - begin) % kVector;
    update_range<Rule, V, P, S, kVector>(arrays, h, by, begin, rest);
  }
  update_range<Rule, V, P, S, 1>(arrays, h, by, rest, end);
}

// -- host -----------------------------------------------------------------------------------------

// Fills tables row by row and launches the kernel whenever one is full.
template <int kArrays>
class Updater {
 public:
  using Kernel = void (*)(const Table<kArrays> __grid_constant__);

  Updater(Kernel kernel, const Update& update, cudaStream_t stream)
      : kernel_(kernel), update_(update), stream_(stream) {
    int64_t total = 0;
    table_.has_sources = false;
    for (int64_t r = 0; r < update.n_rows; ++r) {
      const TableRow& row = *update.rows[r];
      total += row.numel;
      table_.has_sources = table_.has_sources || row.source != row.param;
    }
    capacity_ = choose_rows(Table<kArrays>::kRows / (table_.has_sources ? 2 : 1));
    table_.factors = update.factors;
    table_.unscales = update.factors.unscales();
    table_.live_hypers = update.live_hypers;
    table_.chunk = choose_chunk(total);
    table_.n_rows = 0;
  }

  cudaError_t run() {
    for (int64_t r = 0; r < update_.n_rows; ++r) {
      if (update_.rows[r]->numel == 0) continue;
      if (const cudaError_t status = add(r); status != cudaSuccess) return status;
    }
    return flush();
  }

 private:
  cudaError_t add(int64_t r) {
    const TableRow& row = *update_.rows[r];
    const int64_t blocks = (row.numel + table_.chunk - 1) / table_.chunk;
    int hyper = find_hyper(r);
    if (hyper < 0 || table_.n_rows == capacity_ || n_blocks_ + blocks > kMaxBlocks) {
      if (const cudaError_t status = flush(); status != cudaSuccess) return status;
      hyper = find_hyper(r);
    }
    const int to = table_.n_rows++;
    table_.first_block[to] = static_cast<int32_t>(n_blocks_);
    table_.hyper[to] = hyper;
    table_.numel[to] = row.numel;
    table_.arrays[0][to] = row.param;
    table_.arrays[0][table_.source(to)] = const_cast<void*>(row.source);
    table_.arrays[1][to] = row.grad;
    for (int n = 2; n < kArrays; ++n) table_.arrays[n][to] = row.state[n - 2];
    n_blocks_ += blocks;
    return cudaSuccess;
  }

  int find_hyper(int64_t r) {
    // All launches share live_hypers, where a row's place is its own number.
    if (update_.live_hypers) return static_cast<int>(r);
    const int32_t index = update_.rows[r]->hyper;
    return slots_.find(index, [&](int slot) { table_.hypers[slot] = update_.hypers[index]; });
  }

  cudaError_t flush() {
    if (table_.n_rows == 0) return cudaSuccess;
    const cudaError_t status = launch(kernel_, n_blocks_, stream_, table_);
    table_.n_rows = 0;
    n_blocks_ = 0;
    slots_.clear();
    return status;
  }

  const Kernel kernel_;
  const Update& update_;
  const cudaStream_t stream_;
  int capacity_ = 0;  // rows of a launch
  int64_t n_blocks_ = 0;
  Slots<kHypers> slots_;
  Table<kArrays> table_;
};

template <template <class> class R, int V, class P, class S>
cudaError_t update_with(const Update& update, cudaStream_t stream) {
  using Rule = R<typename Compute<P>::type>;
  constexpr int kArrays = 2 + Rule::kStates[V];
  static_assert(sizeof(Table<kArrays>) <= kParameterBytes,
                "the table exceeds a kernel's parameters");
  return Updater<kArrays>(update_kernel<Rule, V, P, S>, update, stream).run();
}

template <template <class> class R, int V>
cudaError_t update_variant(const Update& update, cudaStream_t stream) {
  if constexpr (V < R<float>::kVariants) {
    if (update.variant != V) return update_variant<R, V + 1>(update, stream);
    switch (update.dtypes) {
      case DTypeSet::f64:
        return update_with<R, V, double, double>(update, stream);
      case DTypeSet::f32:
        return update_with<R, V, float, float>(update, stream);
      case DTypeSet::bf16:
        return update_with<R, V, Bf16, Bf16>(update, stream);
      case DTypeSet::f16:
        return update_with<R, V, F16, F16>(update, stream);
      case DTypeSet::bf16_state32:
        return update_with<R, V, Bf16, float>(update, stream);
      case DTypeSet::f16_state32:
        return update_with<R, V, F16, float>(update, stream);
      case DTypeSet::bf16_master:
      case DTypeSet::f16_master:
      case DTypeSet::bf16_master_state32:
      case DTypeSet::f16_master_state32:
      case DTypeSet::count:
        break;
    }
  }
  return cudaErrorInvalidValue;
}

// -- hyper-parameters -----------------------------------------------------------------------------

// The rows of one launch and the groups that they belong to.
struct PrepareTable {
  static constexpr int kGroups = 32;
  static constexpr int kRows =
      (kParameterBytes - kGroups * static_cast<int>(sizeof(LiveGroup)) - 64) /
      static_cast<int>(sizeof(LiveRow));

  const float* found_inf;
  HyperBlock* hypers;
  int32_t n_rows;
  LiveGroup groups[kGroups];
  LiveRow rows[kRows];
};
static_assert(sizeof(PrepareTable) <= kParameterBytes, "the table exceeds a kernel's parameters");

template <class E>
__device__ __forceinline__ double count_up(void* counter) {
  E* const steps = static_cast<E*>(counter);
  return *steps = *steps + 1;
}

template <class Rule>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const PrepareTable __grid_constant__ table) {
  const int r = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (r >= table.n_rows || (table.found_inf && *table.found_inf != 0)) return;
  const LiveRow& row = table.rows[r];
  const LiveGroup& group = table.groups[row.group];
  double raw[kMaxHypers];
#pragma unroll
  for (int i = 0; i < Rule::kHypers; ++i) {
    const void* const source = group.source[i];
    raw[i] = group.raw[i];
    if (source && group.is_double[i]) raw[i] = *static_cast<const double*>(source);
    if (source && !group.is_double[i]) raw[i] = *static_cast<const float*>(source);
  }
  double step = 1.0;
  bool first = false;
  if (row.counter) {
    step = row.is_double ? count_up<double>(row.counter) : count_up<float>(row.counter);
    first = step == 1.0;
  }
  *reinterpret_cast<typename Rule::Hyper*>(table.hypers + r) = Rule::prepare(raw, step, first);
}

template <class Rule>
cudaError_t prepare_with(const Prepare& prepare, cudaStream_t stream) {
  const int capacity = choose_rows(PrepareTable::kRows);
  PrepareTable table;
  table.found_inf = prepare.found_inf;
  Slots<PrepareTable::kGroups> slots;
  for (int64_t r = 0; r < prepare.n_rows;) {
    slots.clear();
    table.hypers = prepare.hypers + r;
    for (table.n_rows = 0; r < prepare.n_rows && table.n_rows < capacity; ++r, ++table.n_rows) {
      const LiveRow& row = prepare.rows[r];
      const int group =
          slots.find(row.group, [&](int slot) { table.groups[slot] = prepare.groups[row.group]; });
      if (group < 0) break;
      table.rows[table.n_rows] = {row.counter, group, row.is_double};
    }
    const int64_t n_blocks = (table.n_rows + kThreads - 1) / kThreads;
    const cudaError_t status = launch(prepare_kernel<Rule>, n_blocks, stream, table);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace

#define PYOPTIM_JOIN(a, b) a##b
#define PYOPTIM_NAME(action, Rule) PYOPTIM_JOIN(action##_, Rule)

cudaError_t PYOPTIM_NAME(update, PYOPTIM_RULE)(const Update& update, cudaStream_t stream) {
  if constexpr (kProjects<PYOPTIM_RULE<float>>) {
    return project<PYOPTIM_RULE>(update, stream);
  } else {
    return update_variant<PYOPTIM_RULE, 0>(update, stream);
  }
}

cudaError_t PYOPTIM_NAME(prepare, PYOPTIM_RULE)(const Prepare& prepare, cudaStream_t stream) {
  return prepare.is_double ? prepare_with<PYOPTIM_RULE<double>>(prepare, stream)
                           : prepare_with<PYOPTIM_RULE<float>>(prepare, stream);
}

}  // namespace pyoptim::gpu
