// The last pass of a step of a line search, and all of one that does not search: the moments, the
// decay of the weights and the step; as LineRule defines them.
#pragma once

#include "rules/line_search.hpp"

namespace pyoptim {
namespace {

template <class T>
struct LineStep : LineRule<T> {
  using Base = LineRule<T>;
  using typename Base::Hyper;
  static constexpr const char* kName = "line_step";

  static int variant(const double* raw) {
    const double p = raw[Base::kPreconditioner];
    return 2 * (p == 1 ? 1 : p == 2 ? 2 : 0) + (raw[Base::kBeta1] != 0);
  }

  template <int V, class X>
  PYOPTIM_HD static void update(const Hyper& h, X& p, X g, X& s0, X& s1, X& s2) {
    g = h.sign * g;
    Base::template average<V>(h, g, s0, s1, s2);
    p = Base::moved(h, p * h.decay, Base::template direction<V>(h, g, s0, s1, s2));
  }
};

}  // namespace
}  // namespace pyoptim
