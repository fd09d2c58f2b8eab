// The kernels of the rules that project; included once per instruction set.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/arrays.hpp"
#include "cpu/engine.hpp"
#include "cpu/reduce.inl"

namespace pyoptim::cpu {
namespace {

// One element or a vector of them, to and from memory.
template <class E, class X>
PYOPTIM_HD void get(const E* from, X* x) {
  if constexpr (std::is_same_v<X, typename Compute<E>::type>) {
    *x = load(*from);
  } else {
    *x = load_vector(from);
  }
}
template <class E, class X>
PYOPTIM_HD void put(E* to, const X& x) {
  if constexpr (std::is_same_v<X, typename Compute<E>::type>) {
    store(*to, x);
  } else {
    store_vector(to, x);
  }
}

// Numbers in float64: as many vectors as one of X takes.
template <class X>
struct Wide {
  using D = std::conditional_t<std::is_scalar_v<X>, double, DoubleV>;
  static constexpr int kParts = std::is_same_v<X, FloatV> ? 2 : 1;
  static constexpr int64_t kStep = sizeof(D) / sizeof(double);
  D part[kParts];

  Wide() {}
  PYOPTIM_HD explicit Wide(X x) {
    if constexpr (kParts == 2) {
      const Pair wide = widen_floats(x);
      part[0] = wide.low;
      part[1] = wide.high;
    } else {
      part[0] = x;
    }
  }
  PYOPTIM_HD void add(const Wide& other) {
    for (int k = 0; k < kParts; ++k) part[k] += other.part[k];
  }
};

// The upper half of a vector onto its lower half until one number is left.
PYOPTIM_HD double fold_vector(DoubleV x) {
#if defined(__AVX512F__)
  const __m256d low = _mm512_castpd512_pd256((__m512d)x);
  const __m256d four = _mm256_add_pd(low, _mm512_extractf64x4_pd((__m512d)x, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return two[0] + two[1];
#else
  for (int64_t half = kDoubles / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
#endif
}

// kCount sums over as many elements as one of X holds.
template <class X, int kCount>
struct Products {
  using Element = X;
  static constexpr int kParts = Wide<X>::kParts;
  static constexpr int64_t kStep = Wide<X>::kStep;
  typename Wide<X>::D of[kCount > 0 ? kCount : 1][kParts];

  PYOPTIM_HD Products() {
    for_each([&](int k, int part) { of[k][part] = typename Wide<X>::D{}; });
  }
  template <class E>
  PYOPTIM_HD void add_products(int k, const Wide<X>& x, const Wide<X>& y) {
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      if constexpr (std::is_scalar_v<X>) {
        of[k][part] += x.part[part] * y.part[part];
      } else {
        of[k][part] = add_product<E>(of[k][part], x.part[part], y.part[part]);
      }
    }
  }
  PYOPTIM_HD void load(const double* from) {
    for_each([&](int k, int part) { get(from + (k * kParts + part) * kStep, &of[k][part]); });
  }
  PYOPTIM_HD void save(double* to) const {
    for_each([&](int k, int part) { put(to + (k * kParts + part) * kStep, of[k][part]); });
  }
  PYOPTIM_HD void fold(double* sums) const {
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
      sums[k] = fold_vector(kParts == 2 ? of[k][0] + of[k][kParts - 1] : of[k][0]);
    }
  }

 private:
  // Unrolled, or the sums would not be in registers.
  template <class Visit>
  PYOPTIM_HD static void for_each(const Visit& visit) {
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
#pragma GCC unroll 8
      for (int part = 0; part < kParts; ++part) visit(k, part);
    }
  }
};

// The lanes of kCount sums over at most a chunk, in the order of reduce/order.hpp. Those that one
// vector of X adds to lie side by side, for all sums: what a visit reads is in one piece, and none
// of it 4 KiB from what it writes, which processors take for the same.
template <class X, int kCount>
struct Lanes {
  static constexpr int64_t kGroup = Products<X, kCount>::kParts * Products<X, kCount>::kStep;
  alignas(64) double of[kCount * kLanes];

