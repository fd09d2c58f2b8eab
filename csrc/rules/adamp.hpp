// AdamP: Adam whose step loses its part along the weights where these seem scale-invariant.
// Source: Heo et al., arXiv:2006.08217, Algorithm 2, as the authors' package defines it.
// Departures: those of rules/projection.hpp; the direction is computed from the averages as they
// are stored; the correction of the second average multiplies by 1/sqrt(1 - beta2^t), rounded once.
#pragma once

#include <cmath>

#include "rules/projection.hpp"

namespace pyoptim {
namespace {

template <class T>
struct AdamP {
  static constexpr const char* kName = "adamp";
  enum { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kDelta, kWdRatio, kNesterov, kMaximize, kHypers };
  static constexpr const char* kHyperNames[kHypers] = {"lr",
                                                       "betas.0",
                                                       "betas.1",
                                                       "eps",
                                                       "weight_decay",
                                                       "delta",
                                                       "wd_ratio",
                                                       "nesterov",
                                                       "maximize"};
  static constexpr bool kCountsSteps = true;
  static constexpr int kVariants = 2;  // 0: plain, 1: nesterov
  static constexpr int kStates[kVariants] = {2, 2};
  static constexpr const char* kStateNames[kVariants][kMaxStates] = {{"exp_avg", "exp_avg_sq"},
                                                                     {"exp_avg", "exp_avg_sq"}};
  // Whether the direction needs the gradient beside the states; whether the first state takes the
  // projected direction.
  static constexpr bool kReadsGrad[kVariants] = {false, true};
  static constexpr bool kProjectsBuffer[kVariants] = {false, false};

  static int variant(const double* raw) { return raw[kNesterov] != 0; }

  struct Hyper {
    T sign, beta1, one_minus_beta1, beta2, one_minus_beta2, correction2, eps, step_size, decay,
        projected_decay, delta;
  };

  PYOPTIM_HD static Hyper prepare(const double* raw, double step, bool) {
    const double decay = raw[kLr] * raw[kWeightDecay];
    Hyper h;
    h.sign = raw[kMaximize] != 0 ? T(-1) : T(1);
    h.beta1 = static_cast<T>(raw[kBeta1]);
    h.one_minus_beta1 = static_cast<T>(1.0 - raw[kBeta1]);
    h.beta2 = static_cast<T>(raw[kBeta2]);
    h.one_minus_beta2 = static_cast<T>(1.0 - raw[kBeta2]);
    h.correction2 = static_cast<T>(1.0 / std::sqrt(1.0 - std::pow(raw[kBeta2], step)));
    h.eps = static_cast<T>(raw[kEps]);
    h.step_size = static_cast<T>(raw[kLr] / (1.0 - std::pow(raw[kBeta1], step)));
    h.decay = static_cast<T>(1.0 - decay);
    h.projected_decay = static_cast<T>(1.0 - decay * raw[kWdRatio]);
    h.delta = static_cast<T>(raw[kDelta]);
    return h;
  }

  template <int V, class X>
  PYOPTIM_HD static void average(const Hyper& h, X g, X& exp_avg, X& exp_avg_sq) {
    g = h.sign * g;
    exp_avg = exp_avg + h.one_minus_beta1 * (g - exp_avg);
    exp_avg_sq = h.beta2 * exp_avg_sq + (h.one_minus_beta2 * g) * g;
  }

  // From the states as they are stored; g is read by variant 1 only.
  template <int V, class X>
  PYOPTIM_HD static X direction(const Hyper& h, X g, X exp_avg, X exp_avg_sq) {
    const X denom = Math<X>::sqrt(exp_avg_sq) * h.correction2 + h.eps;
    if constexpr (V == 1) {
      exp_avg = h.beta1 * exp_avg + h.one_minus_beta1 * (h.sign * g);
    }
    return exp_avg / denom;
  }
};

}  // namespace
}  // namespace pyoptim
