// The words of CUDA that the engine uses, for memory and threads of a CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// A table of 32 KB is not copied for every thread.
#define __grid_constant__ &

#define PYOPTIM_SHARED(T, name, n)   \
  static const char name##_site = 0; \
  T* const name = static_cast<T*>(pyoptim::gpu::emulator::shared(&name##_site, sizeof(T) * (n)))
#define PYOPTIM_DYNAMIC_SHARED(T, name, n) PYOPTIM_SHARED(T, name, n)
#define PYOPTIM_NOINLINE inline

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = struct EmulatedStream*;

cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
// Of a failed launch: what the emulator found.
const char* cudaGetErrorString(cudaError_t error);

namespace pyoptim::gpu::emulator {

struct Index {
  unsigned x;
};

// Where a thread waits. Threads meet there only with those that wait at the same place.
struct Place {
  const char* what;
  int line;
};

cudaError_t run(int64_t n_blocks,
                int n_threads,
                cudaStream_t stream,
                const std::function<void()>& kernel);
void* shared(const void* site, size_t bytes);
void meet_block(Place place);
// Returns the values of the warp's 32 threads once all of `mask` have come.
const uint64_t* meet_warp(Place place, uint32_t mask, uint64_t value);
unsigned lane();

// Copies that a thread has asked for arrive when it waits for them, and not before: until then
// their place holds NaN.
void copy_later(void* to, const void* from, int n, int size);
void commit_copies();
void wait_for_copies(int n_groups_left);

template <class T>
uint64_t to_bits(T x) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a warp exchanges at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  return bits;
}

template <class T>
T shuffle(Place place, uint32_t mask, T x, unsigned from) {
  const uint64_t* const values = meet_warp(place, mask, to_bits(x));
  // Out of the warp, or out of the mask: CUDA keeps the thread's own or has no defined value.
  if (from < 32 && (mask >> from & 1u)) std::memcpy(&x, &values[from], sizeof(T));
  return x;
}

inline uint32_t vote(Place place, uint32_t mask, bool x) {
  const uint64_t* const values = meet_warp(place, mask, x);
  uint32_t ballot = 0;
  for (unsigned i = 0; i < 32; ++i) ballot |= (mask >> i & 1u) && values[i] ? 1u << i : 0u;
  return ballot;
}

}  // namespace pyoptim::gpu::emulator

extern pyoptim::gpu::emulator::Index threadIdx, blockIdx, blockDim, gridDim;

#define PYOPTIM_PLACE(what) (pyoptim::gpu::emulator::Place{what, __LINE__})
#define __syncthreads() pyoptim::gpu::emulator::meet_block(PYOPTIM_PLACE("__syncthreads"))
#define __syncwarp(mask) \
  (void)pyoptim::gpu::emulator::meet_warp(PYOPTIM_PLACE("__syncwarp"), mask, 0)
#define __shfl_sync(mask, x, from) \
  pyoptim::gpu::emulator::shuffle(PYOPTIM_PLACE("__shfl_sync"), mask, x, from)
#define __shfl_down_sync(mask, x, delta) \
  pyoptim::gpu::emulator::shuffle(       \
      PYOPTIM_PLACE("__shfl_down_sync"), mask, x, pyoptim::gpu::emulator::lane() + (delta))
#define __shfl_xor_sync(mask, x, bits) \
  pyoptim::gpu::emulator::shuffle(     \
      PYOPTIM_PLACE("__shfl_xor_sync"), mask, x, pyoptim::gpu::emulator::lane() ^ (bits))
#define __ballot_sync(mask, x) pyoptim::gpu::emulator::vote(PYOPTIM_PLACE("__ballot_sync"), mask, x)
#define __any_sync(mask, x) \
  (pyoptim::gpu::emulator::vote(PYOPTIM_PLACE("__any_sync"), mask, x) != 0)
#define __all_sync(mask, x) \
  (pyoptim::gpu::emulator::vote(PYOPTIM_PLACE("__all_sync"), mask, x) == (mask))