  Lanes() {}  // up to 32 KiB that the first round writes

  PYOPTIM_HD double* group(int64_t lane) { return of + (lane & -kGroup) * kCount; }

  // What no vector of the first round writes.
  PYOPTIM_HD void clear(int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; l += kGroup) Products<X, kCount>().save(group(l));
  }
  template <class T>
  PYOPTIM_HD void add(int64_t lane, const Products<T, kCount>& terms) {
    double* const to = group(lane) + (lane & (kGroup - 1));
    for (int k = 0; k < kCount; ++k) to[k * kGroup] += terms.of[k][0];
  }
  // Of the lanes below `width`, a power of two, or of one group; the others are 0.
  PYOPTIM_HD void fold(int64_t width, double* sums) {
    for (; width >= 8 * kGroup; width /= 8) {
      const int64_t eighth = kCount * width / 8;
      for (int64_t l = 0; l < eighth; l += kDoubles) fold_eight<Fold::values>(of + l, eighth);
    }
    for (; width > kGroup; width /= 2) {
      const int64_t half = kCount * width / 2;
      for (int64_t l = 0; l < half; l += kDoubles) {
        store_vector(of + l, load_vector(of + l) + load_vector(of + half + l));
      }
    }
    Products<X, kCount> last;
    last.load(of);
    last.fold(sums);
  }
};
template <class X>
struct Lanes<X, 0> {};

// Calls body.step(i, products) for all of [0, n), for vectors and at the end for single elements,
// and folds what is added to the products to `sums`. Memory is asked for kFar * kPrefetchBytes
// ahead, after the last element that of `next`.
template <class P, class S, class W, class Body>
PYOPTIM_HD void for_elements(int64_t n,
                             const Body& body,
                             const Arrays<P, S, W>& own,
                             const Arrays<P, S, W>& next,
                             double* sums = nullptr) {
  using T = typename Compute<P>::type;
  using X = typename VectorOf<T>::type;
  constexpr int kCount = Body::kCount;
  constexpr int64_t kWidth = kVectorBytes / sizeof(T);
  const int64_t ahead = Body::kFar * kPrefetchBytes / static_cast<int64_t>(sizeof(P));
  const int64_t whole = n - n % kWidth, turn = std::max<int64_t>(0, whole - ahead);
  const Arrays<P, S, W> later = own.moved(ahead), after = next.moved(-turn);
  Lanes<X, kCount> lanes;
  const auto step = [&](int64_t i, bool is_first, const Arrays<P, S, W>& fetch)
      __attribute__((always_inline)) {
    body.prefetch(fetch, i);
    Products<X, kCount> terms;
    if constexpr (kCount > 0) {
      if (!is_first) terms.load(lanes.group(i & (kLanes - 1)));
    }
    body.step(i, &terms);
    if constexpr (kCount > 0) terms.save(lanes.group(i & (kLanes - 1)));
  };
  int64_t i = 0;
  if constexpr (kCount > 0) {
    const int64_t end = std::min<int64_t>(whole, kLanes);
    for (; i < end; i += kWidth) step(i, true, i < turn ? later : after);
    if (whole < kLanes) lanes.clear(whole, lanes_in_use(n));
  }
  for (; i < turn; i += kWidth) step(i, false, later);
  for (; i < whole; i += kWidth) step(i, false, after);
  for (; i < n; ++i) {
    Products<T, kCount> terms;
    body.step(i, &terms);
    if constexpr (kCount > 0) lanes.add(i & (kLanes - 1), terms);
  }
  if constexpr (kCount > 0) lanes.fold(lanes_in_use(n), sums);
}

// What the check adds up over weights p and gradients g.
template <class P, class X, int kCount>
PYOPTIM_HD void add_check(const X& p, const X& g, Products<X, kCount>* sums) {
  const Wide<X> weight(p), grad(g);
  sums->template add_products<P>(kGradWeight, grad, weight);
  sums->template add_products<P>(kGradGrad, grad, grad);
  sums->template add_products<P>(kWeightWeight, weight, weight);
}

// -- sums by blocks -------------------------------------------------------------------------------

// kCount sums of X, an element or a vector of them, in the arithmetic of X.
template <class X, int kCount>
struct ShortSums {
  using Element = X;
  X of[kCount] = {};

