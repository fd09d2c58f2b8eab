// Folds one chunk to one number in the canonical order; included once per instruction set.
#pragma once

#include "cpu/engine.hpp"
#include "cpu/simd.hpp"
#include "reduce/order.hpp"

namespace pyoptim::cpu {
namespace {

using reduce::kLanes;
using reduce::weigh;

constexpr int64_t kPair = 2 * kDoubles;  // elements of one vector of float32
static_assert(kLanes % kPair == 0, "a round is whole vectors");

// sum + x*y. A product of float32 numbers is exact in float64, so that fusing changes no bit.
template <class E>
PYOPTIM_HD DoubleV add_product(DoubleV sum, DoubleV x, DoubleV y) {
#if defined(__AVX512F__)
  if constexpr (sizeof(E) < sizeof(double)) {
    return (DoubleV)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)sum);
  }
#elif defined(__FMA__)
  if constexpr (sizeof(E) < sizeof(double)) {
    return (DoubleV)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)sum);
  }
#endif
  return sum + x * y;
}

template <Fold kFold, class X>
PYOPTIM_HD X fold_two(X a, X b) {
  if constexpr (kFold == Fold::maximum) return max_keep_nan(a, b);
  return a + b;
}

PYOPTIM_HD double magnitude(double x) { return __builtin_fabs(x); }
PYOPTIM_HD DoubleV magnitude(DoubleV x) {
  using LongV = int64_t __attribute__((vector_size(kVectorBytes)));
  return bit_cast<DoubleV>(bit_cast<LongV>(x) & INT64_MAX);
}

// What is added up; b is read by products and weighted only.
template <Fold kFold, class E>
struct Terms {
  using T = typename Compute<E>::type;
  static constexpr bool kReadsB = kFold == Fold::products || kFold == Fold::weighted;
  const E *a, *b;
  T eta;

  PYOPTIM_HD double one(int64_t i) const {
    if constexpr (kFold == Fold::weighted) return term<double>(weigh(load(a[i]), load(b[i]), eta));
    const double x = load(a[i]);
    if constexpr (kFold == Fold::products) return x * load(b[i]);
    return term(x);
  }
  PYOPTIM_HD void add(int64_t i, Pair* sum) const {
    Pair x = kFold == Fold::weighted ? weighted_pair(i) : load_pair(a + i);
    if constexpr (kFold == Fold::squares || kFold == Fold::weighted) {
      *sum = {add_product<E>(sum->low, x.low, x.low), add_product<E>(sum->high, x.high, x.high)};
      return;
    }
    if constexpr (kFold == Fold::products) {
      const Pair y = load_pair(b + i);
      x = {x.low * y.low, x.high * y.high};
    } else {
      x = {term(x.low), term(x.high)};
    }
    sum->low = fold_two<kFold>(sum->low, x.low);
    sum->high = fold_two<kFold>(sum->high, x.high);
  }

 private:
  PYOPTIM_HD auto weighted(int64_t i) const {
    return weigh(load_vector(a + i), load_vector(b + i), eta);
  }
  PYOPTIM_HD Pair weighted_pair(int64_t i) const {
    if constexpr (sizeof(T) == sizeof(double))
      return {weighted(i), weighted(i + kDoubles)};
    else
      return widen_floats(weighted(i));
  }
  template <class X>
  PYOPTIM_HD static X term(X x) {
    if constexpr (kFold == Fold::squares || kFold == Fold::weighted) return x * x;
    if constexpr (kFold == Fold::values) return x;
    return magnitude(x);
  }
};

// Adds elements from `begin` on to the first n lanes, and those of the kRounds - 1 rounds after
// them in their order; n is a multiple of kPair. Asks for memory some rounds ahead: on Sapphire
// Rapids that raised 20 M float32 from 11 to 15 GB/s and bfloat16 from 6 to 14 on one core. Not
// where kPrefetchBytes is 0: on Zen 4 50 M float32 in order took 11.6 ms, with this 15 to 18.
template <int kRounds, Fold kFold, class E>
PYOPTIM_HD void add_rounds(const Terms<kFold, E>& terms, int64_t begin, int64_t n, double* lanes) {
  const int64_t ahead = kPrefetchBytes > 0 ? 2 * kRounds * kLanes : 0;
  for (int64_t l = 0; l < n; l += kPair) {
    Pair sum = load_pair(lanes + l);
    for (int round = 0; round < kRounds; ++round) {
      const int64_t i = begin + round * kLanes + l;
      __builtin_prefetch(terms.a + i + ahead);
      if constexpr (Terms<kFold, E>::kReadsB) {
        __builtin_prefetch(terms.b + i + ahead);
      }
      terms.add(i, &sum);
    }
    store_vector(lanes + l, sum.low);
    store_vector(lanes + l + kDoubles, sum.high);
  }
}

