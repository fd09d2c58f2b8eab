// The phases of a projecting update that know the rule: the update itself, and the projection of
// what had to wait for a decision.
#pragma once

#include <cstddef>

#include "cuda/phases.hpp"

namespace pyoptim::gpu {
namespace {

// What becomes of the parameter.
enum class Write : int { plain, projected, repaired };

// W elements of every array, in registers.
template <class P, class S, int kStates, int W>
struct ProjectSlice {
  Pack<P, W> param, grad;
  Pack<S, W> state[kStates];
};

// The arrays of a tensor and the arithmetic of its rule.
template <class Rule, class P, class S>
struct Arithmetic {
  using T = typename Compute<P>::type;
  static constexpr int kStates = Rule::kStates[0];
  static constexpr bool kReadsAnyGrad = Rule::kReadsGrad[1];
  static constexpr bool kProjectsAnyBuffer = Rule::kProjectsBuffer[0];

  P *param, *grad;
  const P* source;
  S* state[kStates];
  typename Rule::Hyper h;
  int variant;

  __device__ __forceinline__ Arithmetic(const Tensor& t, int of_variant)
      : param(static_cast<P*>(t.param)),
        grad(static_cast<P*>(t.grad)),
        source(static_cast<const P*>(t.source)),
        h(*reinterpret_cast<const typename Rule::Hyper*>(t.hyper.bytes)),
        variant(of_variant) {
#pragma unroll
    for (int n = 0; n < kStates; ++n) state[n] = static_cast<S*>(t.state[n]);
  }

  template <int W>
  __device__ __forceinline__ bool is_aligned(int64_t first) const {
    bool aligned = gpu::is_aligned<P, W>(param + first) && gpu::is_aligned<P, W>(grad + first);
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      aligned = aligned && gpu::is_aligned<S, W>(state[n] + first);
    }
    return aligned;
  }

  template <int W>
  using Slice = ProjectSlice<P, S, kStates, W>;

  // from: where the parameter is read.
  template <int W>
  __device__ __forceinline__ void read(int64_t at,
                                       const P* from,
                                       bool with_grad,
                                       Slice<W>& slice) const {
    slice.param = *reinterpret_cast<const Pack<P, W>*>(from + at);
    if (with_grad) slice.grad = *reinterpret_cast<const Pack<P, W>*>(grad + at);
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      slice.state[n] = *reinterpret_cast<const Pack<S, W>*>(state[n] + at);
    }
  }
  template <int W>
  __device__ __forceinline__ void read_one(
      int64_t at, const P* from, bool with_grad, int k, Slice<W>& slice) const {
    slice.param.x[k] = from[at];
    if (with_grad) slice.grad.x[k] = grad[at];
#pragma unroll
    for (int n = 0; n < kStates; ++n) slice.state[n].x[k] = state[n][at];
  }

  template <int W>
  __device__ __forceinline__ void write_param(const Slice<W>& slice, int64_t at) const {
    store_at_once(param + at, slice.param);
  }
  template <int W>
  __device__ __forceinline__ void write_states(const Slice<W>& slice, int64_t at, int end) const {
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      if (n < end) store_at_once(state[n] + at, slice.state[n]);
    }
  }
  template <int W>
  __device__ __forceinline__ void write_one_of_states(const Slice<W>& slice,
                                                      int k,
                                                      int64_t at,
                                                      int end) const {
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      if (n < end) state[n][at] = slice.state[n].x[k];
    }
  }

  // New averages of element k, rounded as they are stored.
  template <int W>
  __device__ __forceinline__ void average(ProjectSlice<P, S, kStates, W>& slice, int k) const {
    T a = load(slice.state[0].x[k]), b = kStates > 1 ? load(slice.state[kStates - 1].x[k]) : T(0);
    // No variant averages differently.
    Rule::template average<0, T>(h, load(slice.grad.x[k]), a, b);
    store(slice.state[0].x[k], a);
    if (kStates > 1) store(slice.state[kStates - 1].x[k], b);
  }

  // From the averages as they are stored.
  template <int W>
  __device__ __forceinline__ T direction(const ProjectSlice<P, S, kStates, W>& slice, int k) const {
    const T g = load(slice.grad.x[k]), a = load(slice.state[0].x[k]);
    const T b = kStates > 1 ? load(slice.state[kStates - 1].x[k]) : T(0);
    return kReadsAnyGrad && variant == 1 ? Rule::template direction<1, T>(h, g, a, b)
                                         : Rule::template direction<0, T>(h, g, a, b);
  }

  __device__ __forceinline__ bool reads_grad() const { return kReadsAnyGrad && variant == 1; }
  __device__ __forceinline__ bool projects_buffer() const {
    return kProjectsAnyBuffer && variant == 0;
  }
};

