// Sums on the device in the order of reduce/order.hpp: lanes in registers and in shared memory.
#pragma once

#include "cuda/device.hpp"
#include "reduce/order.hpp"

namespace pyoptim::gpu {
namespace {

using reduce::Kind;
using reduce::kLanes;

constexpr int kWarps = kThreads / kWarp;
constexpr int kLanesPerThread = kLanes / kThreads;
constexpr int kLanesPerWarp = kLanes / kWarp;  // of one thread, where a warp has them all

// Combines N lanes of one thread in halves. A recursion: a loop over the halves would not be
// unrolled, and the lanes would lie in memory.
template <Kind kKind, int N>
__device__ __forceinline__ double combine_lanes(double* lanes) {
  if constexpr (N > 1) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) lanes[i] = reduce::combine<kKind>(lanes[i], lanes[i + N / 2]);
    return combine_lanes<kKind, N / 2>(lanes);
  }
  return lanes[0];
}

// Thread 0 gets the result.
template <Kind kKind>
__device__ __forceinline__ double combine_warp(double lane) {
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
    lane = reduce::combine<kKind>(lane, __shfl_down_sync(0xffffffffu, lane, half));
  }
  return lane;
}

// All lanes in shared memory to one value, in thread 0 of the warp that calls.
template <Kind kKind>
__device__ __forceinline__ double combine_shared(const double* shared) {
  double lanes[kLanesPerWarp];
#pragma unroll
  for (int i = 0; i < kLanesPerWarp; ++i) lanes[i] = shared[i * kWarp + threadIdx.x % kWarp];
  return combine_warp<kKind>(combine_lanes<kKind, kLanesPerWarp>(lanes));
}

}  // namespace
}  // namespace pyoptim::gpu
