// Adam and AdamW: exponential averages of the gradient and of its square.
// Source: Kingma and Ba, arXiv:1412.6980, Algorithm 1; amsgrad: Reddi et al., ICLR 2018, Algorithm
// 2, over the uncorrected average as torch does; decoupled decay: Loshchilov and Hutter,
// arXiv:1711.05101, Algorithm 2. Departure: the correction of the second average multiplies by
// 1/sqrt(1 - beta2^t), rounded once, where torch divides.
#pragma once

#include <cmath>

#include "core/table.hpp"

namespace pyoptim {
namespace {

template <class T>
struct Adam {
  static constexpr const char* kName = "adam";
  enum { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kDecoupled, kAmsgrad, kMaximize, kHypers };
  static constexpr const char* kHyperNames[kHypers] = {"lr",
                                                       "betas.0",
                                                       "betas.1",
                                                       "eps",
                                                       "weight_decay",
                                                       "decoupled_weight_decay",
                                                       "amsgrad",
                                                       "maximize"};
  static constexpr bool kCountsSteps = true;
  static constexpr int kVariants = 2;  // 0: plain, 1: amsgrad
  static constexpr int kStates[kVariants] = {2, 3};
  static constexpr const char* kStateNames[kVariants][kMaxStates] = {
      {"exp_avg", "exp_avg_sq"}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}};

  static int variant(const double* raw) { return raw[kAmsgrad] != 0; }

  struct Hyper {
    T sign, weight_decay, decay, one_minus_beta1, beta2, one_minus_beta2, correction2, eps,
        step_size;
  };

  PYOPTIM_HD static Hyper prepare(const double* raw, double step, bool) {
    const bool decoupled = raw[kDecoupled] != 0;
    Hyper h;
    h.sign = raw[kMaximize] != 0 ? T(-1) : T(1);
    h.weight_decay = static_cast<T>(decoupled ? 0.0 : raw[kWeightDecay]);
    h.decay = static_cast<T>(decoupled ? 1.0 - raw[kLr] * raw[kWeightDecay] : 1.0);
    h.one_minus_beta1 = static_cast<T>(1.0 - raw[kBeta1]);
    h.beta2 = static_cast<T>(raw[kBeta2]);
    h.one_minus_beta2 = static_cast<T>(1.0 - raw[kBeta2]);
    h.correction2 = static_cast<T>(1.0 / std::sqrt(1.0 - std::pow(raw[kBeta2], step)));
    h.eps = static_cast<T>(raw[kEps]);
    h.step_size = static_cast<T>(raw[kLr] / (1.0 - std::pow(raw[kBeta1], step)));
    return h;
  }

  template <int V, class X>
  PYOPTIM_HD static void update(
      const Hyper& h, X& p, X g, X& exp_avg, X& exp_avg_sq, X& max_exp_avg_sq) {
    g = h.sign * g;
    const X w = p * h.decay;
    g = h.weight_decay != 0 ? g + h.weight_decay * w : g;
    const X m = exp_avg + h.one_minus_beta1 * (g - exp_avg);
    X v = h.beta2 * exp_avg_sq + (h.one_minus_beta2 * g) * g;
    exp_avg = m;
    exp_avg_sq = v;
    if constexpr (V == 1) {
      v = max_keep_nan(max_exp_avg_sq, v);
      max_exp_avg_sq = v;
    }
    const X denom = Math<X>::sqrt(v) * h.correction2 + h.eps;
    p = w - h.step_size * (m / denom);
  }
};

}  // namespace
}  // namespace pyoptim