  PYOPTIM_HD void add_product(int k, const X& x, const X& y) { of[k] = of[k] + x * y; }
};
template <class P, class X, int kCount>
PYOPTIM_HD void add_check(const X& p, const X& g, ShortSums<X, kCount>* sums) {
  sums->add_product(kGradWeight, g, p);
  sums->add_product(kGradGrad, g, g);
  sums->add_product(kWeightWeight, p, p);
}

// The short sums of the blocks of a chunk.
template <class T, int kCount>
class Blocks {
 public:
  Blocks() {}  // up to 16 KiB for float32, of which what is used is written first

  PYOPTIM_HD T* of(int64_t block) { return sums_ + block * kWidth; }

  // The upper half of the blocks onto the lower, then so the columns, in float64.
  void fold(int64_t n_blocks, double* sums) {
    alignas(64) double wide[kMost / 2 * kWidth];
    int64_t half = 1;
    while (2 * half < n_blocks) half *= 2;
    for (int64_t l = 0; l < half * kWidth; l += kVector) {
      const int64_t upper = l + half * kWidth;
      Wide<X> x(get_vector(l));
      if (upper < n_blocks * kWidth) x.add(Wide<X>(get_vector(upper)));
      for (int part = 0; part < Wide<X>::kParts; ++part) {
        put(wide + l + part * Wide<X>::kStep, x.part[part]);
      }
    }
    for (half /= 2; half > 0; half /= 2) add_upper(wide, half * kWidth, half * kWidth);
    for (int k = 0; k < kCount; ++k) {
      double* const columns = wide + k * kBlockColumns;
      for (int64_t width = kBlockColumns; width > kDoubles; width /= 2) {
        add_upper(columns, width / 2, width / 2);
      }
      sums[k] = fold_vector(load_vector(columns));
    }
  }

 private:
  using X = typename VectorOf<T>::type;
  static constexpr int64_t kMost = reduce::kChunk / kBlock, kWidth = kCount * kBlockColumns;
  static constexpr int64_t kVector = kVectorBytes / sizeof(T);
  static_assert(kBlockColumns >= kDoubles);

  PYOPTIM_HD X get_vector(int64_t at) const {
    X x;
    get(sums_ + at, &x);
    return x;
  }
  PYOPTIM_HD static void add_upper(double* from, int64_t n, int64_t distance) {
    for (int64_t l = 0; l < n; l += kDoubles) {
      store_vector(from + l, load_vector(from + l) + load_vector(from + distance + l));
    }
  }

