// The coreset kernels; included once per instruction set.
#include "coreset/kernels.hpp"
#include "cpu/simd.hpp"

namespace pyoptim::coreset {
namespace {

constexpr int kLanes = kVectorBytes / sizeof(float);
constexpr int kVectors = 2;  // of a panel's row
constexpr int kColumns = kVectors * kLanes;
// As many accumulators as leave registers for a row of the panel and an element of x. On Sapphire
// Rapids 12 x 32 ran at 97 to 99 % of the FMA peak for d of 64 to 768, and needs half of the
// second-level cache's bandwidth of 6 x 64 (91 to 98 %).
#if defined(__AVX512F__)
constexpr int kStrip = 12;
#else
constexpr int kStrip = 6;
#endif
static_assert(kColumns <= kMaxColumns, "candidates have room for a panel");

PYOPTIM_HD FloatV multiply_add(FloatV a, FloatV b, FloatV c) {
#if defined(__AVX512F__)
  return (FloatV)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (FloatV)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

PYOPTIM_HD FloatV broadcast(float x) {
#if defined(__AVX512F__)
  return (FloatV)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (FloatV)_mm256_set1_ps(x);
#else
  return x - FloatV{};  // 0 + x would be an addition, because of -0
#endif
}

// A bit per lane that is not above the threshold; none where either is NaN.
PYOPTIM_HD uint32_t at_most(FloatV x, float threshold) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(threshold), _CMP_LE_OQ);
#elif defined(__AVX2__)
  const __m256 below = _mm256_cmp_ps((__m256)x, _mm256_set1_ps(threshold), _CMP_LE_OQ);
  return static_cast<uint32_t>(_mm256_movemask_ps(below));
#elif defined(__x86_64__)
  const __m128 below = _mm_cmple_ps((__m128)x, _mm_set1_ps(threshold));
  return static_cast<uint32_t>(_mm_movemask_ps(below));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= static_cast<uint32_t>(x[l] <= threshold) << l;
  return bits;
#endif
}

// Whether a comparison holds in any lane.
template <class V>
PYOPTIM_HD bool any_lane(const V& holds) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)holds, (__m512i)holds) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)holds, (__m256i)holds);
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)holds) != 0;
#else
  bool any = false;
  for (int l = 0; l < kLanes; ++l) any |= holds[l] != 0;
  return any;
#endif
}

PYOPTIM_HD float lowest(FloatV x) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_ps((__m512)x);
#else
  float least = x[0];
  for (int l = 1; l < kLanes; ++l) least = x[l] < least ? x[l] : least;
  return least;
#endif
}

// -- the filter ----------------------------------------------------------------------------------

struct Tile {
  FloatV sums[kStrip][kVectors];
};

