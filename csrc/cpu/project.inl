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
};

// The lane from 0, or what it holds, + x*y.
template <class E, bool kFirst, class X>
PYOPTIM_HD void add_to_lane(double* lane, const Wide<X>& x, const Wide<X>& y) {
  for (int k = 0; k < Wide<X>::kParts; ++k, lane += Wide<X>::kStep) {
    if constexpr (std::is_scalar_v<X>) {
      *lane += x.part[k] * y.part[k];
    } else {
      const DoubleV sum = kFirst ? DoubleV{} : load_vector(lane);
      store_vector(lane, add_product<E>(sum, x.part[k], y.part[k]));
    }
  }
}

// The lanes of kCount sums over at most a chunk, in the order of reduce/order.hpp.
template <int kCount>
struct Lanes {
  alignas(64) double of[kCount > 0 ? kCount : 1][kCount > 0 ? kLanes : 1];

  Lanes() {}  // 32 KiB that the first round writes

  // What no vector of the first round writes.
  PYOPTIM_HD void clear(int64_t begin, int64_t end) {
    for (int k = 0; k < kCount; ++k) {
      for (int64_t l = begin; l < end; ++l) of[k][l] = 0.0;
    }
  }

  PYOPTIM_HD void fold(int64_t n, double* sums) {
    for (int k = 0; k < kCount; ++k) sums[k] = fold_lanes<Fold::values>(of[k], lanes_in_use(n));
  }
};

// Calls body.at<X, kFirst>(i, fetch) for all of [0, n): for the vectors, at the end for single
// elements; kFirst in the first round of lanes. Elements i of `fetch` are wanted soon: those
// kPrefetchBytes further on, at last those of `next`.
template <class P, class S, class W, class Body>
PYOPTIM_HD void for_elements(int64_t n,
                             Body& body,
                             const Arrays<P, S, W>& own,
                             const Arrays<P, S, W>& next) {
  using T = typename Compute<P>::type;
  using X = typename VectorOf<T>::type;
  constexpr int64_t kWidth = kVectorBytes / sizeof(T);
  const int64_t ahead = kPrefetchBytes / static_cast<int64_t>(sizeof(P));
  const int64_t whole = n - n % kWidth, turn = std::max<int64_t>(0, whole - ahead);
  const Arrays<P, S, W> later = own.moved(ahead), after = next.moved(-turn);
  int64_t i = 0;
  if constexpr (Body::kCount > 0) {
    const int64_t end = std::min<int64_t>(whole, kLanes);
    for (; i < end; i += kWidth) body.template at<X, true>(i, later);
    if (whole < kLanes) body.lanes.clear(whole, lanes_in_use(n));
  }
  for (; i < turn; i += kWidth) body.template at<X, false>(i, later);
  for (; i < whole; i += kWidth) body.template at<X, false>(i, after);
  for (; i < n; ++i) body.template at<T, false>(i, own);
}

// Gradient times weight and their squares.
template <class P>
struct Check {
  static constexpr int kCount = 3;
  const Arrays<P, P> at_;
  Lanes<kCount> lanes;

  template <class X, bool kFirst>
  PYOPTIM_HD void at(int64_t i, const Arrays<P, P>& fetch) {
    fetch.template prefetch<0>(i);
    X p, g;
    get(at_.source + i, &p);
    get(at_.grad + i, &g);
    const Wide<X> weight(p), grad(g);
    const int64_t l = i % kLanes;
    add_to_lane<P, kFirst>(&lanes.of[kGradWeight][l], grad, weight);
    add_to_lane<P, kFirst>(&lanes.of[kGradGrad][l], grad, grad);
    add_to_lane<P, kFirst>(&lanes.of[kWeightWeight][l], weight, weight);
  }
};

template <class P>
void check_chunk(const Elements& at, int64_t n, double* sums) {
  Check<P> check{Arrays<P, P>(at), {}};
  for_elements(n, check, check.at_, check.at_);
  check.lanes.fold(n, sums);
}

// Updates the averages, with kWrites the parameter too, and adds up the last kSummed sums. Keeps
// the directions where there is room for them.
template <class Rule, int V, class P, class S, int kSummed, bool kWrites>
struct Sweep {
  static constexpr int kStates = Rule::kStates[V], kCount = kSummed;
  using T = typename Compute<P>::type;
  const typename Rule::Hyper h;
  const Arrays<P, S> at_;
  T* const kept;
  Lanes<kSummed> lanes;