  alignas(64) T sums_[kMost * kWidth];
};

// Calls body.step(i, sums) for all of [0, n), n <= reduce::kChunk, for vectors and at the end for
// single elements, and folds the sums of rules/projection.hpp's blocks to `sums`. Memory is asked
// for as in for_elements.
template <class P, class S, class Body>
PYOPTIM_HD void for_blocks(
    int64_t n, const Body& body, const Arrays<P, S>& own, const Arrays<P, S>& next, double* sums) {
  using T = typename Compute<P>::type;
  using X = typename VectorOf<T>::type;
  constexpr int kCount = Body::kCount, kVectors = kBlockColumns * sizeof(T) / kVectorBytes;
  constexpr int64_t kWidth = kVectorBytes / sizeof(T), kLine = 64 / sizeof(P);
  const int64_t ahead = Body::kFar * kPrefetchBytes / static_cast<int64_t>(sizeof(P));
  const int64_t whole = n - n % kWidth, turn = std::max<int64_t>(0, whole - ahead);
  const Arrays<P, S> later = own.moved(ahead), after = next.moved(-turn);
  Blocks<T, kCount> blocks;
  for (int64_t i = 0; i < n;) {
    T* const to = blocks.of(i / kBlock);
    const int64_t block_end = std::min(i + kBlock, n), end = std::min(block_end, whole);
    ShortSums<X, kCount> of_columns[kVectors];
    for (; i + kBlockColumns <= end; i += kBlockColumns) {
      const Arrays<P, S>& fetch = i < turn ? later : after;
#pragma GCC unroll 4
      for (int64_t l = 0; l < kBlockColumns; l += kLine) body.prefetch(fetch, i + l);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) body.step(i + v * kWidth, &of_columns[v]);
    }
    const int64_t vectors = std::max<int64_t>(0, (end - i) / kWidth);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (v < vectors) body.step(i + v * kWidth, &of_columns[v]);
#pragma GCC unroll 4
      for (int k = 0; k < kCount; ++k)
        put(to + k * kBlockColumns + v * kWidth, of_columns[v].of[k]);
    }
    i += vectors * kWidth;
    for (; i < block_end; ++i) {
      ShortSums<T, kCount> term;
      body.step(i, &term);
      for (int k = 0; k < kCount; ++k) to[k * kBlockColumns + i % kBlockColumns] += term.of[k];
    }
  }
  blocks.fold((n + kBlock - 1) / kBlock, sums);
}

// Gradient times weight and their squares.
template <class P>
struct Check {
  // Two arrays only: 30 M elements took 0.29 ns each with 1, 0.22 with 2 and 0.25 with 4 on Zen 5.
  static constexpr int kCount = kCheckSums, kFar = 2;
  const Arrays<P, P> at_;

  PYOPTIM_HD static void prefetch(const Arrays<P, P>& later, int64_t i) {
    later.template prefetch<0, Streams::param>(i);
  }
  template <class Sums>
  PYOPTIM_HD void step(int64_t i, Sums* sums) const {
    typename Sums::Element p, g;
    get(at_.source + i, &p);
    get(at_.grad + i, &g);
    add_check<P>(p, g, sums);
  }
};

template <class P>
void check_chunk(const Elements& at, int64_t n, double* sums) {
  const Arrays<P, P> arrays(at);
  for_elements(n, Check<P>{arrays}, arrays, arrays.moved(n), sums);
}

template <class P>
void check_shortly(const Elements& at, int64_t n, double* sums) {
  const Arrays<P, P> arrays(at);
  for_blocks(n, Check<P>{arrays}, arrays, arrays.moved(n), sums);
}

// Elements i of the averages after the gradient g, as they are stored: the direction.
template <class Rule, int V, class P, class S, class X>
PYOPTIM_HD X average(const typename Rule::Hyper& h, const Arrays<P, S>& at, int64_t i, const X& g) {
  constexpr int kStates = Rule::kStates[V];
  X a, b = {};
  get(at.s0 + i, &a);
  if constexpr (kStates > 1) get(at.s1 + i, &b);
  Rule::template average<V>(h, g, a, b);
  put(at.s0 + i, a);
  if constexpr (kStates > 1) put(at.s1 + i, b);
  if constexpr (sizeof(S) < sizeof(typename Compute<P>::type)) {
    get(at.s0 + i, &a);
    if constexpr (kStates > 1) get(at.s1 + i, &b);
  }
  return Rule::template direction<V>(h, g, a, b);
}

// The direction again; g is read where the rule needs it.
template <class Rule, int V, class X, class P, class S>
PYOPTIM_HD X stored_direction(const typename Rule::Hyper& h, const Arrays<P, S>& at, int64_t i) {
  X g = {}, a, b = {};
  if constexpr (Rule::kReadsGrad[V]) get(at.grad + i, &g);
  get(at.s0 + i, &a);
  if constexpr (Rule::kStates[V] > 1) get(at.s1 + i, &b);
  return Rule::template direction<V>(h, g, a, b);
}

