// What every kernel is written with: CUDA itself, or the emulator that runs the same text on a CPU.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(PYOPTIM_EMULATOR)
#include "emulator/cuda.hpp"
#else
#include <cuda_runtime.h>
#define PYOPTIM_SHARED(T, name, n) __shared__ T name[n]
// As many bytes as the launch asks for, n elements; one for a kernel.
#define PYOPTIM_DYNAMIC_SHARED(T, name, n) extern __shared__ __align__(16) T name[]
#define PYOPTIM_NOINLINE __noinline__
#endif

namespace pyoptim::gpu {

constexpr int kThreads = 256;  // of every block
constexpr int kWarp = 32;

// What a kernel's parameters may hold: tables travel in them, so that a step allocates nothing,
// copies nothing and can be captured. Beyond 4 KB it takes CUDA 12.1's compiler, a driver of its
// age (probe asks for one) and compute capability 7.0.
#if defined(PYOPTIM_EMULATOR) || CUDART_VERSION >= 12010
constexpr int kParameterBytes = 32764;
#else
constexpr int kParameterBytes = 4096;
#endif

inline std::atomic<int64_t> n_launches{0};

#if defined(PYOPTIM_EMULATOR)

template <class... P>
cudaError_t launch(void (*kernel)(P...),
                   int64_t n_blocks,
                   cudaStream_t stream,
                   const std::remove_reference_t<P>&... parameters) {
  n_launches += 1;
  return emulator::run(n_blocks, kThreads, stream, [&] { kernel(parameters...); });
}

// With dynamic shared memory.
template <class... P>
cudaError_t launch_with(int shared_bytes,
                        void (*kernel)(P...),
                        int64_t n_blocks,
                        cudaStream_t stream,
                        const std::remove_reference_t<P>&... parameters) {
  (void)shared_bytes;
  return launch(kernel, n_blocks, stream, parameters...);
}

#else

// cudaLaunchKernel takes the parameters where they are; <<<>>> would copy a table once more.
template <class... P>
cudaError_t launch_with(int shared_bytes,
                        void (*kernel)(P...),
                        int64_t n_blocks,
                        cudaStream_t stream,
                        const std::remove_reference_t<P>&... parameters) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  // More than 48 KB have to be asked for; the answer may differ from device to device.
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  n_launches += 1;
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
  return cudaLaunchKernel(function,
                          dim3(static_cast<unsigned>(n_blocks)),
                          dim3(kThreads),
                          addresses,
                          static_cast<size_t>(shared_bytes),
                          stream);
}

template <class... P>
cudaError_t launch(void (*kernel)(P...),
                   int64_t n_blocks,
                   cudaStream_t stream,
                   const std::remove_reference_t<P>&... parameters) {
  return launch_with(0, kernel, n_blocks, stream, parameters...);
}

#endif

namespace {

// W elements that one access moves; at most 16 bytes at once.
template <class E, int W>
struct alignas(sizeof(E) * W < 16 ? sizeof(E) * W : 16) Pack {
  E x[W];
};

template <class E, int W>
__device__ __forceinline__ bool is_aligned(const E* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Pack<E, W>) == 0;
}

// W elements by one instruction, or one for each 16 bytes. Where another branch stores the same
// elements one by one, nvcc 13.0 makes one of both, which moves no more than an element at once.
template <class E, int W>
__device__ __forceinline__ void store_at_once(E* to, const Pack<E, W>& pack) {
#if defined(__CUDA_ARCH__)
  constexpr int kWords = sizeof(pack) / sizeof(uint32_t);
  static_assert(kWords == 2 || kWords % 4 == 0, "no instruction moves so many words");
  uint32_t words[kWords];
  std::memcpy(words, &pack, sizeof(pack));
  if constexpr (kWords == 2) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1])
                 : "memory");
  }
#pragma unroll
  for (int i = 0; i + 4 <= kWords; i += 4) {
    asm volatile(
        "st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<char*>(to) + 4 * i),
        "r"(words[i]),
        "r"(words[i + 1]),
        "r"(words[i + 2]),
        "r"(words[i + 3])
        : "memory");
  }
#else
  *reinterpret_cast<Pack<E, W>*>(to) = pack;
#endif
}

// The row that a block belongs to: the last one that starts no later. Rows without a block are in
// no table.
__device__ __forceinline__ int find_row(const int32_t* first_block, int n_rows, int32_t block) {
  int low = 0, high = n_rows;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace
}  // namespace pyoptim::gpu
