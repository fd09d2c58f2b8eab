// Element types and their exact, branch-free conversions to the type the arithmetic runs in.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PYOPTIM_HD __host__ __device__ __forceinline__
#else
#define PYOPTIM_HD inline __attribute__((always_inline))
#endif

namespace pyoptim {

enum class DType : int { f64 = 0, f32 = 1, bf16 = 2, f16 = 3, unsupported = 4 };

inline int item_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

inline const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16", "unsupported"};
  return kNames[static_cast<int>(dtype)];
}

// The internal linkage keeps one translation unit's instruction set out of another's inline
// functions.
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

// The conversions of the half types, on one element (X float, W uint32_t) or on a vector of them.
// Integer arithmetic without branches: gcc 12 leaves loops over _Float16 and __bf16 scalar.
template <class W>
PYOPTIM_HD W every(uint32_t value) {
  return W{} + value;
}

template <class X, class W>
PYOPTIM_HD X widen_bf16(W bits) {
  return bit_cast<X>(bits << 16);
}

// Round to nearest even; a NaN becomes the quiet NaN 0x7fc0, as torch writes it.
template <class W, class X>
PYOPTIM_HD W narrow_bf16(X x) {
  const W bits = bit_cast<W>(x);
  const W rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x != x ? every<W>(0x7fc0u) : rounded;
}

// Shifts the exponent by integer addition. A subnormal is renormalised by one subtraction of normal
// numbers, so that a caller's flush-denormals mode cannot change it.
template <class X, class W>
PYOPTIM_HD X widen_f16(W half) {
  const W magnitude = (half & 0x7fffu) << 13;
  const W exponent = magnitude & 0x0f800000u;
  const X subnormal = bit_cast<X>(magnitude + 0x38800000u) - bit_cast<X>(every<W>(0x38800000u));
  W bits = exponent == 0x0f800000u ? magnitude + 0x70000000u : magnitude + 0x38000000u;
  bits = exponent == 0u ? bit_cast<W>(subnormal) : bits;
  return bit_cast<X>(bits | ((half & 0x8000u) << 16));
}

// Round to nearest even; overflow to infinity; a NaN becomes a quiet NaN.
template <class W, class X>
PYOPTIM_HD W narrow_f16(X x) {
  const W bits = bit_cast<W>(x);
  const W magnitude = bits & 0x7fffffffu;
  const W normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns the last bit of a float16 subnormal with the last bit of the sum, which then
  // rounds it.
  const W subnormal =
      bit_cast<W>(bit_cast<X>(magnitude) + bit_cast<X>(every<W>(0x3f000000u))) - 0x3f000000u;
  W half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? every<W>(0x7c00u) : half;
  half = x != x ? every<W>(0x7e00u) : half;
  return half | ((bits >> 16) & 0x8000u);
}

template <class T>
PYOPTIM_HD T load(const T& x) {
  return x;
}
PYOPTIM_HD float load(const Bf16& x) { return widen_bf16<float>(static_cast<uint32_t>(x.bits)); }
PYOPTIM_HD float load(const F16& x) { return widen_f16<float>(static_cast<uint32_t>(x.bits)); }

PYOPTIM_HD void store(double& to, double x) { to = x; }
PYOPTIM_HD void store(float& to, float x) { to = x; }
PYOPTIM_HD void store(Bf16& to, float x) {
  to.bits = static_cast<uint16_t>(narrow_bf16<uint32_t>(x));
}
PYOPTIM_HD void store(F16& to, float x) {
  to.bits = static_cast<uint16_t>(narrow_f16<uint32_t>(x));
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

// What a rule needs beyond + - * /, for one number or for a vector of them.
template <class X>
struct Math;

template <>
struct Math<float> {
  PYOPTIM_HD static float sqrt(float x) { return std::sqrt(x); }
};

template <>
struct Math<double> {
  PYOPTIM_HD static double sqrt(double x) { return std::sqrt(x); }
};

template <class X>
PYOPTIM_HD X max_keep_nan(X a, X b) {
  const X larger = b <= a ? a : b;  // b where b is NaN
  return a != a ? a : larger;
}

}  // namespace
}  // namespace pyoptim
