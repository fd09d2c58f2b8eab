// Medians of columns by counting, one column per lane; included once per instruction set.
//
// A bracket (low, high] of each column holds the element wanted. A pass over the copied columns
// counts what is not above a pivot in all lanes at once and halves the bracket or better: pivots
// come from linear interpolation between the counts at its ends, every third from the middle of the
// float32 numbers in it, so that no distribution takes more than some 100 passes. The few elements
// left in the bracket are sorted. Normal data took 5 to 6 passes of 5000 rows; std::nth_element
// over columns took 15 times as long.
#pragma once

#include "coreset/kernels.hpp"
#include "cpu/simd.hpp"

namespace pyoptim::coreset {
namespace {

constexpr int kMedianLanes = kVectorBytes / sizeof(float);
// Brackets of so few elements are sorted.
constexpr int kFew = 32;

struct Bracket {
  float low, high;                 // elements above low, up to high
  int64_t below, within_or_below;  // how many are not above low, not above high
  bool is_value;                   // high is the element wanted
};

// The order of float32 numbers as integers.
PYOPTIM_HD int64_t key_of(float x) {
  const auto bits = static_cast<int64_t>(bit_cast<uint32_t>(x));
  return bits < 0x80000000 ? bits : 0x80000000 - bits;
}
PYOPTIM_HD float of_key(int64_t key) {
  return bit_cast<float>(static_cast<uint32_t>(key >= 0 ? key : 0x80000000 - key));
}

// Whether what is left is to be sorted.
PYOPTIM_HD bool is_short(const Bracket& b) {
  return !b.is_value && b.within_or_below - b.below <= kFew;
}

PYOPTIM_HD bool is_settled(const Bracket& b) {
  return b.is_value || is_short(b) || key_of(b.high) - key_of(b.low) <= 1;
}

// A number from low up to, but without, high; not low where there is another.
PYOPTIM_HD float choose_pivot(const Bracket& b, int64_t rank, bool bisects) {
  const int64_t low = key_of(b.low), high = key_of(b.high);
  const double share = (static_cast<double>(rank - b.below) + 0.5) /
                       static_cast<double>(b.within_or_below - b.below);
  const double pivot = b.low + (static_cast<double>(b.high) - b.low) * share;
  int64_t key = low + (high - low) / 2;
  // Not where an end is infinite.
  if (!bisects && pivot - pivot == 0) key = key_of(static_cast<float>(pivot));
  if (key <= low) key = low + 1;
  return of_key(key < high ? key : high - 1);
}

PYOPTIM_HD WordV add_where_at_most(WordV counts, FloatV x, FloatV pivot) {
#if defined(__AVX512F__)
  const __mmask16 below = _mm512_cmp_ps_mask((__m512)x, (__m512)pivot, _CMP_LE_OQ);
  return (WordV)_mm512_mask_add_epi32(
      (__m512i)counts, below, (__m512i)counts, _mm512_set1_epi32(1));
#else
  return counts - bit_cast<WordV>(x <= pivot);
#endif
}

PYOPTIM_HD WordV add_where_below(WordV counts, FloatV x, FloatV pivot) {
#if defined(__AVX512F__)
  const __mmask16 below = _mm512_cmp_ps_mask((__m512)x, (__m512)pivot, _CMP_LT_OQ);
  return (WordV)_mm512_mask_add_epi32(
      (__m512i)counts, below, (__m512i)counts, _mm512_set1_epi32(1));
#else
  return counts - bit_cast<WordV>(x < pivot);
#endif
}

// How many of n elements of every lane are not above its pivot.
inline void count_at_most(const float* columns, int64_t n, const float* pivots, uint32_t* counts) {
  const FloatV pivot = load_vector(pivots);
  WordV even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 <= n; i += 2, columns += 2 * kMedianLanes) {
    even = add_where_at_most(even, load_vector(columns), pivot);
    odd = add_where_at_most(odd, load_vector(columns + kMedianLanes), pivot);
  }
  if (i < n) even = add_where_at_most(even, load_vector(columns), pivot);
  store_as(counts, even + odd);
}

// Narrows the brackets of all lanes until they are settled.
inline void narrow_brackets(const float* columns, int64_t n, int64_t rank, Bracket* brackets) {
  float pivots[kMedianLanes];
  uint32_t counts[kMedianLanes];
  for (int round = 0;; ++round) {
    bool settled = true;
    for (int l = 0; l < kMedianLanes; ++l) {
      const bool done = is_settled(brackets[l]);
      pivots[l] = done ? brackets[l].high : choose_pivot(brackets[l], rank, round % 3 == 2);
      settled = settled && done;
    }
    if (settled) return;
    count_at_most(columns, n, pivots, counts);
    for (int l = 0; l < kMedianLanes; ++l) {
      if (is_settled(brackets[l])) continue;
      if (counts[l] > rank) {
        brackets[l].high = pivots[l];
        brackets[l].within_or_below = counts[l];
      } else {
        brackets[l].low = pivots[l];
        brackets[l].below = counts[l];
      }
    }
  }
}

// The elements of a lane's bracket in ascending order; infinity behind them.
struct Leftover {
  float values[kFew + 1];
  int n = 0;