// Updates the averages, with kWrites the parameter too, and adds up kCount sums by blocks.
template <class Rule, int V, class P, class S, int kSummed, bool kWrites>
struct Sweep {
  static constexpr int kCount = kSummed, kFar = 1;
  const typename Rule::Hyper h;
  const Arrays<P, S> at_;

  PYOPTIM_HD static void prefetch(const Arrays<P, S>& later, int64_t i) {
    later.template prefetch<Rule::kStates[V]>(i);
  }
  template <class Sums>
  PYOPTIM_HD void step(int64_t i, Sums* sums) const {
    typename Sums::Element p, g;
    get(at_.source + i, &p);
    get(at_.grad + i, &g);
    const auto u = average<Rule, V>(h, at_, i, g);
    if constexpr (kSummed > 0) {
      add_check<P>(p, g, sums);
      sums->add_product(kDirectionWeight, u, p);
    }
    if constexpr (kWrites) {
      write_plain(h, p, u);
      put(at_.param + i, p);
    }
  }
};

// Updates the averages, keeps the directions and adds up the last two sums.
template <class Rule, int V, class P, class S>
struct Average {
  static constexpr int kCount = 2, kFar = 1;
  using T = typename Compute<P>::type;
  const typename Rule::Hyper h;
  const Arrays<P, S> at_;
  T* const kept;

  PYOPTIM_HD static void prefetch(const Arrays<P, S>& later, int64_t i) {
    later.template prefetch<Rule::kStates[V]>(i);
  }
  template <class X>
  PYOPTIM_HD void step(int64_t i, Products<X, kCount>* sums) const {
    X p, g;
    get(at_.source + i, &p);
    get(at_.grad + i, &g);
    const X u = average<Rule, V>(h, at_, i, g);
    const Wide<X> weight(p), direction(u);
    sums->template add_products<P>(0, weight, weight);
    sums->template add_products<P>(1, direction, weight);
    put(kept + i, u);
  }
};

// Writes the parameter from kept directions, or from stored averages.
template <class Rule, int V, class P, class S, class Write, bool kIsKept>
struct Rewrite {
  static constexpr int kStates = Rule::kStates[V], kCount = 0, kFar = 1;
  const typename Rule::Hyper h;
  const Arrays<P, S> at_;
  const Write write;
  const typename Compute<P>::type* const kept;

  // Nothing where the directions were kept: they were made a moment ago.
  PYOPTIM_HD static void prefetch(const Arrays<P, S>& later, int64_t i) {
    if constexpr (!kIsKept) later.template prefetch<kStates>(i);
  }
  template <class X>
  PYOPTIM_HD void step(int64_t i, Products<X, 0>*) const {
    X p, u;
    get((Write::kReadsSource ? at_.source : at_.param) + i, &p);
    if constexpr (kIsKept) {
      get(kept + i, &u);
    } else {
      u = stored_direction<Rule, V, X>(h, at_, i);
    }
    write(h, p, u);
    put(at_.param + i, p);
    if constexpr (Write::kProjects && Rule::kProjectsBuffer[V]) put(at_.s0 + i, u);
  }
};

struct WritePlain {
  static constexpr bool kProjects = false, kReadsSource = true;
  template <class Hyper, class X>
  PYOPTIM_HD void operator()(const Hyper& h, X& p, X& u) const {
    write_plain(h, p, u);
  }
};

template <class T>
struct WriteProjected {
  static constexpr bool kProjects = true, kReadsSource = true;
  T c;
  template <class Hyper, class X>
  PYOPTIM_HD void operator()(const Hyper& h, X& p, X& u) const {
    write_projected(h, c, p, u);
  }
};

template <class T>
struct WriteRepaired {
  static constexpr bool kProjects = true, kReadsSource = false;
  Repair<T> repair;
  template <class Hyper, class X>
  PYOPTIM_HD void operator()(const Hyper& h, X& p, X& u) const {
    repair.apply(h, p, u);
  }
};

// The kernels of ProjectKernels, and the UpdateKernel of what is never projected.
template <class Rule, int V, class P, class S>
struct Projected {
  using T = typename Compute<P>::type;
  using Hyper = typename Rule::Hyper;

