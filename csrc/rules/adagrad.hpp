// Adagrad: the gradient over the root of the sum of its squares.
// Source: Duchi et al., JMLR 12 (2011), Figure 1, diagonal form, as torch.optim.Adagrad defines it.
// Departure: none.
#pragma once

#include <cmath>

#include "core/table.hpp"

namespace pyoptim {
namespace {

template <class T>
struct Adagrad {
  static constexpr const char* kName = "adagrad";
  enum { kLr, kLrDecay, kWeightDecay, kEps, kMaximize, kHypers };
  static constexpr const char* kHyperNames[kHypers] = {
      "lr", "lr_decay", "weight_decay", "eps", "maximize"};
  static constexpr bool kCountsSteps = true;
  static constexpr int kVariants = 1;
  static constexpr int kStates[kVariants] = {1};
  static constexpr const char* kStateNames[kVariants][kMaxStates] = {{"sum"}};

  static int variant(const double*) { return 0; }

  struct Hyper {
    T sign, weight_decay, eps, lr;
  };

  PYOPTIM_HD static Hyper prepare(const double* raw, double step, bool) {
    Hyper h;
    h.sign = raw[kMaximize] != 0 ? T(-1) : T(1);
    h.weight_decay = static_cast<T>(raw[kWeightDecay]);
    h.eps = static_cast<T>(raw[kEps]);
    h.lr = static_cast<T>(raw[kLr] / (1.0 + (step - 1.0) * raw[kLrDecay]));
    return h;
  }

  template <int V, class X>
  PYOPTIM_HD static void update(const Hyper& h, X& p, X g, X& sum, X&, X&) {
    g = h.sign * g;
    g = h.weight_decay != 0 ? g + h.weight_decay * p : g;
    const X s = sum + g * g;
    sum = s;
    p = p - h.lr * (g / (Math<X>::sqrt(s) + h.eps));
  }
};

}  // namespace
}  // namespace pyoptim
