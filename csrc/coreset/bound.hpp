// How far the filter's float32 values can be from the truth, so that a column is ruled out only
// where its score is certainly larger than the k-th best.
//
// Let X = scale * x - c and Y_j = scale * y_j - c be real vectors, x' and y'_j what the filter
// reads of them in float32, u = 2^-24, a = |x'|, b_j = |y'_j|. The filter compares values
//
//     v_j = |y'_j|^2 / 2 - x'.y'_j        (sqeuclidean: v_j = (|x' - y'_j|^2 - a^2) / 2)
//     v_j = -x'.y'_j                      (ip, cosine; Y_j = y_j / |y_j| - c for cosine)
//
// and computes v^_j. Packing rounds each element once: |x' - X| <= u |X|, so
//
//     |x' - X| + |y'_j - Y_j| <= delta := 1.1 u (a + b_j) + tiny.
//
// A sum of n products by fused or separate multiply-adds, in any order in which each product passes
// through at most K roundings, is off by at most gamma_K sum |x'_k y'_jk| <= gamma_K a b_j, where
// gamma_K = K u / (1 - K u) (Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition,
// section 3.1). The filter adds runs of at most `depth` products, from 0, and then the runs: a
// product is rounded at most once itself and depth - 1 + runs times in sums, so K = depth + runs.
// Rounding
// |y'_j|^2 / 2 and the last subtraction add u b_j^2 / 2 and u (b_j^2 / 2 + a b_j). Hence
//
//     |v^_j - v_j| <= E := gamma_K a b_j + u (a b_j + b_j^2) + tiny.
//
// A competitor j has a score of at most U, the k-th best score known. For sqeuclidean its distance
// is at most D = scale sqrt(U), so b_j <= R := min(max b, a + D + delta), |x' - y'_j| <= D + delta
// and v_j <= ((D + delta)^2 - a^2) / 2. For ip X.Y_j >= -scale U - X.c, for cosine X.Y_j >= (1 - U)
// |X| - X.c; x'.c differs from X.c by what delta covers. Either way v^_j <= threshold(U), and the
// columns above it are no competitors.
//
// Before any score is known: a column j whose score is at most that of a column i has
// v_j - v_i <= ((D + delta)^2 - (D - delta)^2) / 2 = 2 D delta with D <= a + b, hence
// v^_j <= v^_i + slack, slack := 2 E + 2 (a + b) delta. The k-th smallest value plus slack
// therefore is a threshold too.
//
// tiny covers underflow, in flush-to-zero mode too; wide() covers the float64 rounding of scores,
// norms and thresholds.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace pyoptim::coreset {

enum class Metric : int { sqdist = 0, ip = 1, cosine = 2 };

// What all rows share: the block of y.
struct BlockBound {
  Metric metric;
  int64_t d;
  double gamma;  // gamma_K
  double scale;
  double largest;      // max b_j
  double center_norm;  // |c|
};

// What is known of one packed row of x.
struct RowBound {
  double norm;     // a
  double product;  // x'.c for ip and cosine
};

constexpr double kUnit = 5.9604644775390625e-08;  // u
constexpr double kDouble = 4.44e-16;              // two units of float64

// gamma_K of K roundings.
inline double gamma_of(double roundings) { return roundings * kUnit / (1 - roundings * kUnit); }

class Bound {
 public:
  Bound(const BlockBound& block, const RowBound& row) : block_(block), row_(row) {}

  // What a competitor's value can be above that of a column whose score is not better.
  double slack() const {
    const double a = row_.norm, b = block_.largest, rounding = 2 * kUnit * (a * b + b * b);
    const double whole = 2 * error(b) + rounding + wide() * (a + b) * (a + b);
    if (block_.metric != Metric::sqdist) return whole + 2 * packing_error();
    return whole + 2.2 * kUnit * (a + b) * (a + b) + 2 * (a + b) * tiny(a, b);
  }

  // The value that no column with a score of at most `score` exceeds.
  double threshold(double score) const {
    const double a = row_.norm;
    if (block_.metric == Metric::sqdist) {
      const double distance = block_.scale * std::sqrt(score) * (1 + wide());
      const double around = (a + distance) * (1 + 4 * kUnit) + tiny(a, block_.largest);
      const double reach = std::min(block_.largest, around);
      const double far = distance + 1.1 * kUnit * (a + reach) + tiny(a, reach);
      return 0.5 * (far - a) * (far + a) + error(reach) + wide() * (far * far + a * a);
    }
    const double most = block_.metric == Metric::ip ? block_.scale * score : (score - 1) * a;
    return most + row_.product + error(block_.largest) + packing_error();
  }

 private:
  double error(double b) const {
    const double a = row_.norm;
    return (block_.gamma * a * b + kUnit * (a * b + b * b)) * (1 + 1e-6) + tiny(a, b);
  }

  // |x'.y' + score|, scaled and without x'.c, for ip and cosine. The rows of cosine are multiplied
  // by a reciprocal norm that is itself rounded, before c is taken off. Scores are rounded relative
  // to whole vectors.
  double packing_error() const {
    const double a = row_.norm, b = block_.largest, c = block_.center_norm;
    const double normalizing = block_.metric == Metric::cosine ? 2.2 * kUnit * a : 0;
    return 1.1 * kUnit * a * (2 * b + c) + normalizing + 4 * wide() * a * (b + c);
  }

  double tiny(double a, double b) const {
    constexpr double kSmallest = 4.7e-38;  // 2^-124
    return kSmallest * static_cast<double>(block_.d + 2) * (1 + a + b);
  }

  double wide() const { return kDouble * static_cast<double>(block_.d + 16); }

  const BlockBound& block_;
  RowBound row_;
};

// A float32 number that is not smaller, and hardly larger; NaN stays NaN.
inline float round_up(double x) {
  return static_cast<float>(x * (x < 0 ? 1 - 0x1p-22 : 1 + 0x1p-22) + 0x1p-124);
}

}  // namespace pyoptim::coreset
