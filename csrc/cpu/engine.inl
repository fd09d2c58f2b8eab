// Loops over one contiguous segment; included once per instruction set, which the file that
// includes this names.
#include <type_traits>

#include "cpu/arrays.hpp"
#include "cpu/engine.hpp"
#include "cpu/project.inl"
#include "cpu/reduce.inl"
#include "cpu/simd.hpp"
#include "cpu/sum.inl"
#include "rules/traits.hpp"

namespace pyoptim::cpu {
namespace {

// One element.
template <class Rule, int V, class P, class S, class W>
PYOPTIM_HD void update_one(const typename Rule::Hyper& h,
                           const Arrays<P, S, W>& arrays,
                           int64_t i) {
  using T = typename Compute<P>::type;
  constexpr int kStates = Rule::kStates[V];
  T p = load(arrays.source[i]), a = 0, b = 0, c = 0;
  if constexpr (kStates > 0) a = load(arrays.s0[i]);
  if constexpr (kStates > 1) b = load(arrays.s1[i]);
  if constexpr (kStates > 2) c = load(arrays.s2[i]);
  Rule::template update<V, T>(h, p, load(arrays.grad[i]), a, b, c);
  store(arrays.param[i], p);
  if constexpr (!kWritesStates<Rule>) return;
  if constexpr (!std::is_same_v<W, P>) store(arrays.master[i], p);
  if constexpr (kStates > 0) store(arrays.s0[i], a);
  if constexpr (kStates > 1) store(arrays.s1[i], b);
  if constexpr (kStates > 2) store(arrays.s2[i], c);
}

template <bool kIsStreamed, class E, class X>
PYOPTIM_HD void put_vector(E* to, const X& x) {
  if constexpr (kIsStreamed) {
    stream_vector(to, x);
  } else {
    store_vector(to, x);
  }
}

// One vector of elements.
template <class Rule, int V, Streams kStreams, class P, class S, class W>
PYOPTIM_HD void update_vector(const typename Rule::Hyper& h,
                              const Arrays<P, S, W>& arrays,
                              int64_t i) {
  using X = typename VectorOf<typename Compute<P>::type>::type;
  constexpr int kStates = Rule::kStates[V];
  constexpr bool kStreamsStates = kStreams == Streams::states;
  X p = load_vector(arrays.source + i), a = {}, b = {}, c = {};
  if constexpr (kStates > 0) a = load_vector(arrays.s0 + i);
  if constexpr (kStates > 1) b = load_vector(arrays.s1 + i);
  if constexpr (kStates > 2) c = load_vector(arrays.s2 + i);
  Rule::template update<V, X>(h, p, load_vector(arrays.grad + i), a, b, c);
  put_vector<kStreams == Streams::param>(arrays.param + i, p);
  if constexpr (!kWritesStates<Rule>) return;
  if constexpr (!std::is_same_v<W, P>) store_vector(arrays.master + i, p);
  if constexpr (kStates > 0) put_vector<kStreamsStates>(arrays.s0 + i, a);
  if constexpr (kStates > 1) put_vector<kStreamsStates>(arrays.s1 + i, b);
  if constexpr (kStates > 2) put_vector<kStreamsStates>(arrays.s2 + i, c);
}

template <class Rule, int V, Streams kStreams, class P, class S, class W>
void update_range(
    const TableRow& row, const void* hyper, int64_t begin, int64_t end, const TableRow* next) {
  constexpr int64_t kLanes = kVectorBytes / sizeof(typename Compute<P>::type);
  constexpr int kStates = Rule::kStates[V];
  const typename Rule::Hyper h = *static_cast<const typename Rule::Hyper*>(hyper);
  const Arrays<P, S, W> arrays(row);
  const int64_t ahead = kPrefetchBytes / static_cast<int64_t>(sizeof(P));
  int64_t i = begin;
  for (; i + kLanes + ahead <= end; i += kLanes) {
    arrays.template prefetch<kStates, kStreams>(i + ahead);
    update_vector<Rule, V, kStreams>(h, arrays, i);
  }
  // The last stretch asks for the start of the next row, which no hardware prefetcher can foresee.
  const Arrays<P, S, W> following(next && next->update == row.update ? *next : row);
  for (const int64_t from = i; i + kLanes <= end; i += kLanes) {
    following.template prefetch<kStates, kStreams>(i - from);
    update_vector<Rule, V, kStreams>(h, arrays, i);
  }
  for (; i < end; ++i) update_one<Rule, V>(h, arrays, i);
}

template <class Rule, int V, class P, class S, class W>
void update_segment(
    const TableRow& row, const void* hyper, int64_t begin, int64_t end, const TableRow* next) {
  constexpr auto kPlain = update_range<Rule, V, Streams::nothing, P, S, W>;
  if constexpr (sizeof(P) >= sizeof(float)) {
    constexpr bool kIsParam = kReadsStates<Rule>;
    constexpr auto kStreams = kIsParam ? Streams::param : Streams::states;
    const P* const written = static_cast<const P*>(kIsParam ? row.param : row.state[0]);
    const auto misaligned = reinterpret_cast<uintptr_t>(written + begin) % kVectorBytes;
    if (row.numel >= kStreamElements && !(kIsParam && row.source == row.param)) {
      const int64_t head = (kVectorBytes - misaligned) % kVectorBytes / sizeof(P);
      const int64_t start = begin + head < end ? begin + head : end;
      kPlain(row, hyper, begin, start, nullptr);
      update_range<Rule, V, kStreams, P, S, W>(row, hyper, start, end, next);
      return fence_streams();
    }
  }
  kPlain(row, hyper, begin, end, next);
}

template <class G>
void unscale_segment(void* grad, double inv_scale, int64_t begin, int64_t end) {
  using T = typename Compute<G>::type;
  G* const g = static_cast<G*>(grad);
  const T factor = static_cast<T>(inv_scale);
  constexpr int64_t kLanes = kVectorBytes / sizeof(T);
  const int64_t ahead = kPrefetchBytes / static_cast<int64_t>(sizeof(G));
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    __builtin_prefetch(g + i + ahead);
    store_vector(g + i, load_vector(g + i) * factor);
  }
  for (; i < end; ++i) store(g[i], load(g[i]) * factor);
}

// What a loop adds to its read-write arrays.
template <int R, class X, class E>
PYOPTIM_HD X stream_sum(const E* const* r, int64_t i) {
  if constexpr (R == 0) return X{} + E(1);
  if constexpr (R == 1) return load_as<X>(r[0] + i);
  if constexpr (R == 2) return load_as<X>(r[0] + i) + load_as<X>(r[1] + i);
}

template <class E, class Vector>
PYOPTIM_HD void stream_add(E* to, Vector x) {
  store_as(to, load_as<Vector>(to) + x);
}

// One loop per count of arrays, so that the loads and stores of all of them are interleaved as in
// an update.
template <class E, int R, int W>
void stream_arrays(void* const* read_only, void* const* read_write, int64_t begin, int64_t end) {
  using Vector = typename VectorOf<E>::type;
  constexpr int64_t kLanes = kVectorBytes / sizeof(E);
  const E* r[2] = {};
  for (int k = 0; k < R; ++k) r[k] = static_cast<const E*>(read_only[k]);
  E* w[4];
  for (int k = 0; k < W; ++k) w[k] = static_cast<E*>(read_write[k]);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const Vector x = stream_sum<R, Vector>(r, i);
    stream_add(w[0] + i, x);
    if constexpr (W > 1) stream_add(w[1] + i, x);
    if constexpr (W > 2) stream_add(w[2] + i, x);
    if constexpr (W > 3) stream_add(w[3] + i, x);
  }
  for (; i < end; ++i) {
    const E x = stream_sum<R, E>(r, i);
    for (int k = 0; k < W; ++k) w[k][i] = static_cast<E>(w[k][i] + x);
  }
}

