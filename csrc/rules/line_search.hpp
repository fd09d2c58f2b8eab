// The step of a line search, and the trial points on its way: the moments of Adam, AMSGrad,
// RMSprop, Adagrad or SGD, a direction made from them, and a step size that the search chooses.
//
//   d = g / (sqrt(v)*correction + eps)  or  m / (...), without the quotient for SGD
//
// Source: Vaswani et al., arXiv:2006.06835 (AdaSLS); Kenneweg et al., arXiv:2407.20650 (SaLSa).
// Departures from the authors' programs: the moments are written by the last pass of a step, not by
// the first: a trial computes them anew from those of the step before, which costs no byte and lets
// a search be called off without a copy of them.
#pragma once

#include <cmath>

#include "core/table.hpp"

namespace pyoptim {
namespace {

// What a rule adds up over all elements: the product, formed in float64.
template <class X>
struct Product {
  X a, b;
};

template <class T>
struct LineRule {
  // lr is the step size times lr_scale. preconditioner: 0 for SGD, 1 for one with v, 2 for the
  // largest v so far. accumulates: v is a sum. corrects: m and v are averages from zero, corrected
  // with the exponent step + bias_offset. by_momentum: the direction is made from m.
  enum {
    kLr,
    kLrScale,
    kBeta1,
    kBeta2,
    kEps,
    kWeightDecay,
    kPreconditioner,
    kAccumulates,
    kCorrects,
    kBiasOffset,
    kByMomentum,
    kHypers
  };
  static constexpr const char* kHyperNames[kHypers] = {"lr",
                                                       "lr_scale",
                                                       "beta1",
                                                       "beta2",
                                                       "eps",
                                                       "weight_decay",
                                                       "preconditioner",
                                                       "accumulates",
                                                       "corrects",
                                                       "bias_offset",
                                                       "by_momentum"};
  static constexpr bool kCountsSteps = true;
  static constexpr bool kHasMaster =
      true;                            // runs with a float32 copy of a half-precision parameter
  static constexpr int kVariants = 6;  // 2*preconditioner + whether m is read
  static constexpr int kStates[kVariants] = {0, 1, 1, 2, 2, 3};
  static constexpr const char* kStateNames[kVariants][kMaxStates] = {
      {},
      {"momentum_buffer"},
      {"exp_avg_sq"},
      {"exp_avg", "exp_avg_sq"},
      {"exp_avg_sq", "max_exp_avg_sq"},
      {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}};

  struct Hyper {
    T sign, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, correction2, eps, step_size,
        slope_scale, by_momentum;
  };

  PYOPTIM_HD static Hyper prepare(const double* raw, double step, bool) {
    const double exponent = step + raw[kBiasOffset];
    const bool corrects = raw[kCorrects] != 0, accumulates = raw[kAccumulates] != 0;
    const double unbias1 =
        corrects && raw[kByMomentum] != 0 ? 1.0 / (1.0 - std::pow(raw[kBeta1], exponent)) : 1.0;
    const double unbias2 = corrects ? 1.0 / std::sqrt(1.0 - std::pow(raw[kBeta2], exponent)) : 1.0;
    Hyper h;
    h.sign = T(1);
    h.decay = static_cast<T>(1.0 - raw[kLr] * raw[kWeightDecay]);
    h.beta1 = static_cast<T>(raw[kBeta1]);
    h.one_minus_beta1 = static_cast<T>(1.0 - raw[kBeta1]);
    h.beta2 = static_cast<T>(accumulates ? 1.0 : raw[kBeta2]);
    h.one_minus_beta2 = static_cast<T>(accumulates ? 1.0 : 1.0 - raw[kBeta2]);
    h.correction2 = static_cast<T>(unbias2);
    h.eps = static_cast<T>(raw[kEps]);
    h.step_size = static_cast<T>(raw[kLr] * unbias1);
    h.slope_scale = static_cast<T>(raw[kLrScale] * unbias1);
    h.by_momentum = static_cast<T>(raw[kByMomentum] != 0);
    return h;
  }

  // The moments after this step, in the place of those before it.
  template <int V, class X>
  PYOPTIM_HD static void average(const Hyper& h, X g, X& s0, X& s1, X& s2) {
    constexpr bool kHasMomentum = V & 1;
    if constexpr (V == 1) s0 = h.beta1 * s0 + g;
    if constexpr (V > 1) {
      if constexpr (kHasMomentum) s0 = s0 + h.one_minus_beta1 * (g - s0);
      X& v = kHasMomentum ? s1 : s0;
      v = h.beta2 * v + (h.one_minus_beta2 * g) * g;
      if constexpr (V > 3) {
        X& largest = kHasMomentum ? s2 : s1;
        largest = max_keep_nan(largest, v);
      }
    }
  }

  // The direction, without the correction of m, from averages of this step.
  template <int V, class X>
  PYOPTIM_HD static X direction(const Hyper& h, X g, X s0, X s1, X s2) {
    constexpr bool kHasMomentum = V & 1;
    if constexpr (kHasMomentum) g = h.by_momentum != 0 ? s0 : g;
    if constexpr (V < 2) return g;
    const X v = V == 2 ? s0 : V == 5 ? s2 : s1;
    return g / (Math<X>::sqrt(v) * h.correction2 + h.eps);
  }

  // A step size of 0 leaves what is not finite out of it.
  template <class X>
  PYOPTIM_HD static X moved(const Hyper& h, X w, X d) {
    return h.step_size != 0 ? w - h.step_size * d : w;
  }
};

}  // namespace
}  // namespace pyoptim
