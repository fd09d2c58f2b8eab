// The tensor cores' words, and copies that go on beside them: PTX, or what it means on a CPU.
#pragma once

#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "core/dtype.hpp"
#include "cuda/device.hpp"

namespace pyoptim::gpu {
namespace {

// 16-bit elements that are multiplied: E is Bf16 or F16.
//
// A thread's part of a 16 x 16 matrix a, of a 16 x 8 matrix b and of a 16 x 8 matrix c, with g =
// lane / 4 and t = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point
// type"):
//
//     a[0], a[1], a[2], a[3]: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), and the columns
//     after; b[0], b[1]: (2t, g), (2t + 8, g), and the rows after; c: (g, 2t), (g, 2t + 1),
//     (g + 8, 2t), (g + 8, 2t + 1).

#if defined(PYOPTIM_EMULATOR)

template <class E>
float element_of(uint64_t words, int at) {
  return load(E{static_cast<uint16_t>(words >> (16 * at))});
}

// The unit in which 24 bits hold a number of that size.
inline double unit_of(double x) {
  return bit_cast<double>(bit_cast<uint64_t>(x) & 0x7ff0000000000000u) * 0x1p-23;
}
inline double cut(double x, double unit) {
  return static_cast<double>(static_cast<int64_t>(x * (1 / unit))) * unit;
}

// What is known of the hardware (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA
// tensor cores", 2021): four or more products and c are aligned to the largest of them, cut after
// 24 bits and added up; here as many as are worst, four.
inline float add_products(float c, const float* x, const float* y) {
  for (int k = 0; k < 16; k += 4) {
    double terms[5] = {c}, largest = std::fabs(c), sum = 0, all = c;
    for (int i = 0; i < 4; ++i) {
      terms[i + 1] = static_cast<double>(x[k + i]) * y[k + i];
      all += terms[i + 1];
      if (std::fabs(terms[i + 1]) > largest) largest = std::fabs(terms[i + 1]);
    }
    if (largest == 0) continue;
    // Infinite, NaN, or about to be infinite.
    if (!(std::fabs(all) + largest < 1e38)) return static_cast<float>(all);
    for (const double term : terms) sum += cut(term, unit_of(largest));
    c = sum == 0 ? 0 : static_cast<float>(cut(sum, unit_of(sum)));
  }
  return c;
}

// A thread's words of a and b. A thread can be one product ahead of another, not two.
struct Words {
  uint64_t a[2], b;  // a[0] and a[2], a[1] and a[3], b[0] and b[1]
};
inline Words words_of[kThreads][2];
inline uint8_t turn_of[kThreads];

template <class E>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto pair = [](uint32_t low, uint32_t high) {
    return low | static_cast<uint64_t>(high) << 32;
  };
  const unsigned self = threadIdx.x, first = self / 32 * 32;
  const int turn = turn_of[self] ^= 1;
  words_of[self][turn] = {{pair(a[0], a[2]), pair(a[1], a[3])}, pair(b[0], b[1])};
  (void)emulator::meet_warp(PYOPTIM_PLACE("mma"), ~0u, static_cast<uint64_t>(turn));
  const int g = self % 32 / 4, t = self % 4;
  for (int i = 0; i < 4; ++i) {
    float x[16], y[16];
    uint64_t any = 0;
    for (int from = 0; from < 4; ++from) {
      const uint64_t left = words_of[first + 4 * g + from][turn].a[i / 2];
      const uint64_t right = words_of[first + 4 * (2 * t + i % 2) + from][turn].b;
      any |= left;
      for (int at = 0; at < 4; ++at) {
        const int k = at / 2 * 8 + 2 * from + at % 2;
        x[k] = element_of<E>(left, at);
        y[k] = element_of<E>(right, at);
      }
    }
    if (any) c[i] = add_products(c[i], x, y);
  }
}

// Four 8 x 8 matrices: thread l gives the address of row l % 8 of matrix l / 8, and gets of each
// the elements 2 (l % 4) and the one after of row l / 4.
inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const uint64_t* const rows =
      emulator::meet_warp(PYOPTIM_PLACE("ldmatrix"), ~0u, reinterpret_cast<uint64_t>(row));
  const unsigned lane = threadIdx.x % 32;
  for (unsigned m = 0; m < 4; ++m) {
    const char* const at = reinterpret_cast<const char*>(rows[8 * m + lane / 4]);
    std::memcpy(&to[m], at + 4 * (lane % 4), 4);
  }
}

// Asks for 16 bytes of shared memory: n from device memory, zeros behind them.
inline void copy_async(void* to, const void* from, int n) {
  if (reinterpret_cast<uintptr_t>(from) % 16) std::abort();
  emulator::copy_later(to, from, n, 16);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int kGroupsLeft>
void wait_for_copies() {
  emulator::wait_for_copies(kGroupsLeft);
}

#else

template <class E>
__device__ __forceinline__ void multiply_add(float (&c)[4],
                                             const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<E, Bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Four 8 x 8 matrices: thread l gives the address of row l % 8 of matrix l / 8, and gets of each
// the elements 2 (l % 4) and the one after of row l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// Asks for 16 bytes of shared memory: n from device memory, zeros behind them.
__device__ __forceinline__ void copy_async(void* to, const void* from, int n) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(n)
      : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kGroupsLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

#endif

}  // namespace
}  // namespace pyoptim::gpu