// Kernels choose among the variants as they run, so that all share one.
template <class Rule>
constexpr bool kHasKnownVariants =
    !Rule::kReadsGrad[0] && Rule::kReadsGrad[1] && !Rule::kProjectsBuffer[1] &&
    (Rule::kVariants < 3 || (!Rule::kReadsGrad[2] && !Rule::kProjectsBuffer[2]));

// -- visitors -------------------------------------------------------------------------------------

// What all of them read and write: the parameter, the gradient, the states before `n_states`.
template <class Rule, class P, class S>
struct Visitor {
  using T = typename Compute<P>::type;
  template <int W>
  using Slice = typename Arithmetic<Rule, P, S>::template Slice<W>;

  const Arithmetic<Rule, P, S>& of;
  const P* from;  // where the parameter is read
  bool reads_grad, writes_param;
  int n_states;

  template <int W>
  __device__ __forceinline__ bool is_aligned(int64_t at) const {
    return of.template is_aligned<W>(at) && gpu::is_aligned<P, W>(from + at);
  }
  template <int W>
  __device__ __forceinline__ void read(int64_t at, Slice<W>& slice) const {
    of.read(at, from, reads_grad, slice);
  }
  template <int W>
  __device__ __forceinline__ void read_one(int64_t at, int k, Slice<W>& slice) const {
    of.read_one(at, from, reads_grad, k, slice);
  }
  template <int W>
  __device__ __forceinline__ void write(const Slice<W>& slice, int64_t at) const {
    if (writes_param) of.write_param(slice, at);
    of.write_states(slice, at, n_states);
  }
  template <int W>
  __device__ __forceinline__ void write_one(const Slice<W>& slice, int k, int64_t at) const {
    if (writes_param) of.param[at] = slice.param.x[k];
    of.write_one_of_states(slice, k, at, n_states);
  }
};

// The whole update of a tensor without a channel view, but for the projection of its layer view.
template <class Rule, class P, class S>
struct Sweeper : Visitor<Rule, P, S> {
  using Base = Visitor<Rule, P, S>;
  using T = typename Base::T;
  const bool with_sums;

  __device__ __forceinline__ Sweeper(const Arithmetic<Rule, P, S>& of, bool sums, bool param)
      : Base{of, of.source, true, param, of.kStates}, with_sums(sums) {}

  template <int W, int kN>
  __device__ __forceinline__ void apply(typename Base::template Slice<W>& slice,
                                        int n,
                                        T (&lanes)[kSums][kN],
                                        int first) const {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (k >= n) break;
      this->of.average(slice, k);
      const T u = this->of.direction(slice, k);
      T p = load(slice.param.x[k]);
      if (with_sums) add(p, load(slice.grad.x[k]), u, lanes, first + k);
      write_plain(this->of.h, p, u);
      store(slice.param.x[k], p);
    }
  }

  template <int kN>
  __device__ __forceinline__ static void add(
      T weight, T grad, T direction, T (&lanes)[kSums][kN], int k) {
    lanes[kGradWeight][k] += grad * weight;
    lanes[kGradGrad][k] += grad * grad;
    lanes[kWeightWeight][k] += weight * weight;
    lanes[kDirectionWeight][k] += direction * weight;
  }
};

// The averages of a row with a channel view, and its sums w.w and w.u.
template <class Rule, class P, class S>
struct Averager : Visitor<Rule, P, S> {
  using Base = Visitor<Rule, P, S>;

  __device__ __forceinline__ explicit Averager(const Arithmetic<Rule, P, S>& of)
      : Base{of, of.source, true, false, of.kStates} {}

  template <int W, int kN>
  __device__ __forceinline__ void apply(typename Base::template Slice<W>& slice,
                                        int n,
                                        double (&lanes)[2][kN],
                                        int first) const {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (k >= n) break;
      this->of.average(slice, k);
      const double w = static_cast<double>(load(slice.param.x[k]));
      lanes[0][first + k] += w * w;
      lanes[1][first + k] += static_cast<double>(this->of.direction(slice, k)) * w;
    }
  }
};

// The parameter from averages that are stored.
template <class Rule, class P, class S>
struct Writer : Visitor<Rule, P, S> {
  using Base = Visitor<Rule, P, S>;
  using T = typename Base::T;
  const Write how;
  T radial;          // how == projected
  Repair<T> repair;  // how == repaired

