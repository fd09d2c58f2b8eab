// The coreset kernels; included once per instruction set.
#include <cmath>
#include <utility>

#include "coreset/kernels.hpp"
#include "cpu/engine.hpp"
#include "cpu/simd.hpp"

namespace pyoptim::coreset {
namespace {

constexpr int kLanes = kVectorBytes / sizeof(float);
// A tile: kStrip rows of x by kVectors vectors of columns; as many sums as leave registers for a
// row of the panel and an element of x. With AVX-512, 6 x 64 and 12 x 32 both multiply at 97 to 99
// % of the FMA peak of Zen 5; 6 x 64 has fewer rows to compare. With AVX2, 4 x 24 and 6 x 16 both
// multiply at 95 % of that of Zen 3 where a core has its pipelines for itself; 4 x 24 loads 7
// vectors for 12 products and not 8, and keeps more of the speed where another thread shares them.
//
// kDepth: with short runs a panel stays in the first- (24 KB) or second-level cache.
#if defined(__AVX512F__)
constexpr int kStrip = 6, kVectors = 4;
constexpr int64_t kDepth = 512;
#elif defined(__AVX2__)
constexpr int kStrip = 4, kVectors = 3;
constexpr int64_t kDepth = 256;
#else
constexpr int kStrip = 4, kVectors = 2;
constexpr int64_t kDepth = 512;
#endif
constexpr int kColumns = kVectors * kLanes;
static_assert(kColumns <= kMaxColumns, "candidates have room for a panel");
static_assert(kStrip <= kLanes && kStrip <= 8, "a vector holds a number of every row of a strip");

PYOPTIM_HD FloatV multiply_add(FloatV a, FloatV b, FloatV c) {
#if defined(__AVX512F__)
  return (FloatV)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (FloatV)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

PYOPTIM_HD DoubleV multiply_add(DoubleV a, DoubleV b, DoubleV c) {
#if defined(__AVX512F__)
  return (DoubleV)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (DoubleV)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
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

// A bit per lane of a that is not above b's; none where either is NaN.
PYOPTIM_HD uint32_t lanes_at_most(FloatV a, FloatV b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LE_OQ)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmple_ps((__m128)a, (__m128)b)));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= static_cast<uint32_t>(a[l] <= b[l]) << l;
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

PYOPTIM_HD FloatV smaller(FloatV a, FloatV b) { return a < b ? a : b; }  // b where either is NaN

// Of every four lanes: the smaller of the first two and of the last two of a, then of b.
PYOPTIM_HD FloatV pair_minima(FloatV a, FloatV b) {
#if defined(__AVX512F__)
  const __m512 x = (__m512)a, y = (__m512)b;
  return smaller((FloatV)_mm512_shuffle_ps(x, y, 0x88), (FloatV)_mm512_shuffle_ps(x, y, 0xdd));
#elif defined(__AVX2__)
  const __m256 x = (__m256)a, y = (__m256)b;
  return smaller((FloatV)_mm256_shuffle_ps(x, y, 0x88), (FloatV)_mm256_shuffle_ps(x, y, 0xdd));
#elif defined(__x86_64__)
  const __m128 x = (__m128)a, y = (__m128)b;
  return smaller((FloatV)_mm_shuffle_ps(x, y, 0x88), (FloatV)_mm_shuffle_ps(x, y, 0xdd));
#else
  return smaller(FloatV{a[0], a[2], b[0], b[2]}, FloatV{a[1], a[3], b[1], b[3]});
#endif
}

// The same with four lanes in place of each.
#if defined(__AVX512F__)
PYOPTIM_HD FloatV quad_minima(FloatV a, FloatV b) {
  const __m512 x = (__m512)a, y = (__m512)b;
  return smaller((FloatV)_mm512_shuffle_f32x4(x, y, 0x88),
                 (FloatV)_mm512_shuffle_f32x4(x, y, 0xdd));
}
#elif defined(__AVX2__)
PYOPTIM_HD FloatV quad_minima(FloatV a, FloatV b) {
  const __m256 x = (__m256)a, y = (__m256)b;
  return smaller((FloatV)_mm256_permute2f128_ps(x, y, 0x20),
                 (FloatV)_mm256_permute2f128_ps(x, y, 0x31));
}
#endif

// Adds the upper half of the lanes to the lower until one is left.
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

// -- the filter ----------------------------------------------------------------------------------

struct Tile {
  FloatV sums[kStrip][kVectors];
};

// A vector of a panel that stays in a register: gcc 12 would read it again from memory for every
// row, and loads are what AVX2 has fewest of.
PYOPTIM_HD FloatV load_once(const float* from) {
  FloatV x = load_vector(from);
#if defined(__AVX2__) && !defined(__AVX512F__)
  asm("" : "+x"(x));
#endif
  return x;
}

// The products of kStrip rows of x and a panel, over n elements.
PYOPTIM_HD void multiply(const float* x, int64_t ld, const float* y, int64_t n, Tile* tile) {
  // Elements of the panel asked for ahead: they come from the second-level cache. With AVX2 the
  // processor finds them by itself, and the instructions cost more than they bring.
  constexpr int64_t kAhead = kLanes == 8 ? 0 : 8;
  FloatV sums[kStrip][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = FloatV{};
  }
  for (int64_t k = 0; k < n; ++k, y += kColumns) {
    FloatV panel[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      panel[v] = load_once(y + v * kLanes);
      if constexpr (kAhead > 0) __builtin_prefetch(y + kAhead * kColumns + v * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kStrip; ++r) {
      const FloatV element = broadcast(x[r * ld + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = multiply_add(element, panel[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 4
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

// Writes the values whose bits are set to the end of a list, where there is room for a whole
// vector, and returns the new end.
PYOPTIM_HD Candidate* append(Candidate* end, FloatV values, uint32_t bits, int32_t first_column) {
#if defined(__AVX512F__)
  // Without a branch: how many there are cannot be foreseen.
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_or_si512(low, _mm512_set1_epi32(8));
  const auto kept = static_cast<__mmask16>(bits);
  const __m512i found = _mm512_maskz_compress_epi32(kept, (__m512i)values);
  const __m512i columns =
      _mm512_add_epi32(_mm512_maskz_compress_epi32(kept, lanes), _mm512_set1_epi32(first_column));
  _mm512_storeu_si512(end, _mm512_permutex2var_epi32(found, low, columns));
  _mm512_storeu_si512(end + 8, _mm512_permutex2var_epi32(found, high, columns));
  return end + __builtin_popcount(bits);
#else
  float stored[kLanes];
  store_vector(stored, values);
  for (; bits; bits &= bits - 1) {
    const int lane = __builtin_ctz(bits);
    *end++ = {stored[lane], first_column + lane};
  }
  return end;
#endif
}

// A strip of rows against a panel: lane r of the vectors is row r.
struct Strip {
  const Tile* tile;
  int64_t first_row;
  uint32_t rows;   // that keep columns, a bit for each
  uint32_t fresh;  // rows whose lists are ruled out
};

// The values of row r of a tile.
PYOPTIM_HD void read_values(const Scan& work, const Tile& tile, int r, FloatV* values) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    values[v] = load_vector(work.half_norms + v * kLanes) - tile.sums[r][v];
  }
}

// Puts the columns of one row that its threshold does not rule out on its list.
__attribute__((noinline)) void keep(const Scan& work, const Strip& strip, int r) {
  constexpr uint32_t kAll = (1u << kLanes) - 1;
  const int64_t row = strip.first_row + r;
  const FloatV threshold = broadcast(work.rows.thresholds[row]);
  FloatV values[kVectors];
  read_values(work, *strip.tile, r, values);
  uint64_t kept = 0;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    kept |= static_cast<uint64_t>(lanes_at_most(values[v], threshold)) << v * kLanes;
  }
  kept &= work.valid;
  Candidate* const list = work.candidates + row * work.capacity;
  Candidate* end = list + (strip.fresh >> r & 1 ? 0 : work.rows.n_candidates[row]);
  if ((kept & (kept - 1)) == 0 && kept != 0) {
    const int c = __builtin_ctzll(kept);
    const float sum = strip.tile->sums[r][c / kLanes][c % kLanes];
    *end++ = {work.half_norms[c] - sum, work.first_column + c};
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const auto bits = static_cast<uint32_t>(kept >> v * kLanes) & kAll;
      end = append(end, values[v], bits, work.first_column + v * kLanes);
    }
  }
  work.rows.n_candidates[row] = static_cast<int32_t>(end - list);
  if (end + kMaxColumns > list + work.capacity) work.make_room(work.context, row);
}

PYOPTIM_HD void keep_columns(const Scan& work, const Strip& strip) {
  for (uint32_t rows = strip.rows; rows; rows &= rows - 1) keep(work, strip, __builtin_ctz(rows));
}

PYOPTIM_HD FloatV lowest_of_row(const Scan& work, const Tile& tile, int r) {
  FloatV values[kVectors];
  read_values(work, tile, r, values);
  FloatV least = smaller(values[0], values[1]);
  if constexpr (kVectors == 3) least = smaller(least, values[2]);
  if constexpr (kVectors == 4) least = smaller(least, smaller(values[2], values[3]));
  return least;
}

// The lowest value of every row of a strip; infinity in lanes without a row.
PYOPTIM_HD FloatV lowest_values(const Scan& work, const Tile& tile) {
  const FloatV nothing = broadcast(__builtin_inff());
  FloatV quads[2] = {nothing, nothing};
#pragma GCC unroll 2
  for (int q = 0; 4 * q < kStrip; ++q) {
    FloatV rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      rows[i] = 4 * q + i < kStrip ? lowest_of_row(work, tile, 4 * q + i) : nothing;
    }
    quads[q] = pair_minima(pair_minima(rows[0], rows[1]), pair_minima(rows[2], rows[3]));
  }
#if defined(__AVX512F__)
  return quad_minima(quad_minima(quads[0], quads[1]), nothing);
#elif defined(__AVX2__)
  return quad_minima(quads[0], quads[1]);
#else
  return quads[0];
#endif
}

// Lowers the thresholds of a strip's rows (k = 1) and compares them with its values.
PYOPTIM_HD Strip compare(const Scan& work, int64_t first_row, const Tile& tile) {
  const FloatV least = lowest_values(work, tile);
  FloatV thresholds = load_vector(work.rows.thresholds + first_row);
  uint32_t fresh = 0;
  if (work.only_nearest) {
    // Lanes without a row belong to the next strip, and stay as they are.
    const FloatV before = load_vector(work.rows.lowest + first_row), low = smaller(least, before);
    thresholds = smaller(low + load_vector(work.rows.slacks + first_row), thresholds);
    store_vector(work.rows.lowest + first_row, low);
    store_vector(work.rows.thresholds + first_row, thresholds);
    // Where the threshold rules out the lowest value on a list, it rules out all of them.
    fresh = ~lanes_at_most(before, thresholds);
  }
  constexpr uint32_t kRows = (1u << kStrip) - 1;
  return {&tile, first_row, lanes_at_most(least, thresholds) & kRows, fresh};
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

// Memory that is asked for into the second-level cache, the same share every time.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* from, int64_t bytes, int64_t times)
      : next_(static_cast<const char*>(from)), end_(next_ + bytes) {
    share_ = (bytes + 64 * times - 1) / (64 * times) * 64;
  }

  void ask() {
    const char* const end = end_ - next_ < share_ ? end_ : next_ + share_;
    for (; next_ < end; next_ += 64) __builtin_prefetch(next_, 0, 2);
  }

 private:
  const char *next_ = nullptr, *end_ = nullptr;
  int64_t share_ = 0;
};

// Settles tiles behind the multiplication: a tile is compared while the next one is multiplied, and
// its columns are kept while the one after that is. What a processor has in flight then never waits
// for the last products of a tile, and it knows early whether a row keeps a column, a branch that
// is often mispredicted.
class Pipeline {
 public:
  explicit Pipeline(const Scan& work)
      : work_(work), rows_ahead_(work.ahead, work.ahead_bytes, work.n_rows / kStrip) {}

  // Where the next tile goes.
  Tile* tile() { return multiplied_; }

  // After the tile has been written.
  __attribute__((always_inline)) void advance(int64_t first_row) {
    rows_ahead_.ask();
    keep_columns(work_, compared_);
    compared_ = is_waiting_ ? compare(work_, waiting_row_, *waiting_) : Strip{};
    Tile* const free = kept_;
    kept_ = waiting_;
    waiting_ = multiplied_;
    multiplied_ = free;
    waiting_row_ = first_row;
    is_waiting_ = true;
  }

  void finish() {
    keep_columns(work_, compared_);
    if (is_waiting_) keep_columns(work_, compare(work_, waiting_row_, *waiting_));
  }

 private:
  const Scan& work_;
  Ahead rows_ahead_;
  Tile tiles_[3];
  Tile *multiplied_ = tiles_, *waiting_ = tiles_ + 1, *kept_ = tiles_ + 2;
  int64_t waiting_row_ = 0;
  bool is_waiting_ = false;
  Strip compared_ = {};
};

// What follows a run of a panel in memory, asked for while the run is multiplied with every strip:
// its own next run, or the next panel. Not with AVX-512, where it was no better.
PYOPTIM_HD Ahead panel_ahead(const Scan& work, const float* run, int64_t n) {
  if (kLanes != 8) return {};
  const int64_t floats = n * kColumns;
  return {run + floats, floats * static_cast<int64_t>(sizeof(float)), work.n_rows / kStrip};
}

// All products in one run.
void scan_shallow(const Scan& work) {
  Pipeline pipeline(work);
  Ahead ahead = panel_ahead(work, work.y, work.d);
  for (int64_t row = 0; row < work.n_rows; row += kStrip) {
    ahead.ask();
    multiply(work.x + row * work.ld, work.ld, work.y, work.d, pipeline.tile());
    pipeline.advance(row);
  }
  pipeline.finish();
}

void scan_deep(const Scan& work) {
  const int64_t n_runs = (work.d + kDepth - 1) / kDepth;
  const int64_t depth = (work.d + n_runs - 1) / n_runs;
  Pipeline pipeline(work);
  for (int64_t run = 0; run < n_runs; ++run) {
    const int64_t k = run * depth, n = k + depth < work.d ? depth : work.d - k;
    const float* const y = work.y + k * kColumns;
    const bool is_last = run + 1 == n_runs;
    Ahead ahead = panel_ahead(work, y, n);
    for (int64_t row = 0; row < work.n_rows; row += kStrip) {
      Tile* const tile = pipeline.tile();
      ahead.ask();
      multiply(work.x + row * work.ld + k, work.ld, y, n, tile);
      add_partial(work.partial + row * kColumns, run == 0, is_last, tile);
      if (is_last) pipeline.advance(row);
    }
  }
  pipeline.finish();
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

// Elements of a row asked for ahead. Where the processor asks best by itself, none: on Zen 4
// float64 distances of 50 000 x 768 took 8.3 ms, with 512 11.2.
PYOPTIM_HD int64_t elements_ahead() { return cpu::kPrefetchBytes > 0 ? 512 : 0; }

struct Sums {
  Pair squares, products;
};

// The sums only bound errors: they may differ between instruction sets.
PYOPTIM_HD void add_sums(FloatV x, const float* shift, Sums* sums) {
  const Pair wide = widen_floats(x);
  sums->squares.low = multiply_add(wide.low, wide.low, sums->squares.low);
  sums->squares.high = multiply_add(wide.high, wide.high, sums->squares.high);
  if (shift == nullptr) return;
  const Pair other = load_pair(shift);
  sums->products.low = multiply_add(wide.low, other.low, sums->products.low);
  sums->products.high = multiply_add(wide.high, other.high, sums->products.high);
}

PYOPTIM_HD double total(const Pair& lanes) { return fold_lanes(lanes.low + lanes.high); }

template <class E>
void pack_row(const PackRows& work, const E* x, int64_t row) {
  static const float zeros[kLanes] = {};
  float* const out = work.out + row * work.ld;
  Sums sums = {};
  const int64_t ahead = elements_ahead();
  int64_t k = 0;
  for (; k + kLanes <= work.d; k += kLanes) {
    const float* const center = work.center ? work.center + k : zeros;
    __builtin_prefetch(x + k + ahead);
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

// The same of 16 partial sums.
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
  const int64_t ahead = elements_ahead();
  int64_t k = 0;
  for (; k + kScoreLanes <= d; k += kScoreLanes) {
    // Where rows follow one another, the next one.
    __builtin_prefetch(x + k + ahead);
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

// A squared distance in float32, of numbers that float32 holds.
template <class E>
PYOPTIM_HD double rough_sqdist(const E* x, const float* center, int64_t d) {
  constexpr int kWays = 4;
  FloatV sums[kWays] = {};
  const auto add = [&](const E* from, int64_t k, int way) {
    const FloatV difference = load_vector(from) - load_vector(center + k);
    sums[way] = multiply_add(difference, difference, sums[way]);
  };
  const int64_t ahead = elements_ahead();
  int64_t k = 0;
  for (; k + kWays * kLanes <= d; k += kWays * kLanes) {
#pragma GCC unroll 4
    for (int way = 0; way < kWays; ++way) {
      __builtin_prefetch(x + k + way * kLanes + ahead);
      add(x + k + way * kLanes, k + way * kLanes, way);
    }
  }
  for (; k + kLanes <= d; k += kLanes) add(x + k, k, 0);
  if (k < d) {
    E tail[kLanes];
    copy_tail(x + k, d - k, tail);
    add(tail, k, 1);
  }
  return total(widen_floats((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

// Most rows are farther from a new centre than from those before it, which a rough distance shows:
// all its terms are positive, each passes at most d/kLanes + 16 roundings to float32, and one
// between these limits has neither overflowed nor lost to underflow what matters.
PYOPTIM_HD bool is_surely_above(double rough, double least, int64_t d) {
  const double roundings = static_cast<double>(d / kLanes + 16);
  return rough > 1e-20 && rough < 1e38 && rough * (1.0 - roundings * 0x1p-24) > least;
}

template <class E>
void step_typed(CenterStep* work) {
  const E* const data = static_cast<const E*>(work->data);
  for (int64_t i = work->begin; i < work->end; ++i) {
    const E* const x = data + i * work->stride;
    double& least = work->min_sqdist[i];
    bool is_above = false;
    if constexpr (!std::is_same_v<E, double>) {
      if (work->near_center && least < __builtin_inf()) {
        is_above = is_surely_above(rough_sqdist(x, work->near_center, work->d), least, work->d);
      }
    }
    if (!is_above) {
      const double sqdist = score_rows<Score::sqdist>(x, work->center, work->d);
      if (sqdist != sqdist && work->nan_row < 0) work->nan_row = i;
      if (sqdist < least) least = sqdist;
    }
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

}  // namespace
}  // namespace pyoptim::coreset

#include "coreset/medians_squeeze.inl"

namespace pyoptim::coreset {
namespace {

#if defined(__AVX2__)
template <class E>
void column_medians_typed(ColumnMedians* work) {
  BlockMedians<E>(work).run();
}
#else
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
#endif

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
  kernels.depth = kDepth;
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
#if defined(__AVX2__)
  kernels.median_share = 1.0 / 3;
#else
  kernels.median_share = 1;
#endif
  kernels.multiply_registers = multiply_registers;
  return kernels;
}

}  // namespace
}  // namespace pyoptim::coreset
