// Kernels that use the words of CUDA one by one; test_emulator.py knows what each has to write.
#include "cuda/device.hpp"

namespace pyoptim::gpu {
namespace {

constexpr unsigned kAll = 0xffffffffu;

__global__ void down(double* out) {
  out[threadIdx.x] = __shfl_down_sync(kAll, static_cast<double>(threadIdx.x), 3);
}

__global__ void across(double* out) {
  out[threadIdx.x] = __shfl_xor_sync(kAll, static_cast<float>(threadIdx.x), 5);
}

__global__ void from(double* out) {
  out[threadIdx.x] = __shfl_sync(kAll, static_cast<int>(threadIdx.x), 7);
}

// Half a warp alone, several times in a row: none may see the values of another time.
__global__ void half(double* out) {
  if (threadIdx.x % kWarp >= 16) return;
  double sum = 0;
  for (int i = 0; i < 4; ++i) {
    sum += __shfl_xor_sync(0xffffu, static_cast<double>(threadIdx.x) * (i + 1), 1);
  }
  out[threadIdx.x] = sum;
}

__global__ void ballot(double* out) {
  out[threadIdx.x] = __ballot_sync(kAll, threadIdx.x % 2 == 1);
}

__global__ void vote(double* out) {
  const int any = __any_sync(kAll, threadIdx.x == 40);
  const int all = __all_sync(kAll, threadIdx.x >= 32);
  out[threadIdx.x] = any + 2 * all;
}

__global__ void poison(double* out) {
  PYOPTIM_SHARED(double, shared, kThreads);
  out[threadIdx.x] = shared[threadIdx.x];
  shared[threadIdx.x] = 1.0;
}

__global__ void neighbour(double* out) {
  PYOPTIM_SHARED(double, shared, kThreads);
  for (int i = 0; i < 3; ++i) {
    shared[threadIdx.x] = 10.0 * threadIdx.x + i;
    __syncthreads();
    out[threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
    __syncthreads();
  }
}

__global__ void order(double* out) {
  static double n = 0;
  out[threadIdx.x] = n;
  n = n + 1;
}

__global__ void ended(double*) {
  if (threadIdx.x != 9) __syncthreads();
}

__global__ void elsewhere(double*) {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void missing(double* out) {
  if (threadIdx.x != 5) out[threadIdx.x] = __shfl_down_sync(kAll, out[threadIdx.x], 1);
}

__global__ void outside(double* out) {
  out[threadIdx.x] = __shfl_down_sync(1u, out[threadIdx.x], 1);
}

__global__ void mixed(double*) {
  if (threadIdx.x < kWarp) {
    __syncwarp(kAll);
  }
  if (threadIdx.x == 0) __syncwarp(kAll);
}

using Kernel = void (*)(double*);
constexpr Kernel kKernels[] = {down,
                               across,
                               from,
                               half,
                               ballot,
                               vote,
                               poison,
                               neighbour,
                               order,
                               ended,
                               elsewhere,
                               missing,
                               outside,
                               mixed};

}  // namespace
}  // namespace pyoptim::gpu

// Runs 3 blocks of one kernel; returns null or the error.
extern "C" __attribute__((visibility("default"))) const char* run_kernel(int index, double* out) {
  using namespace pyoptim::gpu;
  const cudaError_t status = launch(kKernels[index], 3, nullptr, out);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