// The products of kStrip rows of x and a panel, over n elements.
PYOPTIM_HD void multiply(const float* x, int64_t ld, const float* y, int64_t n, Tile* tile) {
  // Elements of the panel asked for ahead: they come from the second-level cache.
  constexpr int64_t kAhead = 8;
  FloatV sums[kStrip][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[r][v] = FloatV{};
  }
  for (int64_t k = 0; k < n; ++k, y += kColumns) {
    FloatV panel[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      panel[v] = load_vector(y + v * kLanes);
      __builtin_prefetch(y + kAhead * kColumns + v * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kStrip; ++r) {
      const FloatV element = broadcast(x[r * ld + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = multiply_add(element, panel[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) tile->sums[r][v] = sums[r][v];
  }
}

int64_t multiply_registers(int64_t rounds) {
  constexpr int kSums = 12;  // more than the latency of a multiply-add times two per cycle
  FloatV sums[kSums];
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) sums[i] = broadcast(static_cast<float>(i));
  const FloatV factor = broadcast(rounds < 0 ? 2.0f : 0.5f), term = broadcast(1.0f);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = multiply_add(sums[i], factor, term);
  }
  FloatV total = sums[0];
#pragma GCC unroll 12
  for (int i = 1; i < kSums; ++i) total += sums[i];
  // The sum is below 24; the compiler does not know it.
  return total[0] < 100.0f ? rounds * kSums * kLanes : 0;
}

// Puts the columns of one row that its threshold does not rule out on its list.
__attribute__((noinline)) void keep(const Scan& work, int64_t row, FloatV low, FloatV high) {
  RowState& state = work.rows[row];
  if (work.only_nearest) {
    const float least = lowest(low < high ? low : high);
    if (least < state.lowest) state.lowest = least;
    const float threshold = state.lowest + state.slack;
    if (threshold < state.threshold) state.threshold = threshold;
  }
  uint32_t bits = at_most(low, state.threshold) | at_most(high, state.threshold) << kLanes;
  bits &= work.valid;
  float values[kColumns];
  store_vector(values, low);
  store_vector(values + kLanes, high);
  Candidate* const list = work.candidates + row * work.capacity;
  for (; bits; bits &= bits - 1) {
    const int c = __builtin_ctz(bits);
    list[state.n_candidates++] = {values[c], work.first_column + c};
  }
  if (state.n_candidates + kMaxColumns > work.capacity) work.make_room(work.context, row);
}

// Compares the values of a strip with the thresholds of its rows. The rows to keep are collected
// first: a branch per row would be mispredicted several times per strip.
PYOPTIM_HD void compare(const Scan& work, int64_t first_row, const Tile& tile) {
  const FloatV half_low = load_vector(work.half_norms);
  const FloatV half_high = load_vector(work.half_norms + kLanes);
  RowState* const states = work.rows + first_row;
  uint32_t rows = 0;
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) {
    const FloatV low = half_low - tile.sums[r][0], high = half_high - tile.sums[r][1];
    const uint32_t bits = at_most(low < high ? low : high, states[r].threshold);
    rows |= static_cast<uint32_t>(bits != 0) << r;
  }
  for (; rows; rows &= rows - 1) {
    const int r = __builtin_ctz(rows);
    keep(work, first_row + r, half_low - tile.sums[r][0], half_high - tile.sums[r][1]);
  }
}

// Adds a tile to the partial results, or the partial results to the tile.
PYOPTIM_HD void add_partial(float* partial, bool is_first, bool is_last, Tile* tile) {
  for (int r = 0; r < kStrip; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* const at = partial + r * kColumns + v * kLanes;
      if (!is_first) tile->sums[r][v] += load_vector(at);
      if (!is_last) store_vector(at, tile->sums[r][v]);
    }
  }
}

// All products in one run.
void scan_shallow(const Scan& work) {
  for (int64_t row = 0; row < work.n_rows; row += kStrip) {
    Tile tile;
    multiply(work.x + row * work.ld, work.ld, work.y, work.d, &tile);
    compare(work, row, tile);
  }
}

void scan_deep(const Scan& work) {
  const int64_t n_runs = (work.d + kDepth - 1) / kDepth;
  const int64_t depth = (work.d + n_runs - 1) / n_runs;
  for (int64_t run = 0; run < n_runs; ++run) {
    const int64_t k = run * depth, n = k + depth < work.d ? depth : work.d - k;
    const bool is_last = run + 1 == n_runs;
    for (int64_t row = 0; row < work.n_rows; row += kStrip) {
      Tile tile;
      multiply(work.x + row * work.ld + k, work.ld, work.y + k * kColumns, n, &tile);
      add_partial(work.partial + row * kColumns, run == 0, is_last, &tile);
      if (is_last) compare(work, row, tile);
    }
  }
}

void scan(const Scan& work) { work.d > kDepth ? scan_deep(work) : scan_shallow(work); }

// -- packing -------------------------------------------------------------------------------------

#if defined(__AVX512F__)
PYOPTIM_HD FloatV narrow_pair(Pair x) {
  const __m256 low = _mm512_cvtpd_ps((__m512d)x.low), high = _mm512_cvtpd_ps((__m512d)x.high);
  return (FloatV)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}
#elif defined(__AVX2__)
PYOPTIM_HD FloatV narrow_pair(Pair x) {
  const __m128 low = _mm256_cvtpd_ps((__m256d)x.low), high = _mm256_cvtpd_ps((__m256d)x.high);
  return (FloatV)_mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
}
#else
PYOPTIM_HD FloatV narrow_pair(Pair x) {
  FloatV narrow;
  for (int64_t l = 0; l < kDoubles; ++l) {
    narrow[l] = static_cast<float>(x.low[l]);
    narrow[l + kDoubles] = static_cast<float>(x.high[l]);
  }
  return narrow;
}
#endif

// 2 * kDoubles elements of x * scale - center.
PYOPTIM_HD FloatV pack_vector(const double* x, double scale, const float* center) {
  const Pair shift = load_pair(center);
  const DoubleV low = load_vector(x) * scale - shift.low;
  const DoubleV high = load_vector(x + kDoubles) * scale - shift.high;
  return narrow_pair({low, high});
}
template <class E>
PYOPTIM_HD FloatV pack_vector(const E* x, double scale, const float* center) {
  return load_vector(x) * static_cast<float>(scale) - load_vector(center);
}

// Copies the last elements of a row to a buffer with zeros behind them.
template <class E>
PYOPTIM_HD void copy_tail(const E* from, int64_t n, E* to) {
  std::memset(to, 0, kLanes * sizeof(E));
  std::memcpy(to, from, n * sizeof(E));
}

// Elements of a row asked for ahead.
constexpr int64_t kPrefetch = 512;

struct Sums {
  Pair squares, products;
};

PYOPTIM_HD void add_sums(FloatV x, const float* shift, Sums* sums) {
  const Pair wide = widen_floats(x);
  sums->squares.low += wide.low * wide.low;
  sums->squares.high += wide.high * wide.high;
  if (shift == nullptr) return;
  const Pair other = load_pair(shift);
  sums->products.low += wide.low * other.low;
  sums->products.high += wide.high * other.high;
}

PYOPTIM_HD double total(const Pair& lanes) {
  const DoubleV both = lanes.low + lanes.high;
  double sum = 0;
  for (int64_t l = 0; l < kDoubles; ++l) sum += both[l];
  return sum;
}

template <class E>
void pack_row(const PackRows& work, const E* x, int64_t row) {
  static const float zeros[kLanes] = {};
  float* const out = work.out + row * work.ld;
  Sums sums = {};
  int64_t k = 0;
  for (; k + kLanes <= work.d; k += kLanes) {
    const float* const center = work.center ? work.center + k : zeros;
    __builtin_prefetch(x + k + kPrefetch);
    const FloatV packed = pack_vector(x + k, work.scale, center);
    store_vector(out + k, packed);
    add_sums(packed, work.shift ? work.shift + k : nullptr, &sums);
  }
  if (k < work.d) {
    E tail[kLanes];
    float center[kLanes] = {}, shift[kLanes] = {};
    copy_tail(x + k, work.d - k, tail);
    if (work.center) copy_tail(work.center + k, work.d - k, center);
    if (work.shift) copy_tail(work.shift + k, work.d - k, shift);
    const FloatV packed = pack_vector(tail, work.scale, center);
    store_vector(out + k, packed);
    add_sums(packed, shift, &sums);
  }
  work.squares[row] = total(sums.squares);
  if (work.products) work.products[row] = total(sums.products);
}

template <class E>
void pack_typed(const PackRows& work) {
  const E* const data = static_cast<const E*>(work.data);
  for (int64_t i = 0; i < work.n_rows; ++i) {
    pack_row(work, data + (work.rows ? work.rows[i] : i) * work.stride, i);
  }
}

void pack_rows(const PackRows& work) {
  constexpr void (*kPack[])(const PackRows&) = {
      pack_typed<double>, pack_typed<float>, pack_typed<Bf16>, pack_typed<F16>};
  kPack[static_cast<int>(work.dtype)](work);
}

// -- scores --------------------------------------------------------------------------------------

// Partial sums of a score: lane l holds the elements k with k mod kScoreLanes = l.
constexpr int kScoreLanes = 16;
constexpr int kPairs = kScoreLanes / kLanes;

template <Score kScore>
PYOPTIM_HD DoubleV score_term(DoubleV x, DoubleV y) {
  if constexpr (kScore == Score::dot) return x * y;
  const DoubleV difference = x - y;
  return difference * difference;
}

template <Score kScore, class X, class Y>
PYOPTIM_HD void add_terms(const X* x, const Y* y, Pair* sums) {
#pragma GCC unroll 4
  for (int p = 0; p < kPairs; ++p) {
    const Pair a = load_pair(x + p * kLanes), b = load_pair(y + p * kLanes);
    sums[p].low += score_term<kScore>(a.low, b.low);
    sums[p].high += score_term<kScore>(a.high, b.high);
  }
}

#if defined(__x86_64__)
PYOPTIM_HD double fold_lanes(__m128d x) { return _mm_cvtsd_f64(x + _mm_unpackhi_pd(x, x)); }
#endif
#if defined(__AVX2__)
PYOPTIM_HD double fold_lanes(__m256d x) {
  return fold_lanes(_mm256_castpd256_pd128(x) + _mm256_extractf128_pd(x, 1));
}
#endif
#if defined(__AVX512F__)
PYOPTIM_HD double fold_lanes(__m512d x) {
  return fold_lanes(_mm512_castpd512_pd256(x) + _mm512_extractf64x4_pd(x, 1));
}
#elif !defined(__x86_64__)
PYOPTIM_HD double fold_lanes(DoubleV x) {
  for (int64_t half = kDoubles / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) x[l] += x[l + half];
  }
  return x[0];
}
#endif

