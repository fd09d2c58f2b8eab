// The kernels of one rule, PYOPTIM_RULE: every variant and set of dtypes over a table of tensors.
#include <algorithm>

#include "cuda/project.hpp"
#include "cuda/rows.hpp"
#include "cuda/sum.hpp"
#include "rules/traits.hpp"

namespace pyoptim::gpu {
namespace {

// -- device ---------------------------------------------------------------------------------------

// M: float where the parameter has a master, which is its source, else P.
template <class P, class S, class M, int kStates>
struct Arrays {
  P* param;
  M* source;  // where param is read; written only where it is a master
  P* grad;
  S* state[kStates > 0 ? kStates : 1];

  __device__ __forceinline__ Arrays(const Table<kStates, false>& table, int row)
      : param(static_cast<P*>(table.arrays[0][row])),
        source(static_cast<M*>(table.arrays[0][table.source(row)])),
        grad(static_cast<P*>(table.arrays[1][row])) {
#pragma unroll
    for (int n = 0; n < kStates; ++n) state[n] = static_cast<S*>(table.arrays[2 + n][row]);
  }

  template <int W>
  __device__ __forceinline__ bool are_aligned() const {
    bool aligned = is_aligned<P, W>(param) && is_aligned<M, W>(source) && is_aligned<P, W>(grad);
#pragma unroll
    for (int n = 0; n < kStates; ++n) aligned = aligned && is_aligned<S, W>(state[n]);
    return aligned;
  }
};

// W elements of every array, in registers.
template <class Rule, int V, class P, class S, class M, int W>
struct Slice {
  using T = typename Compute<P>::type;
  static constexpr int kStates = Rule::kStates[V];
  static constexpr bool kHasMaster = !std::is_same_v<P, M>;

  Pack<M, W> param;  // unrounded where there is a master
  Pack<P, W> rounded, grad;
  Pack<S, W> state[kStates > 0 ? kStates : 1];

  __device__ __forceinline__ void read(const Arrays<P, S, M, kStates>& from, int64_t i) {
    param = *reinterpret_cast<const Pack<M, W>*>(from.source + i);
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
      if constexpr (kHasMaster) store(rounded.x[k], p);
#pragma unroll
      for (int n = 0; n < kStates; ++n) store(state[n].x[k], s[n]);
    }
  }

  __device__ __forceinline__ void write(const Arrays<P, S, M, kStates>& to,
                                        int64_t i,
                                        bool with_grad) {
    if constexpr (kHasMaster) {
      *reinterpret_cast<Pack<P, W>*>(to.param + i) = rounded;
      *reinterpret_cast<Pack<M, W>*>(to.source + i) = param;
    } else {
      *reinterpret_cast<Pack<P, W>*>(to.param + i) = param;
    }
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
template <class Rule, int V, class P, class S, class M, int W>
__device__ __forceinline__ void update_range(const Arrays<P, S, M, Rule::kStates[V]>& arrays,
                                             const typename Rule::Hyper& h,
                                             const Multiplier<typename Compute<P>::type>& by,
                                             int64_t begin,
                                             int64_t end) {
  constexpr int64_t kStride = static_cast<int64_t>(kThreads) * W;
  for (int64_t i = begin + threadIdx.x * W; i < end; i += kInFlight<W> * kStride) {
    Slice<Rule, V, P, S, M, W> slices[kInFlight<W>];
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

// Blocks that ptxas is to make room for; 0 leaves it the choice, which takes fewer registers in
// most kernels, but gave one over 5 arrays of 16-bit elements (RMSprop, sm_90) a stack frame.
template <class S, int kStates>
constexpr int kMinBlocks = sizeof(S) == 2 && kStates == 3 ? 2 : 0;

template <class... E>
constexpr size_t kWidest = std::max({sizeof(E)...});

template <class Rule, int V, class P, class S, class M>
__global__ void __launch_bounds__(kThreads, kMinBlocks<S, Rule::kStates[V]>)
    update_kernel(const Table<Rule::kStates[V], false> __grid_constant__ table) {
  constexpr int kVector = 16 / kWidest<P, S, M>;
  if (table.factors.found_inf && *table.factors.found_inf != 0) return;
  const Part part(table);
  const int64_t begin = part.begin, end = part.end;
  const Arrays<P, S, M, Rule::kStates[V]> arrays(table, part.row);
  const Multiplier<typename Compute<P>::type> by(table);
  const auto h = read_hyper<typename Rule::Hyper>(table, part.row);
  int64_t rest = begin;
  if (arrays.template are_aligned<kVector>()) {
    rest = end - (end - begin) % kVector;
    update_range<Rule, V, P, S, M, kVector>(arrays, h, by, begin, rest);
  }
  update_range<Rule, V, P, S, M, 1>(arrays, h, by, rest, end);
}

// -- host -----------------------------------------------------------------------------------------

template <template <class> class R, int V, class P, class S, class M = P>
cudaError_t update_with(const Update& update, cudaStream_t stream) {
  using Rule = R<typename Compute<P>::type>;
  if constexpr (kYieldsTerm<Rule>) {
    return update_and_sum<Rule, V, P, S, M>(update, stream);
  } else {
    using OfRule = Table<Rule::kStates[V], false>;
    return Updater<OfRule>(update_kernel<Rule, V, P, S, M>, update, 0, stream).run();
  }
}

template <template <class> class R, int V>
cudaError_t update_with_master(const Update& update, cudaStream_t stream) {
  switch (update.dtypes) {
    case DTypeSet::bf16_master:
      return update_with<R, V, Bf16, Bf16, float>(update, stream);
    case DTypeSet::f16_master:
      return update_with<R, V, F16, F16, float>(update, stream);
    case DTypeSet::bf16_master_state32:
      return update_with<R, V, Bf16, float, float>(update, stream);
    case DTypeSet::f16_master_state32:
      return update_with<R, V, F16, float, float>(update, stream);
    default:
      return cudaErrorInvalidValue;
  }
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
      default:
        if constexpr (kHasMaster<R<float>>) return update_with_master<R, V>(update, stream);
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

// The number of the step that is made, or with kCounts = false tried.
template <bool kCounts, class E>
__device__ __forceinline__ double count_up(void* counter) {
  E* const steps = static_cast<E*>(counter);
  const E next = *steps + 1;
  if constexpr (kCounts) *steps = next;
  return next;
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
    constexpr bool kCounts = kWritesStates<Rule>;
    step = row.is_double ? count_up<kCounts, double>(row.counter)
                         : count_up<kCounts, float>(row.counter);
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
