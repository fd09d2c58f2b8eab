// A trial point of a line search, and the slope of the loss along its direction; as LineRule
// defines them. States are read, never written, and steps are not counted.
#pragma once

#include "rules/line_search.hpp"

namespace pyoptim {
namespace {

template <class T>
struct LineTrial : LineRule<T> {
  using Base = LineRule<T>;
  using typename Base::Hyper;
  static constexpr const char* kName = "line_trial";
  static constexpr bool kWritesStates = false;
  static constexpr bool kYieldsTerm = true;  // update returns a Product

  static int variant(const double* raw) {
    const double p = raw[Base::kPreconditioner];
    return 2 * (p == 1 ? 1 : p == 2 ? 2 : 0) + (raw[Base::kByMomentum] != 0);
  }

  PYOPTIM_HD static Hyper prepare(const double* raw, double step, bool first) {
    Hyper h = Base::prepare(raw, step, first);
    h.decay = T(1);
    return h;
  }

  // States are given back as they were. The term is lr_scale * <g, d>.
  template <int V, class X>
  PYOPTIM_HD static Product<X> update(const Hyper& h, X& p, X g, X& s0, X& s1, X& s2) {
    X a = s0, b = s1, c = s2;
    g = h.sign * g;
    Base::template average<V>(h, g, a, b, c);
    const X d = Base::template direction<V>(h, g, a, b, c);
    p = Base::moved(h, p, d);
    return {g, h.slope_scale * d};
  }
};

}  // namespace
}  // namespace pyoptim