// Adds the upper half of the lanes to the lower until one is left.
PYOPTIM_HD double fold_score(const Pair* sums) {
  DoubleV parts[2 * kPairs];
  for (int p = 0; p < kPairs; ++p) {
    parts[2 * p] = sums[p].low;
    parts[2 * p + 1] = sums[p].high;
  }
#pragma GCC unroll 4
  for (int half = kPairs; half > 0; half /= 2) {
#pragma GCC unroll 4
    for (int p = 0; p < half; ++p) parts[p] += parts[p + half];
  }
  return fold_lanes(parts[0]);
}

template <Score kScore, class X, class Y>
PYOPTIM_HD double score_rows(const X* x, const Y* y, int64_t d) {
  Pair sums[kPairs] = {};
  int64_t k = 0;
  for (; k + kScoreLanes <= d; k += kScoreLanes) {
    // Where rows follow one another, the next one.
    __builtin_prefetch(x + k + kPrefetch);
    add_terms<kScore>(x + k, y + k, sums);
  }
  if (k < d) {
    // The zeros behind the tails add 0 to a lane, which changes no bit of it.
    X x_tail[kScoreLanes];
    Y y_tail[kScoreLanes];
    std::memset(x_tail, 0, sizeof(x_tail));
    std::memset(y_tail, 0, sizeof(y_tail));
    std::memcpy(x_tail, x + k, (d - k) * sizeof(X));
    std::memcpy(y_tail, y + k, (d - k) * sizeof(Y));
    add_terms<kScore>(x_tail, y_tail, sums);
  }
  return fold_score(sums);
}

