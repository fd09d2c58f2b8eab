// RMSprop: the gradient over the root of an exponential average of its square.
// Source: Tieleman and Hinton, lecture 6.5, 2012; centered: Graves, arXiv:1308.0850, as
// torch.optim.RMSprop defines both (eps outside the root, no bias correction, the centered variance
// is not clamped). Departure: none.
#pragma once

#include <cmath>

#include "core/table.hpp"

namespace pyoptim {
namespace {

template <class T>
struct RmsProp {
  static constexpr const char* kName = "rmsprop";
  enum { kLr, kAlpha, kEps, kWeightDecay, kMomentum, kCentered, kMaximize, kHypers };
  static constexpr const char* kHyperNames[kHypers] = {
      "lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize"};
  static constexpr bool kCountsSteps = true;
  static constexpr int kVariants = 4;  // bit 0: momentum, bit 1: centered
  static constexpr int kStates[kVariants] = {1, 2, 2, 3};
  static constexpr const char* kStateNames[kVariants][kMaxStates] = {
      {"square_avg"},
      {"square_avg", "momentum_buffer"},
      {"square_avg", "grad_avg"},
      {"square_avg", "momentum_buffer", "grad_avg"}};

  static int variant(const double* raw) { return (raw[kMomentum] > 0) + 2 * (raw[kCentered] != 0); }

  struct Hyper {
    T sign, weight_decay, alpha, one_minus_alpha, momentum, eps, lr;
  };

  PYOPTIM_HD static Hyper prepare(const double* raw, double, bool) {
    Hyper h;
    h.sign = raw[kMaximize] != 0 ? T(-1) : T(1);
    h.weight_decay = static_cast<T>(raw[kWeightDecay]);
    h.alpha = static_cast<T>(raw[kAlpha]);
    h.one_minus_alpha = static_cast<T>(1.0 - raw[kAlpha]);
    h.momentum = static_cast<T>(raw[kMomentum]);
    h.eps = static_cast<T>(raw[kEps]);
    h.lr = static_cast<T>(raw[kLr]);
    return h;
  }

  template <int V, class X>
  PYOPTIM_HD static void update(const Hyper& h, X& p, X g, X& square_avg, X& s1, X& s2) {
    constexpr bool kHasMomentum = V & 1;
    constexpr bool kHasGradAvg = V & 2;
    g = h.sign * g;
    g = h.weight_decay != 0 ? g + h.weight_decay * p : g;
    X v = h.alpha * square_avg + (h.one_minus_alpha * g) * g;
    square_avg = v;
    if constexpr (kHasGradAvg) {
      X& grad_avg = kHasMomentum ? s2 : s1;
      const X mean = grad_avg + h.one_minus_alpha * (g - grad_avg);
      grad_avg = mean;
      v = v - mean * mean;
    }
    X d = g / (Math<X>::sqrt(v) + h.eps);
    if constexpr (kHasMomentum) {
      d = h.momentum * s1 + d;
      s1 = d;
    }
    p = p - h.lr * d;
  }
};

}  // namespace
}  // namespace pyoptim
