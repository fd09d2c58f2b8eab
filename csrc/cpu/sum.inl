// The kernels of the rules that yield a term: an update that also saves what it read and adds up
// the terms; included once per instruction set.
#pragma once

#include "cpu/arrays.hpp"
#include "cpu/engine.hpp"
#include "cpu/project.inl"
#include "rules/traits.hpp"

namespace pyoptim::cpu {
namespace {

// Elements as they are in memory: bits, which a conversion to and fro could change.
template <class X, class P>
PYOPTIM_HD void copy_bits(const P* from, P* to) {
  if constexpr (std::is_scalar_v<X>) {
    *to = *from;
  } else {
    using Bits = std::conditional_t<sizeof(P) == 2, HalfV, X>;
    store_as(to, load_as<Bits>(from));
  }
}

// A parameter with a master is not saved: its master still holds it.
template <class Rule, int V, class P, class S, class W, bool kIsStreamed>
struct Sum {
  static_assert(!kWritesStates<Rule>, "these states are not written back");
  static constexpr int kStates = Rule::kStates[V], kCount = 1, kFar = 1;
  static constexpr bool kSaves = std::is_same_v<P, W>;
  const typename Rule::Hyper h;
  const Arrays<P, S, W> at_;

  PYOPTIM_HD static void prefetch(const Arrays<P, S, W>& later, int64_t i) {
    later.template prefetch<kStates>(i);
    if constexpr (kSaves && !kIsStreamed) __builtin_prefetch(later.saved + i);
  }
  template <class X>
  PYOPTIM_HD void step(int64_t i, Products<X, kCount>* sums) const {
    X p, g, a = {}, b = {}, c = {};
    get(at_.source + i, &p);
    get(at_.grad + i, &g);
    if constexpr (kStates > 0) get(at_.s0 + i, &a);
    if constexpr (kStates > 1) get(at_.s1 + i, &b);
    if constexpr (kStates > 2) get(at_.s2 + i, &c);
    if constexpr (kSaves) save<X>(i);
    const auto term = Rule::template update<V>(h, p, g, a, b, c);
    put(at_.param + i, p);
    sums->template add_products<P>(0, Wide<X>(term.a), Wide<X>(term.b));
  }

 private:
  template <class X>
  PYOPTIM_HD void save(int64_t i) const {
    if constexpr (kIsStreamed && !std::is_scalar_v<X>) {
      stream_vector(at_.saved + i, load_as<X>(at_.source + i));
    } else {
      copy_bits<X>(at_.source + i, at_.saved + i);
    }
  }
};

template <class Rule, int V, class P, class S, class W>
double sum_chunk(
    const TableRow& row, const void* hyper, int64_t begin, int64_t end, const TableRow* next) {
  const int64_t n = end - begin;
  const Arrays<P, S, W> arrays = Arrays<P, S, W>(row).moved(begin);
  const bool is_alike = next && next->sum == row.sum;
  const Arrays<P, S, W> after = end < row.numel ? arrays.moved(n)
                                : is_alike      ? Arrays<P, S, W>(*next)
                                                : arrays;
  const auto run = [&](auto&& body) {
    double sum = 0.0;
    for_elements(n, body, body.at_, after, &sum);
    return sum;
  };
  const auto& h = *static_cast<const typename Rule::Hyper*>(hyper);
  if constexpr (sizeof(P) >= sizeof(float)) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(arrays.saved) % kVectorBytes == 0;
    if (row.numel >= kStreamElements && is_aligned) {
      const double sum = run(Sum<Rule, V, P, S, W, true>{h, arrays});
      fence_streams();
      return sum;
    }
  }
  return run(Sum<Rule, V, P, S, W, false>{h, arrays});
}

}  // namespace
}  // namespace pyoptim::cpu
