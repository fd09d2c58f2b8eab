// The one order of every sum: results do not depend on threads, instruction set, alignment or
// engine.
//
// A tensor is cut into chunks of kChunk elements. Within a chunk lane l adds, in float64, the terms
// of the elements l, l + kLanes, l + 2*kLanes ... in this order, starting from 0; then the upper
// half of the lanes is added to the lower half until one is left. The partial results of several
// chunks, however many there are, are summed in the same way, each as one element of one chunk.
// Products of float32 numbers are exact in float64, so that a fused multiply-add changes nothing.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"

namespace pyoptim::reduce {

constexpr int kLanes = 1024;
constexpr int64_t kChunk = 16 * kLanes;

// What a norm adds up, and what it does with the sum.
enum class Kind : int { squares = 0, magnitudes = 1, maximum = 2 };  // 2-norm, 1-norm, inf-norm

inline int64_t n_chunks(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

namespace {

template <Kind kKind>
PYOPTIM_HD double term(double x) {
  if constexpr (kKind == Kind::squares) return x * x;
  return x < 0 ? -x : x;
}

// What ASAM's norm is over: the gradient times the size of its weight.
template <class T, class X>
PYOPTIM_HD X weigh(X grad, X weight, T eta) {
  return ((weight < 0 ? -weight : weight) + eta) * grad;
}

// The maximum keeps a NaN, whichever side it is on.
template <Kind kKind>
PYOPTIM_HD double combine(double a, double b) {
  if constexpr (kKind == Kind::maximum) return max_keep_nan(a, b);
  return a + b;
}

// As torch.nn.utils.clip_grad_norm_, in float64; a NaN norm gives a NaN factor.
PYOPTIM_HD double clip_factor(double max_norm, double norm) {
  const double factor = max_norm / (norm + 1e-6);
  return factor > 1.0 ? 1.0 : factor;
}

}  // namespace
}  // namespace pyoptim::reduce
