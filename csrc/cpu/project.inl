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

// A number or a vector of them in float64.
PYOPTIM_HD double widen_to_double(double x) { return x; }
PYOPTIM_HD double widen_to_double(float x) { return x; }
PYOPTIM_HD DoubleV widen_to_double(DoubleV x) { return x; }
PYOPTIM_HD Pair widen_to_double(FloatV x) { return widen_floats(x); }

// lane += x*y, from 0 in the first round.
template <class E, bool kFirst>
PYOPTIM_HD void add_to_lane(double* lane, double x, double y) {
  *lane = (kFirst ? 0.0 : *lane) + x * y;
}
template <class E, bool kFirst>
PYOPTIM_HD void add_to_lane(double* lane, DoubleV x, DoubleV y) {
  store_vector(lane, add_product<E>(kFirst ? DoubleV{} : load_vector(lane), x, y));
}
template <class E, bool kFirst>
PYOPTIM_HD void add_to_lane(double* lane, const Pair& x, const Pair& y) {
  add_to_lane<E, kFirst>(lane, x.low, y.low);
  add_to_lane<E, kFirst>(lane + kDoubles, x.high, y.high);
}

// The lanes of kCount sums over at most a chunk, in the order of reduce/order.hpp.
template <int kCount>
struct Lanes {
  alignas(64) double of[kCount > 0 ? kCount : 1][kCount > 0 ? kLanes : 1];

  Lanes() {}  // 32 KiB that the first round writes

  // Before elements from `begin` on are added that no vector holds, in the first round.
  PYOPTIM_HD void clear(int64_t begin, int64_t end) {
    for (int k = 0; k < kCount; ++k) {
      for (int64_t l = begin; l < end; ++l) of[k][l] = 0.0;
    }
  }

  // Of n elements; each has been added.
  PYOPTIM_HD void fold(int64_t n, double* sums) {
    const int64_t width = lanes_in_use(n);
    for (int k = 0; k < kCount; ++k) {
      for (int64_t l = n; l < width; ++l) of[k][l] = 0.0;
      sums[k] = fold_lanes<Fold::values>(of[k], width);
    }
  }
};

