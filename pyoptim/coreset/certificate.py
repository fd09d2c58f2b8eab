"""How far a value of the GPU filter can be from the truth.

Let X = scale * x - c and Y_j = scale * y_j - c be real vectors (of unit length where the metric is
cosine; c = 0 but for Euclidean metrics, for which it is subtracted from both, and the inner
product, for which it is subtracted from y), a = |X|, b_j = |Y_j| and u = 2^-24. The score of a
column j is not above that of i exactly where V_j <= V_i for

    V_j = |Y_j|^2 / 2 - X.Y_j    (Euclidean)        V_j = -X.Y_j    (inner product, cosine).

Scores are float64, with d roundings and a few more, each of at most 2^-53 (a + b + |c|)^2 in all:
S_j <= S_i as computed means V_j <= V_i + whole (a + b + |c|)^2 with whole = 4.44e-16 (d + 16).

The filter computes v_j from parts of bfloat16. Split rows are X = X_h + X_l + r with X_h the
nearest bfloat16 and X_l the one nearest to the rest, |X_l| <= 2^-9 |X| (1 + u) and |r| <= 2^-18
|X| (1 + 2^-6) in every element, the rounding of X to float32 included. Of the products X_l.Y_l is
left out. By Cauchy and Schwarz what is lost is at most

    |X_h.Y_h + X_h.Y_l + X_l.Y_h - X.Y| <= split a b,    split = 3.1 * 2^-18,

and rows of 16 bits that are multiplied as they are lose nothing (split = 0). Every product is
exact in float32. A tensor core adds k products to an accumulator at once: all k + 1 addends are
aligned to the largest and cut after 24 bits or later, and the sum is cut to 24 bits (Fasi, Higham,
Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7, 2021;
k = 4, 8 and 16 from Volta to Hopper). Addends and sums are at most P = 1.01 a b plus the error so
far, because of |X_h|, |X_l| above; each of the k + 2 cuts loses at most 2^-23 P. Sixteen products
take 16 / k such additions, so they lose at most (16 + 32 / k) 2^-23 P <= 24 * 2^-23 P. With n
times sixteen products per accumulator, gamma = 24 n 2^-23,

    |p_j - X.Y_j| <= (split + 1.01 gamma / (1 - gamma)) a b.

|Y_j|^2 / 2 is rounded once, and so is the last subtraction: u b^2 / 2 + u (b^2 / 2 + 1.02 a b). So
|v_j - V_j| <= E with E the sum of these, and a column whose score is not above that of i has

    v_j <= v_i + slack,    slack = 2 E + whole (a + b + |c|)^2 + tiny (1 + a + b)

where b is the largest norm of the two; `tiny` covers underflow of parts and products, flushed to
zero or not. A Euclidean competitor of i is at most as far as i is: b_j <= a + scale sqrt(S_i),
which keeps one long row of y from widening the bound of all. The norms that the kernels know are
computed in float64 and widened by 1e-9.
"""

from __future__ import annotations

_UNIT = 2.0**-24
_SPLIT = 3.1 * 2.0**-18
_SIXTEEN_PRODUCTS = 24 * 2.0**-23
_DOUBLE = 4.44e-16  # two units of float64
_SMALLEST = 4.7e-38  # 2^-124
# Norms beyond it would overflow the filter's float32.
HUGE_NORM = 1e17


def slack_factors(d: int, splits: bool) -> tuple[float, float, float, float]:
    """The factors (products, squares, whole, tiny) of `Slack` in csrc/cuda/api.hpp.

    slack = products a b + squares b^2 + whole (a + b + |c|)^2 + tiny (1 + a + b).

    Args:
        d: elements of a row.
        splits: whether rows are multiplied as two parts of bfloat16, else as they are.
    """
    # The kernels add up 32 elements at a time; beyond d they are zeros.
    n = 2 * -(-d // 32) * (3 if splits else 1)
    gamma = n * _SIXTEEN_PRODUCTS
    if gamma >= 0.5:
        return (float("inf"),) * 4
    product = (_SPLIT if splits else 0.0) + 1.01 * gamma / (1 - gamma) + 1.03 * _UNIT
    wide = _DOUBLE * (d + 16)
    return 2 * product * (1 + 1e-6), 2.02 * _UNIT, wide, 4 * _SMALLEST * (d + 2)