template <Score kScore, class X, class Y = X>
double score(const void* x, const void* y, int64_t d) {
  return score_rows<kScore>(static_cast<const X*>(x), static_cast<const Y*>(y), d);
}

template <class E>
void step_typed(CenterStep* work) {
  const E* const data = static_cast<const E*>(work->data);
  for (int64_t i = work->begin; i < work->end; ++i) {
    const E* const x = data + i * work->stride;
    const double sqdist = score_rows<Score::sqdist>(x, work->center, work->d);
    double& least = work->min_sqdist[i];
    if (sqdist != sqdist && work->nan_row < 0) work->nan_row = i;
    if (sqdist < least) least = sqdist;
    if (least > work->largest) {
      work->largest = least;
      work->row = i;
    }
  }
}

void step_center(CenterStep* work) {
  constexpr void (*kStep[])(CenterStep*) = {
      step_typed<double>, step_typed<float>, step_typed<Bf16>, step_typed<F16>};
  kStep[static_cast<int>(work->dtype)](work);
}

template <Score kScore>
void fill_score(Kernels* kernels) {
  ScoreKernel* const by_dtype = kernels->score[static_cast<int>(kScore)];
  by_dtype[static_cast<int>(DType::f64)] = score<kScore, double>;
  by_dtype[static_cast<int>(DType::f32)] = score<kScore, float>;
  by_dtype[static_cast<int>(DType::bf16)] = score<kScore, Bf16>;
  by_dtype[static_cast<int>(DType::f16)] = score<kScore, F16>;
}

}  // namespace
}  // namespace pyoptim::coreset

