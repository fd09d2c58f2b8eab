// Scores of pairs of rows on the device: the bits of coreset/kernels.inl.
#pragma once

#include <cmath>

#include "cuda/api.hpp"
#include "cuda/device.hpp"

namespace pyoptim::gpu {
namespace {

constexpr uint32_t kAll = 0xffffffffu;
// Four threads share a pair: each has four of the sixteen partial sums, whose elements lie side by
// side.
constexpr int kQuad = 4;
constexpr int kQuads = kThreads / kQuad;
constexpr int kScoreLanes = 16;
constexpr double kInfinity = __builtin_huge_val();

template <class E>
__device__ __forceinline__ const E* row_of(const Matrix& x, int64_t i) {
  return static_cast<const E*>(x.data) + (x.rows ? x.rows[i] : i) * x.stride;
}

template <class E>
__device__ __forceinline__ double wide(const E& x) {
  return static_cast<double>(load(x));
}

template <bool kIsProduct>
__device__ __forceinline__ double term(double x, double y) {
  const double difference = x - y;
  return kIsProduct ? x * y : difference * difference;
}

template <bool kIsProduct, int kBlocks, class X, class Y>
__device__ __forceinline__ void add_blocks(const X* x, const Y* y, double (&sums)[kQuad]) {
  Pack<X, kQuad> left[kBlocks];
  Pack<Y, kQuad> right[kBlocks];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    left[b] = *reinterpret_cast<const Pack<X, kQuad>*>(x + b * kScoreLanes);
    right[b] = *reinterpret_cast<const Pack<Y, kQuad>*>(y + b * kScoreLanes);
  }
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i)
      sums[i] += term<kIsProduct>(wide(left[b].x[i]), wide(right[b].x[i]));
  }
}

// The sum of products, or of squared differences, of two rows: every thread of the quad gets it.
// All threads of the warp have to call, those without a pair with d = 0.
template <bool kIsProduct, class X, class Y>
__device__ __forceinline__ double sum_terms(const X* x, const Y* y, int64_t d) {
  constexpr int kInFlight = 4;
  double sums[kQuad] = {};
  int64_t k = threadIdx.x % kQuad * kQuad;
  if (is_aligned<X, kQuad>(x) && is_aligned<Y, kQuad>(y)) {
    for (; k + (kInFlight - 1) * kScoreLanes + kQuad <= d; k += kInFlight * kScoreLanes)
      add_blocks<kIsProduct, kInFlight>(x + k, y + k, sums);
    for (; k + kQuad <= d; k += kScoreLanes) add_blocks<kIsProduct, 1>(x + k, y + k, sums);
  }
  for (; k < d; k += kScoreLanes) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (k + i < d) sums[i] += term<kIsProduct>(wide(x[k + i]), wide(y[k + i]));
    }
  }
  // The upper half of the lanes onto the lower.
#pragma unroll
  for (int half = kQuad / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) sums[i] += __shfl_down_sync(kAll, sums[i], half);
  }
  const double sum = (sums[0] + sums[2]) + (sums[1] + sums[3]);
  return __shfl_sync(kAll, sum, threadIdx.x % kWarp / kQuad * kQuad);
}

__device__ __forceinline__ double cosine_distance(double product, double xx, double yy) {
  if (xx == 0 || yy == 0) return 1;
  const double square = xx * yy;
  const bool is_normal = square > 1e-280 && square < 1e280;
  const double norms =
      is_normal ? Math<double>::sqrt(square) : Math<double>::sqrt(xx) * Math<double>::sqrt(yy);
  const double cosine = product / norms;
  return 1 - (cosine < -1 ? -1 : cosine > 1 ? 1 : cosine);
}

// What is to be minimised; inf - inf is as far as can be. A function of its own: a kernel has it in
// several places, and each would take as long to compile as the first.
template <class E>
__device__ PYOPTIM_NOINLINE double score_pair(Metric metric, const E* x, const E* y, int64_t d) {
  double score;
  if (metric == Metric::sqdist) {
    score = sum_terms<false>(x, y, d);
  } else {
    score = -sum_terms<true>(x, y, d);
    if (metric == Metric::cosine)
      score = cosine_distance(-score, sum_terms<true>(x, x, d), sum_terms<true>(y, y, d));
  }
  return score == score ? score : kInfinity;
}

// Whether a score comes before another: the lower index of equal scores. An index of -1 is none.
__device__ __forceinline__ bool is_before(double a, int64_t i, double b, int64_t j) {
  if (i < 0 || j < 0) return i >= 0;
  return a < b || (a == b && i < j);
}

}  // namespace
}  // namespace pyoptim::gpu
