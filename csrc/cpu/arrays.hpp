// The arrays of a tensor, typed; included once per instruction set.
#pragma once

#include "core/table.hpp"
#include "cpu/simd.hpp"

namespace pyoptim::cpu {
namespace {

// The arrays of a row, for reading and writing or as addresses to prefetch.
template <class P, class S>
struct Arrays {
  P* param;
  const P* grad;
  S *s0, *s1, *s2;

  explicit Arrays(const Elements& row)
      : param(static_cast<P*>(row.param)),
        grad(static_cast<const P*>(row.grad)),
        s0(static_cast<S*>(row.state[0])),
        s1(static_cast<S*>(row.state[1])),
        s2(static_cast<S*>(row.state[2])) {}

  // Of the elements from n on.
  PYOPTIM_HD Arrays moved(int64_t n) const {
    Arrays at = *this;
    at.param += n;
    at.grad += n;
    if (s0) at.s0 += n;
    if (s1) at.s1 += n;
    if (s2) at.s2 += n;
    return at;
  }

  template <int kStates>
  PYOPTIM_HD void prefetch(int64_t i) const {
    __builtin_prefetch(param + i);
    __builtin_prefetch(grad + i);
    if constexpr (kStates > 0) __builtin_prefetch(s0 + i);
    if constexpr (kStates > 1) __builtin_prefetch(s1 + i);
    if constexpr (kStates > 2) __builtin_prefetch(s2 + i);
  }
};

}  // namespace
}  // namespace pyoptim::cpu
