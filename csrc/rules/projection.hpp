// The projection of AdamP and SGDP: when a step loses its part along the weights, and how.
// Source: Heo et al., arXiv:2006.08217, equations 12 and 13, as the authors' package defines it:
// the absolute cosine over delta/sqrt(size), all rows of dimension 0 first (channels), then the
// whole tensor as one row (layer), which loses less decay too.
// Departures: sums and decision run in float64. The layer view is known after the sweep that writes
// the parameter only, so that its projection is applied to the stored result: one rounding more,
// and weights known to the parameter's precision where the momentum itself is projected.
// A tensor of one row has the layer view only, which is the same.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/table.hpp"

namespace pyoptim {
namespace {

// Whether a rule has Rule::average and Rule::direction in place of Rule::update, and projects rows
// with TableRow::n_rows > 0.
template <class Rule, class = void>
constexpr bool kProjects = false;
template <class Rule>
constexpr bool kProjects<Rule, std::void_t<decltype(Rule::kProjectsBuffer)>> = true;

// The sums over a row, in float64 and in the order of reduce/order.hpp. The gradient is the stored
// one, unscaled but neither clipped nor negated; the weights are those before the step.
enum Sum { kGradWeight, kGradGrad, kWeightWeight, kDirectionWeight, kSums };

// Whether gradient and weights of a row of `size` elements are nearly at right angles. False for
// NaN.
template <class Hyper>
PYOPTIM_HD bool is_orthogonal(const Hyper& h, const double* sums, int64_t size) {
  const double scale = std::fabs(static_cast<double>(h.sign)), eps = static_cast<double>(h.eps);
  const double g = scale * std::sqrt(sums[kGradGrad]), w = std::sqrt(sums[kWeightWeight]);
  const double cosine =
      scale * std::fabs(sums[kGradWeight]) / ((w < eps ? eps : w) * (g < eps ? eps : g));
  return cosine < static_cast<double>(h.delta) / std::sqrt(static_cast<double>(size));
}

// The c of u - c*w, which has no part along w.
template <class Hyper>
PYOPTIM_HD double radial_part(const Hyper& h, const double* sums) {
  const double norm = std::sqrt(sums[kWeightWeight]) + static_cast<double>(h.eps);
  return sums[kDirectionWeight] / (norm * norm);
}

// p from the weight before the step, which it holds, and the direction u.
template <class Hyper, class X>
PYOPTIM_HD void write_plain(const Hyper& h, X& p, X u) {
  p = p * h.decay - h.step_size * u;
}

// The same, projected; u becomes the projected direction.
template <class Hyper, class T, class X>
PYOPTIM_HD void write_projected(const Hyper& h, T c, X& p, X& u) {
  u = u - c * p;
  p = p * h.projected_decay - h.step_size * u;
}

// Whether the weight before the step cannot be told from the stored result well enough: then the
// sweep that finds the sums leaves the parameter alone and a second one writes it, projected or
// not.
template <class Hyper>
PYOPTIM_HD bool is_deferred(const Hyper& h) {
  return h.decay < 0.5f;
}

// Makes the projected result of the plain one, p = w*decay - step_size*u, in place:
// w = (p + step_size*u)/decay and p += (projected_decay - decay + step_size*c)*w.
template <class T>
struct Repair {
  T pull, radial;

  Repair() = default;
  template <class Hyper>
  PYOPTIM_HD Repair(const Hyper& h, const double* sums) {
    const double c = radial_part(h, sums), decay = static_cast<double>(h.decay);
    const double less_decay = static_cast<double>(h.projected_decay) - decay;
    pull = static_cast<T>((less_decay + static_cast<double>(h.step_size) * c) / decay);
    radial = static_cast<T>(c / decay);
  }

  // u becomes the projected direction. A result that has overflowed stays, where inf - inf would
  // make it NaN.
  template <class Hyper, class X>
  PYOPTIM_HD void apply(const Hyper& h, X& p, X& u) const {
    const X decayed = p - p == X{} ? p + h.step_size * u : X{};
    p = p + pull * decayed;
    u = u - radial * decayed;
  }
};

}  // namespace
}  // namespace pyoptim