// Calls body.at<X, kFirst>(i, fetch) for all of [0, n), X a vector or, at the end, one element;
// kFirst in the first round of lanes. Elements i of `fetch` are wanted soon: those kPrefetchBytes
// further on, at last those of `next`.
template <class P, class S, class Body>
PYOPTIM_HD void for_elements(int64_t n,
                             Body& body,
                             const Arrays<P, S>& own,
                             const Arrays<P, S>& next) {
  using T = typename Compute<P>::type;
  using X = typename VectorOf<T>::type;
  constexpr int64_t kWidth = kVectorBytes / sizeof(T);
  const int64_t ahead = kPrefetchBytes / static_cast<int64_t>(sizeof(P));
  const int64_t whole = n - n % kWidth, turn = std::max<int64_t>(0, whole - ahead);
  for (int64_t begin = 0, end; begin < whole; begin = end) {
    end = begin < turn ? turn : whole;
    const Arrays<P, S> fetch = begin < turn ? own.moved(ahead) : next.moved(-turn);
    if (Body::kCount > 0 && begin < kLanes) {
      end = std::min<int64_t>(end, kLanes);
      for (int64_t i = begin; i < end; i += kWidth) body.template at<X, true>(i, fetch);
    } else {
      for (int64_t i = begin; i < end; i += kWidth) body.template at<X, false>(i, fetch);
    }
  }
  if (whole < kLanes) body.lanes.clear(whole, n);
  for (int64_t i = whole; i < n; ++i) body.template at<T, false>(i, own);
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
    get(at_.param + i, &p);
    get(at_.grad + i, &g);
    const auto weight = widen_to_double(p), grad = widen_to_double(g);
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

// Updates the averages, with kWrites the parameter too, and adds up the last kSummed sums.
template <class Rule, int V, class P, class S, int kSummed, bool kWrites>
struct Sweep {
  static constexpr int kStates = Rule::kStates[V], kCount = kSummed;
  const typename Rule::Hyper h;
  const Arrays<P, S> at_;
  Lanes<kSummed> lanes;

  template <class X, bool kFirst>
  PYOPTIM_HD void at(int64_t i, const Arrays<P, S>& fetch) {
    fetch.template prefetch<kStates>(i);
    X p, g, a, b = {};
    get(at_.param + i, &p);
    get(at_.grad + i, &g);
    get(at_.s0 + i, &a);
    if constexpr (kStates > 1) get(at_.s1 + i, &b);
    Rule::template average<V>(h, g, a, b);
    put(at_.s0 + i, a);
    if constexpr (kStates > 1) put(at_.s1 + i, b);
    if constexpr (sizeof(S) < sizeof(typename Compute<P>::type)) {
      get(at_.s0 + i, &a);
      if constexpr (kStates > 1) get(at_.s1 + i, &b);
    }
    const X u = Rule::template direction<V>(h, g, a, b);
    if constexpr (kSummed > 0) add<X, kFirst>(i % kLanes, p, g, u);
    if constexpr (kWrites) {
      write_plain(h, p, u);
      put(at_.param + i, p);
    }
  }

 private:
  template <class X, bool kFirst>
  PYOPTIM_HD void add(int64_t l, X p, X g, X u) {
    constexpr int kSkipped = kSums - kSummed;
    const auto weight = widen_to_double(p);
    if constexpr (kSkipped == 0) {
      const auto grad = widen_to_double(g);
      add_to_lane<P, kFirst>(&lanes.of[kGradWeight][l], grad, weight);
      add_to_lane<P, kFirst>(&lanes.of[kGradGrad][l], grad, grad);
    }
    add_to_lane<P, kFirst>(&lanes.of[kWeightWeight - kSkipped][l], weight, weight);
    add_to_lane<P, kFirst>(&lanes.of[kDirectionWeight - kSkipped][l], widen_to_double(u), weight);
  }
};

// Writes the parameter from stored averages.
template <class Rule, int V, class P, class S, class Write>
struct Rewrite {
  static constexpr int kStates = Rule::kStates[V], kCount = 0;
  const typename Rule::Hyper h;
  const Arrays<P, S> at_;
  const Write write;
  Lanes<0> lanes;

  template <class X, bool>
  PYOPTIM_HD void at(int64_t i, const Arrays<P, S>& fetch) {
    fetch.template prefetch<kStates>(i);
    X p, g = {}, a, b = {};
    get(at_.param + i, &p);
    if constexpr (Rule::kReadsGrad[V]) get(at_.grad + i, &g);
    get(at_.s0 + i, &a);
    if constexpr (kStates > 1) get(at_.s1 + i, &b);
    X u = Rule::template direction<V>(h, g, a, b);
    write(h, p, u);
    put(at_.param + i, p);
    if constexpr (Write::kProjects && Rule::kProjectsBuffer[V]) put(at_.s0 + i, u);
  }
};

struct WritePlain {
  static constexpr bool kProjects = false;
  template <class Hyper, class X>
  PYOPTIM_HD void operator()(const Hyper& h, X& p, X& u) const {
    write_plain(h, p, u);
  }
};

template <class T>
struct WriteProjected {
  static constexpr bool kProjects = true;
  T c;
  template <class Hyper, class X>
  PYOPTIM_HD void operator()(const Hyper& h, X& p, X& u) const {
    write_projected(h, c, p, u);
  }
};

template <class T>
struct WriteRepaired {
  static constexpr bool kProjects = true;
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
    Sweep<Rule, V, P, S, 0, true> sweep{of(hyper), arrays, {}};
    for_elements(end - begin, sweep, arrays, is_alike ? Arrays<P, S>(*next) : arrays);
  }

  static void sweep(
      const Elements& at, const void* hyper, int64_t n, double* sums, const Elements* next) {
    const Arrays<P, S> arrays(at);
    Sweep<Rule, V, P, S, kSums, true> sweep{of(hyper), arrays, {}};
    for_elements(n, sweep, arrays, next ? Arrays<P, S>(*next) : arrays);
    sweep.lanes.fold(n, sums);
  }

  static void average(const Elements& at, const void* hyper, int64_t n, double* sums) {
    const Arrays<P, S> arrays(at);
    Sweep<Rule, V, P, S, kSums - kWeightWeight, false> sweep{of(hyper), arrays, {}};
    for_elements(n, sweep, arrays, arrays);
    sweep.lanes.fold(n, sums + kWeightWeight);
  }

  template <class Write>
  static void rewrite(const Elements& at, const void* hyper, int64_t n, const Write& write) {
    const Arrays<P, S> arrays(at);
    Rewrite<Rule, V, P, S, Write> body{of(hyper), arrays, write, {}};
    for_elements(n, body, arrays, arrays);
  }

  static void write(const Elements& at, const void* hyper, int64_t n, const double* sums) {
    if (sums == nullptr) return rewrite(at, hyper, n, WritePlain{});
    rewrite(at, hyper, n, WriteProjected<T>{static_cast<T>(radial_part(of(hyper), sums))});
  }

  static void repair(const Elements& at, const void* hyper, int64_t n, const double* sums) {
    rewrite(at, hyper, n, WriteRepaired<T>{Repair<T>(of(hyper), sums)});
  }

  static bool is_orthogonal(const void* hyper, const double* sums, int64_t size) {
    return pyoptim::is_orthogonal(of(hyper), sums, size);
  }

  static bool is_deferred(const void* hyper) { return pyoptim::is_deferred(of(hyper)); }

  static ProjectKernels kernels() {
    return {static_cast<int>(sizeof(P)),
            static_cast<int>(sizeof(S)),
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