template <class E>
void stream_items(void* const* read_only,
                  int n_read_only,
                  void* const* read_write,
                  int n_read_write,
                  int64_t begin,
                  int64_t end) {
  using Loop = void (*)(void* const*, void* const*, int64_t, int64_t);
  constexpr Loop kLoops[3][4] = {{stream_arrays<E, 0, 1>,
                                  stream_arrays<E, 0, 2>,
                                  stream_arrays<E, 0, 3>,
                                  stream_arrays<E, 0, 4>},
                                 {stream_arrays<E, 1, 1>,
                                  stream_arrays<E, 1, 2>,
                                  stream_arrays<E, 1, 3>,
                                  stream_arrays<E, 1, 4>},
                                 {stream_arrays<E, 2, 1>,
                                  stream_arrays<E, 2, 2>,
                                  stream_arrays<E, 2, 3>,
                                  stream_arrays<E, 2, 4>}};
  kLoops[n_read_only][n_read_write - 1](read_only, read_write, begin, end);
}

void stream_segment(int itemsize,
                    void* const* read_only,
                    int n_read_only,
                    void* const* read_write,
                    int n_read_write,
                    int64_t begin,
                    int64_t end) {
  const auto loop = itemsize == 2   ? stream_items<uint16_t>
                    : itemsize == 4 ? stream_items<float>
                                    : stream_items<double>;
  loop(read_only, n_read_only, read_write, n_read_write, begin, end);
}