// Three times half of the lanes onto the other half, for kDoubles of those that are left.
template <Fold kFold>
PYOPTIM_HD void fold_eight(double* lanes, int64_t stride) {
  DoubleV half[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    half[k] =
        fold_two<kFold>(load_vector(lanes + k * stride), load_vector(lanes + (k + 4) * stride));
  }
  const DoubleV even = fold_two<kFold>(half[0], half[2]), odd = fold_two<kFold>(half[1], half[3]);
  store_vector(lanes, fold_two<kFold>(even, odd));
}

// Folds the upper half of the lanes onto the lower until one is left. Lanes from n on are 0, which
// changes no other: they are folded only as far as `width`, a power of two.
template <Fold kFold>
PYOPTIM_HD double fold_lanes(double* lanes, int64_t width) {
  for (; width >= 8 * kDoubles; width /= 8) {
    for (int64_t l = 0; l < width / 8; l += kDoubles) fold_eight<kFold>(lanes + l, width / 8);
  }
  for (int64_t half = width / 2; half > 0; half /= 2) {
    int64_t l = 0;
    for (; l + kDoubles <= half; l += kDoubles) {
      const DoubleV low = load_vector(lanes + l), high = load_vector(lanes + l + half);
      store_vector(lanes + l, fold_two<kFold>(low, high));
    }
    for (; l < half; ++l) lanes[l] = fold_two<kFold>(lanes[l], lanes[l + half]);
  }
  return lanes[0];
}

// The smallest power of two that is not below n, at most kLanes.
PYOPTIM_HD int64_t lanes_in_use(int64_t n) {
  int64_t width = 1;
  while (width < n && width < kLanes) width *= 2;
  return width;
}

template <Fold kFold, class E>
double fold_chunk(const void* a, const void* b, double eta, int64_t numel) {
  const Terms<kFold, E> terms{static_cast<const E*>(a),
                              static_cast<const E*>(b),
                              static_cast<typename Compute<E>::type>(eta)};
  const int64_t width = lanes_in_use(numel);
  alignas(64) double lanes[kLanes];
  std::memset(lanes, 0, width * sizeof(double));
  int64_t i = 0;
  constexpr int64_t kMany = 4;
  for (; kAddsManyRounds && i + kMany * kLanes <= numel; i += kMany * kLanes) {
    add_rounds<kMany>(terms, i, kLanes, lanes);
  }
  for (; i + kLanes <= numel; i += kLanes) add_rounds<1>(terms, i, kLanes, lanes);
  const int64_t left = numel - i, whole = left - left % kPair;
  add_rounds<1>(terms, i, whole, lanes);
  for (int64_t l = whole; l < left; ++l) lanes[l] = fold_two<kFold>(lanes[l], terms.one(i + l));
  return fold_lanes<kFold>(lanes, width);
}

template <Fold kFold>
void fill_fold(KernelTable* table) {
  FoldKernel* const by_dtype = table->fold[static_cast<int>(kFold)];
  by_dtype[static_cast<int>(DType::f64)] = fold_chunk<kFold, double>;
  by_dtype[static_cast<int>(DType::f32)] = fold_chunk<kFold, float>;
  by_dtype[static_cast<int>(DType::bf16)] = fold_chunk<kFold, Bf16>;
  by_dtype[static_cast<int>(DType::f16)] = fold_chunk<kFold, F16>;
}

void fill_folds(KernelTable* table) {
  fill_fold<Fold::squares>(table);
  fill_fold<Fold::magnitudes>(table);
  fill_fold<Fold::maximum>(table);
  fill_fold<Fold::products>(table);
  fill_fold<Fold::weighted>(table);
  table->fold[static_cast<int>(Fold::values)][static_cast<int>(DType::f64)] =
      fold_chunk<Fold::values, double>;
}

}  // namespace
}  // namespace pyoptim::cpu