  static const Hyper& of(const void* hyper) { return *static_cast<const Hyper*>(hyper); }

  static void update(
      const TableRow& row, const void* hyper, int64_t begin, int64_t end, const TableRow* next) {
    const Arrays<P, S> arrays = Arrays<P, S>(row).moved(begin);
    const bool is_alike = next && next->update == row.update;
    const Sweep<Rule, V, P, S, 0, true> sweep{of(hyper), arrays};
    for_elements(end - begin, sweep, arrays, is_alike ? Arrays<P, S>(*next) : arrays);
  }

  static void sweep(
      const Elements& at, const void* hyper, int64_t n, double* sums, const Elements* next) {
    const Arrays<P, S> arrays(at), after = next ? Arrays<P, S>(*next) : arrays;
    const Hyper& h = of(hyper);
    if (pyoptim::is_deferred(h)) {
      for_blocks(n, Sweep<Rule, V, P, S, kSums, false>{h, arrays}, arrays, after, sums);
    } else {
      for_blocks(n, Sweep<Rule, V, P, S, kSums, true>{h, arrays}, arrays, after, sums);
    }
  }

  static void average(
      const Elements& at, const void* hyper, int64_t n, void* directions, double* sums) {
    const Arrays<P, S> arrays(at);
    const Average<Rule, V, P, S> average{of(hyper), arrays, static_cast<T*>(directions)};
    static_assert(kDirectionWeight == kWeightWeight + 1, "side by side");
    for_elements(n, average, arrays, arrays.moved(n), sums + kWeightWeight);
  }

  template <bool kIsKept, class Write>
  static void rewrite(const Elements& at,
                      const void* hyper,
                      int64_t n,
                      const Write& write,
                      const void* directions = nullptr) {
    const Arrays<P, S> arrays(at);
    const T* const kept = static_cast<const T*>(directions);
    const Rewrite<Rule, V, P, S, Write, kIsKept> body{of(hyper), arrays, write, kept};
    for_elements(n, body, arrays, arrays.moved(n));
  }

  static void write(const Elements& at,
                    const void* hyper,
                    int64_t n,
                    const void* directions,
                    const double* sums) {
    if (sums == nullptr) return rewrite<false>(at, hyper, n, WritePlain{});
    const WriteProjected<T> projected{static_cast<T>(radial_part(of(hyper), sums))};
    if (directions == nullptr) return rewrite<false>(at, hyper, n, projected);
    rewrite<true>(at, hyper, n, projected, directions);
  }

  static void repair(const Elements& at, const void* hyper, int64_t n, const double* sums) {
    rewrite<false>(at, hyper, n, WriteRepaired<T>{Repair<T>(of(hyper), sums)});
  }

  static bool is_orthogonal(const void* hyper, const double* sums, int64_t size) {
    return pyoptim::is_orthogonal(of(hyper), sums, size);
  }

  static Angle judge(const void* hyper, const double* sums, int64_t size) {
    return pyoptim::judge(of(hyper), sums, size);
  }

  static bool is_deferred(const void* hyper) { return pyoptim::is_deferred(of(hyper)); }

  static ProjectKernels kernels() {
    ProjectKernels kernels = {};
    kernels.param_size = static_cast<int>(sizeof(P));
    kernels.state_size = static_cast<int>(sizeof(S));
    kernels.direction_size = static_cast<int>(sizeof(T));
    kernels.n_states = Rule::kStates[V];
    kernels.check = check_chunk<P>;
    if constexpr (sizeof(T) < sizeof(double)) kernels.check_shortly = check_shortly<P>;
    kernels.sweep = sweep;
    kernels.average = average;
    kernels.write = write;
    kernels.repair = repair;
    kernels.is_orthogonal = is_orthogonal;
    kernels.judge = judge;
    kernels.is_deferred = is_deferred;
    return kernels;
  }
};

}  // namespace
}  // namespace pyoptim::cpu