int64_t count_wrong_roots(uint32_t first, uint32_t last) {
  constexpr int64_t kLanes = kVectorBytes / sizeof(float);
  int64_t wrong = 0;
  for (int64_t bits = first; bits <= last; bits += kLanes) {
    WordV words;
    for (int64_t k = 0; k < kLanes; ++k) words[k] = static_cast<uint32_t>(bits + k);
    const FloatV x = bit_cast<FloatV>(words);
    const FloatV roots = Math<FloatV>::sqrt(x);
    for (int64_t k = 0; k < kLanes && bits + k <= last; ++k) {
      const float root = std::sqrt(static_cast<float>(x[k])), found = roots[k];
      wrong +=
          bit_cast<uint32_t>(root) != bit_cast<uint32_t>(found) && (root == root || found == found);
    }
  }
  return wrong;
}

template <template <class> class R, int V, class P, class S, class W = P>
void fill_kernels(RuleId rule, DTypeSet dtypes, KernelTable* table) {
  using Rule = R<typename Compute<P>::type>;
  const int r = static_cast<int>(rule), d = static_cast<int>(dtypes);
  if constexpr (kProjects<Rule>) {
    table->update[r][V][d] = Projected<Rule, V, P, S>::update;
    table->project[r][V][d] = Projected<Rule, V, P, S>::kernels();
  } else {
    table->update[r][V][d] = update_segment<Rule, V, P, S, W>;
    if constexpr (kYieldsTerm<Rule>) table->sum[r][V][d] = sum_chunk<Rule, V, P, S, W>;
  }
}

template <template <class> class R, int V>
void fill_variant(RuleId rule, KernelTable* table) {
  if constexpr (V < R<float>::kVariants) {
    fill_kernels<R, V, double, double>(rule, DTypeSet::f64, table);
    fill_kernels<R, V, float, float>(rule, DTypeSet::f32, table);
    fill_kernels<R, V, Bf16, Bf16>(rule, DTypeSet::bf16, table);
    fill_kernels<R, V, F16, F16>(rule, DTypeSet::f16, table);
    fill_kernels<R, V, Bf16, float>(rule, DTypeSet::bf16_state32, table);
    fill_kernels<R, V, F16, float>(rule, DTypeSet::f16_state32, table);
    if constexpr (kHasMaster<R<float>>) {
      fill_kernels<R, V, Bf16, Bf16, float>(rule, DTypeSet::bf16_master, table);
      fill_kernels<R, V, F16, F16, float>(rule, DTypeSet::f16_master, table);
      fill_kernels<R, V, Bf16, float, float>(rule, DTypeSet::bf16_master_state32, table);
      fill_kernels<R, V, F16, float, float>(rule, DTypeSet::f16_master_state32, table);
    }
  }
}

KernelTable make_table(const char* isa) {
  KernelTable table = {};
  table.isa = isa;
#define PYOPTIM_FILL(Rule)                                                    \
  static_assert(Rule<float>::kVariants <= kMaxVariants, "too many variants"); \
  fill_variant<Rule, 0>(RuleId::Rule, &table);                                \
  fill_variant<Rule, 1>(RuleId::Rule, &table);                                \
  fill_variant<Rule, 2>(RuleId::Rule, &table);                                \
  fill_variant<Rule, 3>(RuleId::Rule, &table);                                \
  fill_variant<Rule, 4>(RuleId::Rule, &table);                                \
  fill_variant<Rule, 5>(RuleId::Rule, &table);
  PYOPTIM_FOR_EACH_RULE(PYOPTIM_FILL)
#undef PYOPTIM_FILL
  table.unscale[static_cast<int>(DType::f64)] = unscale_segment<double>;
  table.unscale[static_cast<int>(DType::f32)] = unscale_segment<float>;
  table.unscale[static_cast<int>(DType::bf16)] = unscale_segment<Bf16>;
  table.unscale[static_cast<int>(DType::f16)] = unscale_segment<F16>;
  fill_folds(&table);
  table.stream = stream_segment;
  table.count_wrong_roots = count_wrong_roots;
  return table;
}

}  // namespace
}  // namespace pyoptim::cpu
