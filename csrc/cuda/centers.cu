// Distances to centres: one step of k-center, and to the centre of the own class.
#include "cuda/launchers.hpp"
#include "cuda/scores.hpp"

namespace pyoptim::gpu {
namespace {

// The farther of two, the lower row where they are equally far; and the first that is no number.
__device__ __forceinline__ void keep_farthest(Farthest* best, const Farthest& other) {
  const bool is_farther =
      other.row >= 0 && (best->row < 0 || other.sqdist > best->sqdist ||
                         (other.sqdist == best->sqdist && other.row < best->row));
  if (is_farther) {
    best->sqdist = other.sqdist;
    best->row = other.row;
  }
  const bool is_first = other.nan_row >= 0 && (best->nan_row < 0 || other.nan_row < best->nan_row);
  if (is_first) best->nan_row = other.nan_row;
}

// The farthest of all threads, in thread 0.
__device__ __forceinline__ Farthest farthest_of_block(Farthest best) {
  PYOPTIM_SHARED(Farthest, shared, kThreads);
  shared[threadIdx.x] = best;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x >= static_cast<unsigned>(half)) continue;
    keep_farthest(&best, shared[threadIdx.x + half]);
    shared[threadIdx.x] = best;
  }
  return best;
}

template <class E>
__global__ void __launch_bounds__(kThreads)
    step_center_kernel(const CenterStep __grid_constant__ work) {
  const int64_t center_row = work.center ? 0 : work.former->row;
  Farthest best = {-1, -1, -1};
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kQuads;
  const int64_t rounds = center_row < 0 ? 0 : (work.x.n + stride - 1) / stride;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t row =
        round * stride + static_cast<int64_t>(blockIdx.x) * kQuads + threadIdx.x / kQuad;
    const bool is_row = row < work.x.n;
    const E* const x = row_of<E>(work.x, is_row ? row : 0);
    const int64_t d = is_row ? work.x.d : 0;
    const double sqdist = work.center ? sum_terms<false>(x, work.center, d)
                                      : sum_terms<false>(x, row_of<E>(work.x, center_row), d);
    if (!is_row || threadIdx.x % kQuad > 0) continue;
    double least = work.min_sqdist[row];
    if (sqdist < least) work.min_sqdist[row] = least = sqdist;
    keep_farthest(&best, {least, row, sqdist == sqdist ? -1 : row});
  }
  best = farthest_of_block(best);
  if (threadIdx.x == 0) work.partials[blockIdx.x] = best;
}

__global__ void __launch_bounds__(kThreads)
    farthest_kernel(const Farthest* partials, int64_t n, Farthest* found) {
  Farthest best = {-1, -1, -1};
  for (int64_t i = threadIdx.x; i < n; i += kThreads) keep_farthest(&best, partials[i]);
  best = farthest_of_block(best);
  if (threadIdx.x == 0) *found = best;
}

template <class E>
__global__ void __launch_bounds__(kThreads)
    center_sqdist_kernel(const CenterSqdist __grid_constant__ work) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kQuads + threadIdx.x / kQuad;
  const bool is_row = row < work.x.n;
  const E* const x = row_of<E>(work.x, is_row ? row : 0);
  const double* const center = work.centers + (is_row ? work.labels[row] : 0) * work.x.d;
  const double sqdist = sum_terms<false>(x, center, is_row ? work.x.d : 0);
  if (is_row && threadIdx.x % kQuad == 0) work.out[row] = sqdist;
}

}  // namespace

cudaError_t step_center(const CenterStep& work, cudaStream_t stream) {
  const int64_t blocks = std::clamp<int64_t>((work.x.n + kQuads - 1) / kQuads, 1, kFarthestParts);
  const cudaError_t status = with_type(work.x.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    return launch(step_center_kernel<E>, blocks, stream, work);
  });
  if (status != cudaSuccess) return status;
  return launch(farthest_kernel, 1, stream, work.partials, blocks, work.found);
}

cudaError_t center_sqdist(const CenterSqdist& work, cudaStream_t stream) {
  if (work.x.n == 0) return cudaSuccess;
  return with_type(work.x.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    const int64_t blocks = (work.x.n + kQuads - 1) / kQuads;
    return launch(center_sqdist_kernel<E>, blocks, stream, work);
  });
}

}  // namespace pyoptim::gpu
