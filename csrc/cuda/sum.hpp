// The update of a rule that yields terms: it keeps what it reads of the parameters, and adds up the
// terms in the order of reduce/order.hpp, with one partial result per chunk. It writes no states.
#pragma once

#include "cuda/phases.hpp"
#include "cuda/rows.hpp"
#include "rules/traits.hpp"

namespace pyoptim::gpu {
namespace {

// W elements of every array, in registers.
template <class P, class S, class M, int kStates, int W>
struct TermSlice {
  Pack<M, W> source;
  Pack<P, W> param, grad;
  Pack<S, W> state[kStates > 0 ? kStates : 1];
};

// Visits the elements of a row, as phases.hpp has it. M: float where the parameter has a master,
// which is its source and still holds what was read; else P.
template <class Rule, int V, class P, class S, class M>
struct Terms {
  using T = typename Compute<P>::type;
  static_assert(!kWritesStates<Rule>, "these states are not written back");
  static constexpr int kStates = Rule::kStates[V];
  static constexpr bool kSaves = std::is_same_v<P, M>;
  using OfRule = Table<kStates, true>;
  template <int W>
  using Slice = TermSlice<P, S, M, kStates, W>;

  P* const param;
  const M* const source;
  const P* const grad;
  P* const saved;  // or null
  const S* state[kStates > 0 ? kStates : 1];
  const typename Rule::Hyper h;
  const Multiplier<T> by;

  __device__ __forceinline__ Terms(const OfRule& table, int row)
      : param(static_cast<P*>(table.arrays[0][row])),
        source(static_cast<const M*>(table.arrays[0][table.source(row)])),
        grad(static_cast<const P*>(table.arrays[1][row])),
        saved(static_cast<P*>(kSaves ? table.arrays[OfRule::kSaved][row] : nullptr)),
        h(read_hyper<typename Rule::Hyper>(table, row)),
        by(table) {
#pragma unroll
    for (int n = 0; n < kStates; ++n) state[n] = static_cast<const S*>(table.arrays[2 + n][row]);
  }

  template <int W>
  __device__ __forceinline__ bool is_aligned(int64_t at) const {
    bool aligned = gpu::is_aligned<P, W>(param + at) && gpu::is_aligned<M, W>(source + at) &&
                   gpu::is_aligned<P, W>(grad + at) && gpu::is_aligned<P, W>(saved + at);
#pragma unroll
    for (int n = 0; n < kStates; ++n) aligned = aligned && gpu::is_aligned<S, W>(state[n] + at);
    return aligned;
  }

  template <int W>
  __device__ __forceinline__ void read(int64_t at, Slice<W>& slice) const {
    slice.source = *reinterpret_cast<const Pack<M, W>*>(source + at);
    slice.grad = *reinterpret_cast<const Pack<P, W>*>(grad + at);
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      slice.state[n] = *reinterpret_cast<const Pack<S, W>*>(state[n] + at);
    }
  }
  template <int W>
  __device__ __forceinline__ void read_one(int64_t at, int k, Slice<W>& slice) const {
    slice.source.x[k] = source[at];
    slice.grad.x[k] = grad[at];
#pragma unroll
    for (int n = 0; n < kStates; ++n) slice.state[n].x[k] = state[n][at];
  }

  // What is saved are the bits as they were read.
  template <int W>
  __device__ __forceinline__ void write(const Slice<W>& slice, int64_t at) const {
    store_at_once(param + at, slice.param);
    if constexpr (kSaves) {
      if (saved) store_at_once(saved + at, slice.source);
    }
  }
  template <int W>
  __device__ __forceinline__ void write_one(const Slice<W>& slice, int k, int64_t at) const {
    param[at] = slice.param.x[k];
    if constexpr (kSaves) {
      if (saved) saved[at] = slice.source.x[k];
    }
  }

  template <int W, int kN>
  __device__ __forceinline__ void apply(Slice<W>& slice,
                                        int n,
                                        double (&lanes)[1][kN],
                                        int first) const {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (k >= n) break;
      T p = load(slice.source.x[k]), s[kMaxStates] = {};
#pragma unroll
      for (int i = 0; i < kStates; ++i) s[i] = load(slice.state[i].x[k]);
      const T g = by.clipped(load(slice.grad.x[k]));
      const auto term = Rule::template update<V, T>(h, p, g, s[0], s[1], s[2]);
      store(slice.param.x[k], p);
      lanes[0][first + k] += static_cast<double>(term.a) * static_cast<double>(term.b);
    }
  }
};

// Blocks that ptxas is to make room for. With 0, its own choice, it put values aside in some
// kernels over many arrays of 16-bit elements (sm_100, sm_120) rather than take the registers.
template <class P, int kStates>
constexpr int kMinSumBlocks = sizeof(P) == 2 && kStates > 1 ? 2 : 0;

template <class Rule, int V, class P, class S, class M>
__global__ void __launch_bounds__(kThreads, kMinSumBlocks<P, Rule::kStates[V]>)
    sum_kernel(const Table<Rule::kStates[V], true> __grid_constant__ table) {
  PYOPTIM_SHARED(double, shared, kLanes + 1);
  if (table.factors.found_inf && *table.factors.found_inf != 0) return;
  using OfRule = Table<Rule::kStates[V], true>;
  const Part part(table);
  double* const to = static_cast<double*>(table.arrays[OfRule::kSumsAt][part.row]);
  double lanes[1][kLanesPerThread] = {}, sums[1];
  visit_by_block(Terms<Rule, V, P, S, M>(table, part.row), Place(part.begin, part.end), lanes);
  if (to == nullptr) return;
  combine_block(lanes, shared, sums);
  if (threadIdx.x == 0) to[part.index] = sums[0];
}

// -- host -----------------------------------------------------------------------------------------

template <class Rule, int V, class P, class S, class M>
cudaError_t update_and_sum(const Update& update, cudaStream_t stream) {
  if (update.factors.unscales()) return cudaErrorInvalidValue;  // a trial writes no gradient
  int64_t total = 0;
  for (int64_t r = 0; r < update.n_rows; ++r) total += update.rows[r]->numel;
  const int64_t chunk = update.sums ? kChunk : std::min(choose_chunk(total), kChunk);
  using OfRule = Table<Rule::kStates[V], true>;
  return Updater<OfRule>(sum_kernel<Rule, V, P, S, M>, update, chunk, stream).run();
}

}  // namespace
}  // namespace pyoptim::gpu
