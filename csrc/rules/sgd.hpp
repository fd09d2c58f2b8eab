// SGD: stochastic gradient descent with optional momentum.
// Source: Sutskever et al., ICML 2013, as torch.optim.SGD defines it. Departure: none.
#pragma once

#include "core/table.hpp"

namespace pyoptim {
namespace {

template <class T>
struct Sgd {
  static constexpr const char* kName = "sgd";
  enum { kLr, kMomentum, kDampening, kWeightDecay, kNesterov, kMaximize, kHypers };
  static constexpr const char* kHyperNames[kHypers] = {
      "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"};
  static constexpr bool kCountsSteps = false;
  static constexpr int kVariants = 2;  // 0: plain, 1: with momentum
  static constexpr int kStates[kVariants] = {0, 1};
  static constexpr const char* kStateNames[kVariants][kMaxStates] = {{}, {"momentum_buffer"}};

  static int variant(const double* raw) { return raw[kMomentum] != 0; }

  struct Hyper {
    T sign, weight_decay, momentum, undamped, nesterov, first, lr;
  };

  PYOPTIM_HD static Hyper prepare(const double* raw, double, bool first) {
    Hyper h;
    h.sign = raw[kMaximize] != 0 ? T(-1) : T(1);
    h.weight_decay = static_cast<T>(raw[kWeightDecay]);
    h.momentum = static_cast<T>(raw[kMomentum]);
    h.undamped = static_cast<T>(1.0 - raw[kDampening]);
    h.nesterov = static_cast<T>(raw[kNesterov] != 0);
    h.first = static_cast<T>(first);
    h.lr = static_cast<T>(raw[kLr]);
    return h;
  }

  template <int V, class X>
  PYOPTIM_HD static void update(const Hyper& h, X& p, X g, X& momentum_buffer, X&, X&) {
    g = h.sign * g;
    g = h.weight_decay != 0 ? g + h.weight_decay * p : g;
    if constexpr (V == 1) {
      // The first step copies the gradient: dampening starts with the second.
      const X b = h.first != 0 ? g : h.momentum * momentum_buffer + h.undamped * g;
      momentum_buffer = b;
      g = h.nesterov != 0 ? g + h.momentum * b : b;
    }
    p = p - h.lr * g;
  }
};

}  // namespace
}  // namespace pyoptim