#include "coreset/medians.inl"

namespace pyoptim::coreset {
namespace {

// -- medians -------------------------------------------------------------------------------------

// Copies kLanes columns of all rows side by side; returns whether there is a NaN.
template <class E>
bool copy_columns(const ColumnMedians& work,
                  int64_t first,
                  int64_t width,
                  float* copy,
                  float* least,
                  float* largest) {
  constexpr int64_t kRowsAhead = 16;
  FloatV low = broadcast(__builtin_inff()), high = -low, checked = FloatV{};
  const E* const data = static_cast<const E*>(work.data) + first;
  E tail[kLanes];
  for (int64_t i = 0; i < work.n; ++i, copy += kLanes) {
    const E* from = data + (work.rows ? work.rows[i] : i) * work.stride;
    const int64_t ahead = i + kRowsAhead < work.n ? i + kRowsAhead : i;
    __builtin_prefetch(data + (work.rows ? work.rows[ahead] : ahead) * work.stride);
    if (width < kLanes) {
      copy_tail(from, width, tail);
      from = tail;
    }
    const FloatV x = load_vector(from);
    store_vector(copy, x);
    low = x < low ? x : low;
    high = x > high ? x : high;
    checked = x != x ? x : checked;
  }
  store_vector(least, low);
  store_vector(largest, high);
  return any_lane(checked != checked);
}

template <class E>
int64_t find_nan_row(const ColumnMedians& work) {
  for (int64_t i = 0; i < work.n; ++i) {
    const E* const row =
        static_cast<const E*>(work.data) + (work.rows ? work.rows[i] : i) * work.stride;
    for (int64_t c = work.first; c < work.first + work.width; ++c) {
      if (load(row[c]) != load(row[c])) return i;
    }
  }
  return -1;
}

template <class E>
void column_medians_typed(ColumnMedians* work) {
  work->nan_row = -1;
  const int64_t n_groups = (work->width + kLanes - 1) / kLanes;
  float least[kMedianColumns], largest[kMedianColumns];
  bool has_nan = false;
  // All copies first: the groups share cache lines and pages.
  for (int64_t g = 0; g < n_groups; ++g) {
    const int64_t at = g * kLanes, left = work->width - at;
    float* const copy = work->copy + at * work->n;
    has_nan |= copy_columns<E>(*work, work->first + at, left, copy, least + at, largest + at);
  }
  if (has_nan) {
    work->nan_row = find_nan_row<E>(*work);
    return;
  }
  for (int64_t at = 0; at < work->width; at += kLanes) {
    double medians[kLanes];
    lane_medians(work->copy + at * work->n, work->n, least + at, largest + at, medians);
    const int64_t width = work->width - at < kLanes ? work->width - at : kLanes;
    std::memcpy(work->out + at, medians, width * sizeof(double));
  }
}

void column_medians(ColumnMedians* work) {
  if (work->dtype == DType::f32) return column_medians_typed<float>(work);
  if (work->dtype == DType::bf16) return column_medians_typed<Bf16>(work);
  column_medians_typed<F16>(work);
}

Kernels make_kernels(const char* isa) {
  Kernels kernels = {};
  kernels.isa = isa;
  kernels.strip = kStrip;
  kernels.columns = kColumns;
  kernels.pack_rows = pack_rows;
  kernels.scan = scan;
  fill_score<Score::sqdist>(&kernels);
  fill_score<Score::dot>(&kernels);
  kernels.to_center[static_cast<int>(DType::f64)] = score<Score::sqdist, double>;
  kernels.to_center[static_cast<int>(DType::f32)] = score<Score::sqdist, float, double>;
  kernels.to_center[static_cast<int>(DType::bf16)] = score<Score::sqdist, Bf16, double>;
  kernels.to_center[static_cast<int>(DType::f16)] = score<Score::sqdist, F16, double>;
  kernels.step_center = step_center;
  kernels.column_medians = column_medians;
  kernels.multiply_registers = multiply_registers;
  return kernels;
}

}  // namespace
}  // namespace pyoptim::coreset
