// Expectigrad: the gradient over the root of the plain mean of its squares, then averaged.
// Source: Daley and Amato, arXiv:2010.01356, Algorithm 1, as the authors' package defines it.
// Departures: 0/0 = 0 holds where nothing was counted only, so that a NaN in the sum stays NaN
// where the package makes a huge step of it; without counter the root of s/t is sqrt(s) times
// 1/sqrt(t), rounded once.
#pragma once

#include <cmath>

#include "core/table.hpp"

namespace pyoptim {
namespace {

template <class T>
struct Expectigrad {
  static constexpr const char* kName = "expectigrad";
  enum { kLr, kBeta, kEps, kSparseCounter, kMaximize, kHypers };
  static constexpr const char* kHyperNames[kHypers] = {
      "lr", "beta", "eps", "sparse_counter", "maximize"};
  static constexpr bool kCountsSteps = true;
  static constexpr int kVariants = 4;  // bit 0: momentum, bit 1: sparse counter
  static constexpr int kStates[kVariants] = {1, 2, 2, 3};
  static constexpr const char* kStateNames[kVariants][kMaxStates] = {
      {"sum"}, {"sum", "momentum"}, {"sum", "counter"}, {"sum", "counter", "momentum"}};

  static int variant(const double* raw) {
    return (raw[kBeta] > 0) + 2 * (raw[kSparseCounter] != 0);
  }

  struct Hyper {
    T sign, beta, one_minus_beta, eps, root_scale, step_size;
  };

  PYOPTIM_HD static Hyper prepare(const double* raw, double step, bool) {
    Hyper h;
    h.sign = raw[kMaximize] != 0 ? T(-1) : T(1);
    h.beta = static_cast<T>(raw[kBeta]);
    h.one_minus_beta = static_cast<T>(1.0 - raw[kBeta]);
    h.eps = static_cast<T>(raw[kEps]);
    h.root_scale = static_cast<T>(1.0 / std::sqrt(step));
    h.step_size = static_cast<T>(raw[kLr] / (1.0 - std::pow(raw[kBeta], step)));
    return h;
  }

  template <int V, class X>
  PYOPTIM_HD static void update(const Hyper& h, X& p, X g, X& sum, X& s1, X& s2) {
    constexpr bool kHasMomentum = V & 1;
    constexpr bool kHasCounter = V & 2;
    const X zero = {};
    g = h.sign * g;
    const X square = g * g;
    const X s = sum + square;
    sum = s;
    X root;
    if constexpr (kHasCounter) {
      // A gradient whose square underflows adds nothing to the sum and does not count.
      const X n = s1 + (square > zero ? zero + T(1) : zero);
      s1 = n;
      root = Math<X>::sqrt(n > zero ? s / n : zero);
    } else {
      root = Math<X>::sqrt(s) * h.root_scale;
    }
    X d = g / (h.eps + root);
    if constexpr (kHasMomentum) {
      X& momentum = kHasCounter ? s2 : s1;
      d = h.beta * momentum + h.one_minus_beta * d;
      momentum = d;
    }
    p = p - h.step_size * d;
  }
};

}  // namespace
}  // namespace pyoptim
