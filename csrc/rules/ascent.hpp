// Ascent: the step of SAM and ASAM towards the largest loss nearby; the weight is saved for the way
// back.
// Source: SAM: Foret et al., arXiv:2010.01412, Algorithm 1; ASAM: Kwon et al., arXiv:2102.11600,
// Algorithm 1. Departure: a scale of 0, which stands for a norm that is not finite too, leaves the
// weight as it is, where 0*inf would make it NaN.
#pragma once

#include "core/table.hpp"

namespace pyoptim {
namespace {

template <class T>
struct Ascent {
  static constexpr const char* kName = "ascent";
  enum { kScale, kAdaptive, kEta, kMaximize, kHypers };
  static constexpr const char* kHyperNames[kHypers] = {"scale", "adaptive", "eta", "maximize"};
  static constexpr bool kCountsSteps = false;
  static constexpr bool kReadsStates = false;
  static constexpr int kVariants = 2;  // 0: SAM, 1: ASAM
  static constexpr int kStates[kVariants] = {1, 1};
  static constexpr const char* kStateNames[kVariants][kMaxStates] = {{"old_p"}, {"old_p"}};

  static int variant(const double* raw) { return raw[kAdaptive] != 0; }

  struct Hyper {
    T sign, scale, eta;
  };

  PYOPTIM_HD static Hyper prepare(const double* raw, double, bool) {
    Hyper h;
    h.sign = raw[kMaximize] != 0 ? T(-1) : T(1);
    h.scale = static_cast<T>(raw[kScale]);
    h.eta = static_cast<T>(raw[kEta]);
    return h;
  }

  template <int V, class X>
  PYOPTIM_HD static void update(const Hyper& h, X& p, X g, X& old_p, X&, X&) {
    old_p = p;
    g = h.sign * g;
    if constexpr (V == 1) {
      const X size = (p < 0 ? -p : p) + h.eta;
      g = (size * size) * g;
    }
    p = h.scale != 0 ? p + h.scale * g : p;
  }
};

}  // namespace
}  // namespace pyoptim
