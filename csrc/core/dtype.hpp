// Element types and their exact, branch-free conversions to the type the arithmetic runs in.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PYOPTIM_HD __host__ __device__ __forceinline__
#else
#define PYOPTIM_HD inline __attribute__((always_inline))
#endif

namespace pyoptim {

enum class DType : int { f64 = 0, f32 = 1, bf16 = 2, f16 = 3, unsupported = 4 };

inline int item_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

inline const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16", "unsupported"};
  return kNames[static_cast<int>(dtype)];
}

// The internal linkage keeps one translation unit's instruction set out of another's inline functions.
namespace {

template <class To, class From>
PYOPTIM_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

struct Bf16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

// gcc 12 leaves loops over _Float16 and __bf16 scalar; these integer forms vectorise on every instruction set.
template <class T>
PYOPTIM_HD T load(const T& x) {
  return x;
}

PYOPTIM_HD float load(const Bf16& x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Shifts the exponent by integer addition. A subnormal is renormalised by one subtraction of normal numbers, so that
// a caller's flush-denormals mode cannot change it.
PYOPTIM_HD float load(const F16& x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + 0x38000000u;
  const uint32_t inf_nan = magnitude + 0x70000000u;
  const float subnormal = bit_cast<float>(magnitude + 0x38800000u) - bit_cast<float>(0x38800000u);
  uint32_t bits = exponent == 0x0f800000u ? inf_nan : normal;
  bits = exponent == 0 ? bit_cast<uint32_t>(subnormal) : bits;
  return bit_cast<float>(bits | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

PYOPTIM_HD void store(double& to, double x) { to = x; }
PYOPTIM_HD void store(float& to, float x) { to = x; }

// Round to nearest even; a NaN stays a quiet NaN (0x7fc0, as torch writes it).
PYOPTIM_HD void store(Bf16& to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

PYOPTIM_HD void store(F16& to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude + 0xc8000fffu + odd) >> 13;
  // Adding 0.5 aligns the last bit of a float16 subnormal with the last bit of the sum, which then rounds it.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t inf_nan = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? inf_nan : half;
  to.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// The type the arithmetic runs in: float64 for float64 elements, float32 for every other.
template <class Element>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

template <class T>
PYOPTIM_HD T max_keep_nan(T a, T b) {
  const T larger = !(b <= a) ? b : a;
  return a != a ? a : larger;
}

}  // namespace
}  // namespace pyoptim
