// SGDP: SGD with momentum whose step loses its part along the weights where these seem
// scale-invariant.
// Source: Heo et al., arXiv:2006.08217, Algorithm 1, as the authors' package defines it: decay is
// decoupled and divided by 1 - momentum, dampening starts with the first step, and without nesterov
// the momentum itself is projected (Algorithm 1, where it is not, is variant 2). Departures: those
// of rules/projection.hpp; the direction is computed from the momentum as it is stored.
#pragma once

#include "rules/projection.hpp"

namespace pyoptim {
namespace {

template <class T>
struct SgdP {
  static constexpr const char* kName = "sgdp";
  enum {
    kLr,
    kMomentum,
    kDampening,
    kEps,
    kWeightDecay,
    kDelta,
    kWdRatio,
    kNesterov,
    kProjectBuffer,
    kMaximize,
    kHypers
  };
  static constexpr const char* kHyperNames[kHypers] = {"lr",
                                                       "momentum",
                                                       "dampening",
                                                       "eps",
                                                       "weight_decay",
                                                       "delta",
                                                       "wd_ratio",
                                                       "nesterov",
                                                       "project_buffer",
                                                       "maximize"};
  static constexpr bool kCountsSteps = false;
  static constexpr int kVariants = 3;  // 0: the momentum is projected, 1: nesterov, 2: it is not
  static constexpr int kStates[kVariants] = {1, 1, 1};
  static constexpr const char* kStateNames[kVariants][kMaxStates] = {
      {"momentum"}, {"momentum"}, {"momentum"}};
  // As in AdamP.
  static constexpr bool kReadsGrad[kVariants] = {false, true, false};
  static constexpr bool kProjectsBuffer[kVariants] = {true, false, false};

  static int variant(const double* raw) {
    return raw[kNesterov] != 0 ? 1 : raw[kProjectBuffer] != 0 ? 0 : 2;
  }

  struct Hyper {
    T sign, momentum, undamped, eps, step_size, decay, projected_decay, delta;
  };

  PYOPTIM_HD static Hyper prepare(const double* raw, double, bool) {
    const double decay = raw[kLr] * raw[kWeightDecay] / (1.0 - raw[kMomentum]);
    Hyper h;
    h.sign = raw[kMaximize] != 0 ? T(-1) : T(1);
    h.momentum = static_cast<T>(raw[kMomentum]);
    h.undamped = static_cast<T>(1.0 - raw[kDampening]);
    h.eps = static_cast<T>(raw[kEps]);
    h.step_size = static_cast<T>(raw[kLr]);
    h.decay = static_cast<T>(1.0 - decay);
    h.projected_decay = static_cast<T>(1.0 - decay * raw[kWdRatio]);
    h.delta = static_cast<T>(raw[kDelta]);
    return h;
  }

  template <int V, class X>
  PYOPTIM_HD static void average(const Hyper& h, X g, X& momentum, X&) {
    momentum = h.momentum * momentum + h.undamped * (h.sign * g);
  }

  // From the momentum as it is stored; g is read by variant 1 only.
  template <int V, class X>
  PYOPTIM_HD static X direction(const Hyper& h, X g, X momentum, X) {
    if constexpr (V == 1) return h.sign * g + h.momentum * momentum;
    return momentum;
  }
};

}  // namespace
}  // namespace pyoptim