  __device__ __forceinline__ Writer(const Arithmetic<Rule, P, S>& of, Write as)
      // A repair starts from the result that was stored.
      : Base{of,
             as == Write::repaired ? of.param : of.source,
             of.reads_grad(),
             true,
             as != Write::plain && of.projects_buffer()},
        how(as) {}
  __device__ __forceinline__ Writer(const Arithmetic<Rule, P, S>& of, double c)
      : Writer(of, Write::projected) {
    radial = static_cast<T>(c);
  }

  template <int W, int kN>
  __device__ __forceinline__ void apply(typename Base::template Slice<W>& slice,
                                        int n,
                                        double (&)[1][kN],
                                        int) const {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (k >= n) break;
      T p = load(slice.param.x[k]), u = this->of.direction(slice, k);
      if (how == Write::plain) write_plain(this->of.h, p, u);
      if (how == Write::projected) write_projected(this->of.h, radial, p, u);
      if (how == Write::repaired) repair.apply(this->of.h, p, u);
      store(slice.param.x[k], p);
      store(slice.state[0].x[k], u);
    }
  }
};

// -- kernels --------------------------------------------------------------------------------------

// Rows [begin, end) of a tensor with a channel view whose rows are short.
template <class Rule, class P, class S>
__device__ __forceinline__ void update_by_groups(const Tensor& t,
                                                 const Arithmetic<Rule, P, S>& of,
                                                 const Items& items,
                                                 int64_t begin,
                                                 int64_t end) {
  const Group group(items.row_size);
  const int n_groups = kThreads / group.size;
  for (int64_t first = begin; first < end; first += n_groups) {
    const int64_t row = first + threadIdx.x / group.size;
    Place place(items, row < end ? row : begin);
    if (row >= end) place.size = 0;
    const Averager<Rule, P, S> averager(of);
    double both[2], sums[kSums] = {};
    sum_by_group(averager, place, group, both);
    sums[kWeightWeight] = both[0];
    sums[kDirectionWeight] = both[1];
    const Writer<Rule, P, S> writer(of, radial_part(t.test, sums));
    double none[1][kHeld];
#pragma unroll 1
    for (int pass = 0; pass < group.n_passes; ++pass) {
      visit_pass(writer, place, group, pass, none);
    }
  }
}

// The same for longer rows, of up to a chunk.
template <class Rule, class P, class S>
__device__ __forceinline__ void update_by_block(const Tensor& t,
                                                const Arithmetic<Rule, P, S>& of,
                                                const Items& items,
                                                int64_t begin,
                                                int64_t end,
                                                double* shared) {
  for (int64_t item = begin; item < end; ++item) {
    const Place place(items, item);
    const Averager<Rule, P, S> averager(of);
    double both[2], sums[kSums] = {}, none[1][kLanesPerThread];
    sum_by_block(averager, place, shared, both);
    if (items.are_long()) {
      const int64_t chunk = place.is_contiguous ? item % items.n_chunks : item / items.n_rows;
      double* const to = t.sums + 2 * (place.row * items.n_chunks + chunk);
      if (threadIdx.x > 0) continue;
      to[0] = both[0];
      to[1] = both[1];
      continue;
    }
    sums[kWeightWeight] = both[0];
    sums[kDirectionWeight] = both[1];
    const Writer<Rule, P, S> writer(of, radial_part(t.test, sums));
    visit_by_block(writer, place, none);
  }
}

// Two blocks of a multiprocessor, whose 65,536 registers ptxas is to share out.
template <class Rule, class P, class S>
__global__ void __launch_bounds__(kThreads, 2)
    project_update_kernel(const Phases phases, const int variant) {
  PYOPTIM_SHARED(double, shared, kSums*(kLanes + 1));
  if (phases.found_inf && *phases.found_inf != 0) return;
  const Tensor& t = phases.tensors[phases.tensor_of[blockIdx.x]];
  const Arithmetic<Rule, P, S> of(t, variant);
  const int64_t tile = static_cast<int32_t>(blockIdx.x) - t.first_tile;
  if (!t.has_failed) {
    const Items items(t);
    const int64_t begin = items.first(tile, t.n_tiles), end = items.first(tile + 1, t.n_tiles);
    if (items.are_for_groups()) return update_by_groups(t, of, items, begin, end);
    return update_by_block(t, of, items, begin, end, shared);
  }
  const bool has_rows = t.n_rows > 0;
  const Sweeper<Rule, P, S> sweeper(of, has_rows, !(has_rows && is_deferred(of.h)));
  typename Compute<P>::type lanes[kSums][kLanesPerThread] = {};
  double sums[kSums];
  visit_columns(sweeper, Place(tile * kChunk, t.numel), lanes);
  if (!has_rows) return;
  combine_block(lanes, shared, sums);
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int s = 0; s < kSums; ++s) t.sums[tile * kSums + s] = sums[s];
}

