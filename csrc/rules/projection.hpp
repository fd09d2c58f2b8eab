// The projection of AdamP and SGDP: when a step loses its part along the weights, and how.
// Source: Heo et al., arXiv:2006.08217, equations 12 and 13, as the authors' package defines it:
// the absolute cosine over delta/sqrt(size), all rows of dimension 0 first (channels), then the
// whole tensor as one row (layer), which loses less decay too.
// Departures: sums of rows and decisions run in float64, the sums of the layer view by blocks, see
// below. The layer view is known after the sweep that writes the parameter only, so that its
// projection is applied to the stored result: one rounding more, and weights known to the
// parameter's precision where the momentum itself is projected.
// A tensor of one row has the layer view only, which is the same.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/table.hpp"

namespace pyoptim {

// What can be said of gradient and weights whose sums are known to float32's precision.
enum class Angle { right, other, unknown };

namespace {

// Whether a rule has Rule::average and Rule::direction in place of Rule::update, and projects rows
// with TableRow::n_rows > 0.
template <class Rule, class = void>
constexpr bool kProjects = false;
template <class Rule>
constexpr bool kProjects<Rule, std::void_t<decltype(Rule::kProjectsBuffer)>> = true;

// The sums over a row, or over the tensor as one row. The gradient is the stored one, unscaled but
// neither clipped nor negated; the weights are those before the step.
enum Sum { kGradWeight, kGradGrad, kWeightWeight, kDirectionWeight, kSums };

// The sums of rows are made in float64, in the order of reduce/order.hpp. Those of the layer view
// are made beside the update of the whole tensor, where float64 would take longer than memory does,
// by blocks of kBlock elements: column c of a block adds up, in the type that the rule computes in,
// the products of the elements c, c + kBlockColumns, c + 2*kBlockColumns ... in this order, each
// rounded, starting from 0. In float64 the upper half of the blocks of a chunk is added to the
// lower until one is left, and so its columns; chunks as in reduce/order.hpp. For float32 that is
// what the authors compute, less wrong: sums of 16 terms have no time to lose what is small.
constexpr int kBlockColumns = 16, kBlockRounds = 16;
constexpr int64_t kBlock = kBlockColumns * kBlockRounds;

// Whether gradient and weights of a row of `size` elements are nearly at right angles: squares are
// compared, without a root or a division. False for NaN, and in float64 where |g||w| is beyond
// 1e154, whose square is not finite.
template <class Hyper>
PYOPTIM_HD bool is_orthogonal(const Hyper& h, const double* sums, int64_t size) {
  const double sign = static_cast<double>(h.sign), across = sign * sums[kGradWeight];
  const double eps = static_cast<double>(h.eps), delta = static_cast<double>(h.delta);
  const double least = eps * eps, g = sign * sign * sums[kGradGrad], w = sums[kWeightWeight];
  return across * across * static_cast<double>(size) <
         delta * delta * ((w < least ? least : w) * (g < least ? least : g));
}

constexpr int kCheckSums = 3;  // the first of Sum

// `sums` are the first three of a row, by blocks in float32. The answer, unless it is unknown, is
// that of is_orthogonal for the exact sums, those in float64 in the order of reduce/order.hpp:
//
// - Every product passes at most kBlockRounds roundings to float32 (its own; the first addition is
//   to 0), each of at most 2^-24 of what is rounded, if nothing underflows. So a sum is off by at
//   most (1 + 2^-24)^k - 1 times the sum of its terms' sizes, and that is at most |w||g|
//   (Cauchy-Schwarz).
// - Where products or sums underflow, gradually or to 0, each of 2n operations is off by at most
//   2^-126. With both squares above n*2^-100 that is 2^-25 of |w||g| in all.
// - Additions in float64, here and of the exact sums, are off by less than 2^-29, up to 2^40
//   elements.
// - Numbers that are not finite, and squares out of float32's range, leave a square not finite.
// - is_orthogonal is monotone in each sum, and so is its arithmetic, rounded as it is: what it says
//   at the two corners of the box that holds the exact sums, if that is the same, it says for them.
template <class Hyper>
Angle judge(const Hyper& h, const double* sums, int64_t size) {
  constexpr double kError = (kBlockRounds + 3) / 16777216.0;
  const double g = sums[kGradGrad], w = sums[kWeightWeight];
  const double product = std::fabs(sums[kGradWeight]);
  const double least = static_cast<double>(size) * 0x1p-100;
  if (!(g >= least && w >= least && std::isfinite(g + w + product))) return Angle::unknown;
  const double low = 1.0 - kError, high = 1.0 + kError;
  const double error = kError * high * std::sqrt(g * w);
  const double widest[] = {product + error, g * low, w * low};
  if (is_orthogonal(h, widest, size)) return Angle::right;
  const double narrowest[] = {product > error ? product - error : 0.0, g * high, w * high};
  return is_orthogonal(h, narrowest, size) ? Angle::unknown : Angle::other;
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
