// The arrays of a tensor, typed; included once per instruction set.
#pragma once

#include "core/table.hpp"
#include "cpu/simd.hpp"

namespace pyoptim::cpu {
namespace {

// What is written but not read, and streamed past the caches.
enum class Streams { nothing, param, states };

// The arrays of a row, for reading and writing or as addresses to prefetch. W: float where the
// parameter has a master, else P.
template <class P, class S, class W = P>
struct Arrays {
  P* param;
  const W* source;
  const P* grad;
  S *s0, *s1, *s2;
  P* saved;
  W* master;

  explicit Arrays(const Elements& row)
      : param(static_cast<P*>(row.param)),
        source(static_cast<const W*>(row.source)),
        grad(static_cast<const P*>(row.grad)),
        s0(static_cast<S*>(row.state[0])),
        s1(static_cast<S*>(row.state[1])),
        s2(static_cast<S*>(row.state[2])),
        saved(static_cast<P*>(row.saved)),
        master(static_cast<W*>(row.master)) {}

  // Of the elements from n on. Arrays that are not there, or of no elements, are null.
  PYOPTIM_HD Arrays moved(int64_t n) const {
    const auto move = [n](auto* from) { return from ? from + n : from; };
    Arrays at = *this;
    at.param = move(param);
    at.source = move(source);
    at.grad = move(grad);
    at.s0 = move(s0);
    at.s1 = move(s1);
    at.s2 = move(s2);
    at.saved = move(saved);
    at.master = move(master);
    return at;
  }

  // All but what is streamed.
  template <int kStates, Streams kStreams = Streams::nothing>
  PYOPTIM_HD void prefetch(int64_t i) const {
    if constexpr (kStreams != Streams::param) __builtin_prefetch(param + i);
    __builtin_prefetch(source + i);
    __builtin_prefetch(grad + i);
    if constexpr (kStreams == Streams::states) return;
    if constexpr (kStates > 0) __builtin_prefetch(s0 + i);
    if constexpr (kStates > 1) __builtin_prefetch(s1 + i);
    if constexpr (kStates > 2) __builtin_prefetch(s2 + i);
  }
};

}  // namespace
}  // namespace pyoptim::cpu