// A tile of a tensor with a channel view and long rows.
template <class Rule, class P, class S>
__device__ __forceinline__ void write_long_rows(const Tensor& t,
                                                const Arithmetic<Rule, P, S>& of,
                                                int64_t tile) {
  const Items items(t);
  const double* const radial = t.sums + static_cast<int64_t>(t.n_tiles) * kItemSums;
  const int64_t begin = items.first(tile, t.n_tiles), end = items.first(tile + 1, t.n_tiles);
  for (int64_t item = begin; item < end; ++item) {
    const Place place(items, item);
    const Writer<Rule, P, S> writer(of, radial[place.row]);
    double none[1][kLanesPerThread];
    visit_by_block(writer, place, none);
  }
}

// Three of these; left the choice, ptxas took 64 registers and a stack frame for one (sm_90).
template <class Rule, class P, class S>
__global__ void __launch_bounds__(kThreads, sizeof(P) == 8 ? 2 : 3)
    project_write_kernel(const Phases phases, const int variant) {
  using T = typename Compute<P>::type;
  if (phases.found_inf && *phases.found_inf != 0) return;
  const Tensor& t = phases.tensors[phases.tensor_of[blockIdx.x]];
  const int64_t tile = static_cast<int32_t>(blockIdx.x) - t.first_tile;
  if (t.n_rows == 0) return;
  if (!t.has_failed) {
    if (t.numel / t.n_rows > kChunk) write_long_rows(t, Arithmetic<Rule, P, S>(t, variant), tile);
    return;
  }
  const Arithmetic<Rule, P, S> of(t, variant);
  const bool deferred = is_deferred(of.h);
  if (!deferred && !t.is_layer) return;
  Writer<Rule, P, S> writer(of,
                            !t.is_layer ? Write::plain
                            : deferred  ? Write::projected
                                        : Write::repaired);
  writer.radial = static_cast<T>(radial_part(of.h, t.layer));
  writer.repair = Repair<T>(of.h, t.layer);
  double none[1][kLanesPerThread];
  visit_by_block(writer, Place(tile * kChunk, t.numel), none);
}

// -- host -----------------------------------------------------------------------------------------

template <template <class> class R, class P, class S>
cudaError_t project_with(const Update& update, cudaStream_t stream) {
  using Rule = R<typename Compute<P>::type>;
  using Hyper = typename Rule::Hyper;
  using T = typename Compute<P>::type;
  static_assert(kHasKnownVariants<Rule>, "the kernels take these variants as they run");
  static_assert(Rule::kStates[0] <= 2, "Tensor has room for two states");
  constexpr TestFields kFields = {static_cast<int>(offsetof(Hyper, eps) / sizeof(T)),
                                  static_cast<int>(offsetof(Hyper, delta) / sizeof(T))};
  Phases phases;
  cudaError_t status = update.factors.unscales() ? unscale(update, stream) : cudaSuccess;
  if (status == cudaSuccess) status = deal(update, kFields, &phases, stream);
  if (status != cudaSuccess || phases.n_tensors == 0) return status;
  status =
      launch(project_update_kernel<Rule, P, S>, phases.n_tiles, stream, phases, update.variant);
  if (!phases.has_rows || status != cudaSuccess) return status;
  if (phases.has_long_rows) status = fold_long_rows(phases, stream);
  if (status == cudaSuccess) status = decide(phases, stream);
  if (status != cudaSuccess) return status;
  return launch(project_write_kernel<Rule, P, S>, phases.n_tiles, stream, phases, update.variant);
}

template <template <class> class R>
cudaError_t project(const Update& update, cudaStream_t stream) {
  if (update.variant < 0 || update.variant >= R<float>::kVariants) return cudaErrorInvalidValue;
  switch (update.dtypes) {
    case DTypeSet::f64:
      return project_with<R, double, double>(update, stream);
    case DTypeSet::f32:
      return project_with<R, float, float>(update, stream);
    case DTypeSet::bf16:
      return project_with<R, Bf16, Bf16>(update, stream);
    case DTypeSet::f16:
      return project_with<R, F16, F16>(update, stream);
    case DTypeSet::bf16_state32:
      return project_with<R, Bf16, float>(update, stream);
    case DTypeSet::f16_state32:
      return project_with<R, F16, float>(update, stream);
    case DTypeSet::bf16_master:
    case DTypeSet::f16_master:
    case DTypeSet::bf16_master_state32:
    case DTypeSet::f16_master_state32:
    case DTypeSet::count:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace pyoptim::gpu