  template <class X, bool kFirst>
  PYOPTIM_HD void at(int64_t i, const Arrays<P, S>& fetch) {
    Wide<X> weight, grad, direction;
    fetch.template prefetch<kStates>(i);
    step(i, &weight, &grad, &direction);
    constexpr int kSkipped = kSums - kSummed;
    const int64_t l = i % kLanes;
    if constexpr (kSummed > 2) {
      add_to_lane<P, kFirst>(&lanes.of[kGradWeight][l], grad, weight);
      add_to_lane<P, kFirst>(&lanes.of[kGradGrad][l], grad, grad);
    }
    if constexpr (kSummed > 0) {
      add_to_lane<P, kFirst>(&lanes.of[kWeightWeight - kSkipped][l], weight, weight);
      add_to_lane<P, kFirst>(&lanes.of[kDirectionWeight - kSkipped][l], direction, weight);
    }
  }

 private:
  template <class X>
  PYOPTIM_HD void step(int64_t i, Wide<X>* weight, Wide<X>* grad, Wide<X>* direction) const {
    X p, g, a, b = {};
    get(at_.source + i, &p);
    get(at_.grad + i, &g);
    get(at_.s0 + i, &a);
    if constexpr (kStates > 1) get(at_.s1 + i, &b);
    Rule::template average<V>(h, g, a, b);
    put(at_.s0 + i, a);
    if constexpr (kStates > 1) put(at_.s1 + i, b);
    if constexpr (sizeof(S) < sizeof(T)) {
      get(at_.s0 + i, &a);
      if constexpr (kStates > 1) get(at_.s1 + i, &b);
    }
    const X u = Rule::template direction<V>(h, g, a, b);
    if constexpr (kSummed > 0) *weight = Wide<X>(p);
    if constexpr (kSummed > 2) *grad = Wide<X>(g);
    if constexpr (kSummed > 0) *direction = Wide<X>(u);
    if constexpr (kWrites) {
      write_plain(h, p, u);
      put(at_.param + i, p);
    } else {
      put(kept + i, u);
    }
  }
};

// Writes the parameter from kept directions, or from stored averages.
template <class Rule, int V, class P, class S, class Write, bool kIsKept>
struct Rewrite {
  static constexpr int kStates = Rule::kStates[V], kCount = 0;
  const typename Rule::Hyper h;
  const Arrays<P, S> at_;
  const Write write;
  const typename Compute<P>::type* const kept;

  template <class X, bool>
  PYOPTIM_HD void at(int64_t i, const Arrays<P, S>& fetch) {
    X p, u;
    get((Write::kReadsSource ? at_.source : at_.param) + i, &p);
    if constexpr (kIsKept) {
      get(kept + i, &u);
    } else {
      fetch.template prefetch<kStates>(i);
      X g = {}, a, b = {};
      if constexpr (Rule::kReadsGrad[V]) get(at_.grad + i, &g);
      get(at_.s0 + i, &a);
      if constexpr (kStates > 1) get(at_.s1 + i, &b);
      u = Rule::template direction<V>(h, g, a, b);
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
    Sweep<Rule, V, P, S, 0, true> sweep{of(hyper), arrays, nullptr, {}};
    for_elements(end - begin, sweep, arrays, is_alike ? Arrays<P, S>(*next) : arrays);
  }

  static void sweep(
      const Elements& at, const void* hyper, int64_t n, double* sums, const Elements* next) {
    const Arrays<P, S> arrays(at);
    Sweep<Rule, V, P, S, kSums, true> sweep{of(hyper), arrays, nullptr, {}};
    for_elements(n, sweep, arrays, next ? Arrays<P, S>(*next) : arrays);
    sweep.lanes.fold(n, sums);
  }

  static void average(
      const Elements& at, const void* hyper, int64_t n, void* directions, double* sums) {
    const Arrays<P, S> arrays(at);
    T* const kept = static_cast<T*>(directions);
    Sweep<Rule, V, P, S, kSums - kWeightWeight, false> sweep{of(hyper), arrays, kept, {}};
    for_elements(n, sweep, arrays, arrays);
    sweep.lanes.fold(n, sums + kWeightWeight);
  }

  template <bool kIsKept, class Write>
  static void rewrite(const Elements& at,
                      const void* hyper,
                      int64_t n,
                      const Write& write,
                      const void* directions = nullptr) {
    const Arrays<P, S> arrays(at);
    const T* const kept = static_cast<const T*>(directions);
    Rewrite<Rule, V, P, S, Write, kIsKept> body{of(hyper), arrays, write, kept};
    for_elements(n, body, arrays, arrays);
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

  static bool is_deferred(const void* hyper) { return pyoptim::is_deferred(of(hyper)); }

  static ProjectKernels kernels() {
    return {static_cast<int>(sizeof(P)),
            static_cast<int>(sizeof(S)),
            static_cast<int>(sizeof(T)),
            Rule::kStates[V],
            check_chunk<P>,
            sweep,
            average,
            write,
            repair,
            is_orthogonal,
            is_deferred};
  }
};

}  // namespace
}  // namespace pyoptim::cpu