  PYOPTIM_HD void insert(float x) {
    int at = n++;
    for (; at > 0 && x < values[at - 1]; --at) values[at] = values[at - 1];
    values[at] = x;
  }
};

// Sorts what is within the brackets, and finds the smallest element above each.
inline void collect(
    const float* columns, int64_t n, const Bracket* brackets, Leftover* leftovers, float* above) {
  float low[kMedianLanes], high[kMedianLanes];
  for (int l = 0; l < kMedianLanes; ++l) {
    high[l] = brackets[l].high;
    low[l] = is_short(brackets[l]) ? brackets[l].low : high[l];
  }
  const FloatV lows = load_vector(low), highs = load_vector(high);
  FloatV least = FloatV{} + __builtin_inff();
  for (int64_t i = 0; i < n; ++i, columns += kMedianLanes) {
    const FloatV x = load_vector(columns);
    const FloatV beyond = x > highs ? x : FloatV{} + __builtin_inff();
    least = beyond < least ? beyond : least;
    const auto within = (x > lows) & (x <= highs);
    if (!any_lane(within)) continue;
    for (int l = 0; l < kMedianLanes; ++l) {
      if (within[l]) leftovers[l].insert(columns[l]);
    }
  }
  store_vector(above, least);
}

// The median of every lane over n rows of columns [n][kMedianLanes], whose extremes are given.
inline void lane_medians(
    const float* columns, int64_t n, const float* least, const float* largest, double* out) {
  const int64_t rank = (n - 1) / 2;
  Bracket brackets[kMedianLanes];
  uint32_t counts[kMedianLanes];
  count_at_most(columns, n, least, counts);
  for (int l = 0; l < kMedianLanes; ++l) {
    const bool is_least = counts[l] > rank;
    brackets[l] = {least[l], largest[l], counts[l], n, false};
    if (is_least) brackets[l] = {least[l], least[l], 0, counts[l], true};
  }
  narrow_brackets(columns, n, rank, brackets);
  Leftover leftovers[kMedianLanes];
  float above[kMedianLanes];
  collect(columns, n, brackets, leftovers, above);
  for (int l = 0; l < kMedianLanes; ++l) {
    const Bracket& b = brackets[l];
    const bool sorted = is_short(b);
    const double low = sorted ? leftovers[l].values[rank - b.below] : b.high;
    double high = low;
    if (n % 2 == 0) {
      const bool is_within = rank + 1 < b.within_or_below;
      high = !is_within ? above[l] : sorted ? leftovers[l].values[rank + 1 - b.below] : b.high;
    }
    out[l] = low == high ? low : 0.5 * (low + high);
  }
}

}  // namespace
}  // namespace pyoptim::coreset
