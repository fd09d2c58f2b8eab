// Medians of columns with AVX-512 or AVX2: one read of the rows, in which every column keeps only
// the values within a bracket around its median; included once per instruction set.
//
// The bracket comes from a sample of the rows: of kSample values, those kMargin places below and
// above the middle. The median of all is within it but for some 1 in 10^4 columns, which are read
// again. A block of as many rows as columns is transposed in registers, so that a vector holds
// values of one column and what is within the bracket is compressed to the end of the column's
// list. The lists, about a third of the values, are narrowed in the same way until few values are
// left.
#pragma once

#include "coreset/medians.inl"

namespace pyoptim::coreset {
namespace {

#if defined(__AVX2__)

constexpr int kSample = 128, kMargin = 22;
// Fewer rows are all kept.
constexpr int64_t kSampledRows = 512;
// So few values are ranked by comparing all with all.
constexpr int64_t kRanked = 32;
// Rows are asked for so many ahead, a cache line of float32 at a time. On Zen 3 8 rows are too few.
constexpr int64_t kRowsAhead = kMedianLanes == 8 ? 32 : 16, kPrefetched = 16;

struct Within {
  int64_t below, kept;
};

#if defined(__AVX512F__)

PYOPTIM_HD uint32_t lanes_below(FloatV a, FloatV b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
}
PYOPTIM_HD uint32_t lanes_equal(FloatV a, FloatV b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
}
// Lanes from low to high; none where x is NaN.
PYOPTIM_HD uint32_t lanes_within(FloatV x, FloatV low, FloatV high) {
  const __mmask16 below = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NGE_UQ);
  const __mmask16 above = _mm512_cmp_ps_mask((__m512)x, (__m512)high, _CMP_NLE_UQ);
  return static_cast<__mmask16>(~(below | above));
}
// Writes a whole vector, of which the lanes whose bits are set come first.
PYOPTIM_HD void store_kept(float* to, FloatV x, uint32_t kept) {
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(kept), (__m512)x));
}
PYOPTIM_HD FloatV load_part(const float* from, int64_t n, float fill) {
  if (n >= kMedianLanes) return load_vector(from);
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  return (FloatV)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, from);
}

#else

PYOPTIM_HD uint32_t lane_bits(__m256 holds) {
  return static_cast<uint32_t>(_mm256_movemask_ps(holds));
}
PYOPTIM_HD uint32_t lanes_below(FloatV a, FloatV b) {
  return lane_bits(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ));
}
PYOPTIM_HD uint32_t lanes_equal(FloatV a, FloatV b) {
  return lane_bits(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_EQ_OQ));
}
// Lanes from low to high; none where x is NaN.
PYOPTIM_HD uint32_t lanes_within(FloatV x, FloatV low, FloatV high) {
  const __m256 from = _mm256_cmp_ps((__m256)x, (__m256)low, _CMP_GE_OQ);
  return lane_bits(_mm256_and_ps(from, _mm256_cmp_ps((__m256)x, (__m256)high, _CMP_LE_OQ)));
}

// For every set of lanes their numbers, ascending, then zeros.
struct KeptLanes {
  uint8_t lanes[256][8] = {};

  constexpr KeptLanes() {
    for (int kept = 0; kept < 256; ++kept) {
      for (int l = 0, n = 0; l < 8; ++l) {
        if (kept >> l & 1) lanes[kept][n++] = static_cast<uint8_t>(l);
      }
    }
  }
};
constexpr KeptLanes kKeptLanes;

// Writes a whole vector, of which the lanes whose bits are set come first.
PYOPTIM_HD void store_kept(float* to, FloatV x, uint32_t kept) {
  const auto* const lanes = reinterpret_cast<const __m128i*>(kKeptLanes.lanes[kept]);
  const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(lanes));
  _mm256_storeu_ps(to, _mm256_permutevar8x32_ps((__m256)x, order));
}
PYOPTIM_HD FloatV load_part(const float* from, int64_t n, float fill) {
  if (n >= kMedianLanes) return load_vector(from);
  float part[kMedianLanes];
  for (int l = 0; l < kMedianLanes; ++l) part[l] = l < n ? from[l] : fill;
  return load_vector(part);
}

#endif

PYOPTIM_HD FloatV larger(FloatV a, FloatV b) { return a > b ? a : b; }  // b where either is NaN

// Writes what is from low to high, and moves the end behind it. NaN is not.
PYOPTIM_HD void keep_within(FloatV x, FloatV low, FloatV high, float** end) {
  const uint32_t kept = lanes_within(x, low, high);
  store_kept(*end, x, kept);
  *end += __builtin_popcount(kept);
}

// Writes the values from low to high to `to`, which has room for n and a vector.
inline Within squeeze(const float* values, int64_t n, float low, float high, float* to) {
  const FloatV lows = broadcast(low), highs = broadcast(high);
  float* end = to;
  int64_t below = 0;
  for (int64_t i = 0; i < n; i += kMedianLanes) {
    const FloatV x = load_part(values + i, n - i, __builtin_nanf(""));
    below += __builtin_popcount(lanes_below(x, lows));
    keep_within(x, lows, highs, &end);
  }
  return {below, end - to};
}

struct Middle {
  float low, high;
};

// The least and the largest lane.
PYOPTIM_HD Middle fold_extremes(FloatV least, FloatV largest) {
  Middle ends = {least[0], largest[0]};
  for (int l = 1; l < kMedianLanes; ++l) {
    ends.low = least[l] < ends.low ? least[l] : ends.low;
    ends.high = largest[l] > ends.high ? largest[l] : ends.high;
  }
  return ends;
}

// The largest value below a pivot, and the smallest that is not.
inline Middle neighbours(const float* values, int64_t n, float pivot) {
  const FloatV bound = broadcast(pivot), infinite = broadcast(__builtin_inff());
  FloatV below = -infinite, above = infinite;
  for (int64_t i = 0; i < n; i += kMedianLanes) {
    const FloatV x = load_part(values + i, n - i, __builtin_nanf(""));
    below = larger(x < bound ? x : -infinite, below);
    above = smaller(x >= bound ? x : infinite, above);
  }
  const Middle ends = fold_extremes(above, below);
  return {ends.high, ends.low};
}

inline Middle extremes(const float* values, int64_t n) {
  FloatV least = load_part(values, n, values[0]), largest = least;
  for (int64_t i = kMedianLanes; i < n; i += kMedianLanes) {
    const FloatV x = load_part(values + i, n - i, values[0]);
    least = smaller(x, least);
    largest = larger(x, largest);
  }
  return fold_extremes(least, largest);
}

// Values of a column, of which two of neighbouring ranks are wanted (or one, twice).
struct Wanted {
  float* values;
  float* scratch;  // room for n and a vector, as values
  int64_t n, rank, last;
  float low, high;  // values are from low to high

  void keep(float from, float to) {
    const Within found = squeeze(values, n, from, to, scratch);
    keep(from, to, found);
  }
  void keep(float from, float to, Within found) {
    std::swap(values, scratch);
    n = found.kept;
    rank -= found.below;
    last -= found.below;
    low = from;
    high = to;
  }
};

PYOPTIM_HD float clamp_float(double x, float low, float high) {
  return x < low ? low : x > high ? high : static_cast<float>(x);
}

// Around where the wanted values would be if all were evenly spread; every third time a value, so
// that equal values are found, or the middle of the float32 numbers between the bounds, so that no
// distribution takes many rounds.
inline Middle choose_pivots(const Wanted& w, int round) {
  const double width = static_cast<double>(w.high) - w.low, n = static_cast<double>(w.n);
  if (round % 3 == 0 && width - width == 0) {
    const double guess = w.low + width * (static_cast<double>(w.rank) + 1) / n;
    const double margin = width * (1.5 * std::sqrt(n) + 2) / n;
    return {clamp_float(guess - margin, w.low, w.high), clamp_float(guess + margin, w.low, w.high)};
  }
  const int64_t low = key_of(w.low), high = key_of(w.high);
  const float pivot = round % 3 == 2 ? of_key(low + (high - low) / 2) : w.values[w.n / 2];
  return {pivot, pivot};
}

inline Middle rank_few(const Wanted& w) {
  constexpr int kVectors = kRanked / kMedianLanes;
  FloatV values[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = std::min<int64_t>(v * kMedianLanes, w.n);
    values[v] = load_part(w.values + at, w.n - at, __builtin_inff());
  }
  Middle found = {};
  for (int64_t i = 0; i < w.n; ++i) {
    const FloatV x = broadcast(w.values[i]);
    uint32_t less = 0, equal = 0;
    for (int v = 0; v < kVectors; ++v) {
      less |= lanes_below(values[v], x) << v * kMedianLanes;
      equal |= lanes_equal(values[v], x) << v * kMedianLanes;
    }
    const int64_t rank = __builtin_popcount(less) + __builtin_popcount(equal & ((1u << i) - 1));
    if (rank == w.rank) found.low = w.values[i];
    if (rank == w.last) found.high = w.values[i];
  }
  return found;
}

inline Middle select_middle(Wanted w) {
  for (int round = 0; w.n > kRanked; ++round) {
    if (w.low == w.high) return {w.low, w.low};
    const Middle pivots = choose_pivots(w, round);
    const Within found = squeeze(w.values, w.n, pivots.low, pivots.high, w.scratch);
    const int64_t end = found.below + found.kept;
    if (w.rank >= found.below && w.last < end) {
      w.keep(pivots.low, pivots.high, found);
    } else if (w.last < found.below) {
      w.keep(w.low, of_key(key_of(pivots.low) - 1));
    } else if (w.rank >= end) {
      w.keep(of_key(key_of(pivots.high) + 1), w.high);
    } else if (w.rank < found.below) {
      return neighbours(w.values, w.n, pivots.low);
    } else {
      return neighbours(w.values, w.n, of_key(key_of(pivots.high) + 1));
    }
  }
  return rank_few(w);
}

// Batcher's odd-even mergesort of kSample values (Knuth, The Art of Computer Programming, volume 3,
// 2nd edition, algorithm 5.2.2M) as a list of compared places.
struct SortingNetwork {
  uint8_t first[kSample * 12] = {}, second[kSample * 12] = {};
  int n = 0;

  constexpr SortingNetwork() {
    for (int p = 1; p < kSample; p *= 2) {
      for (int k = p; k >= 1; k /= 2) {
        for (int j = k % p; j + k < kSample; j += 2 * k) {
          for (int i = j; i < j + k && i + k < kSample; ++i) {
            if (i / (2 * p) != (i + k) / (2 * p)) continue;
            first[n] = static_cast<uint8_t>(i);
            second[n++] = static_cast<uint8_t>(i + k);
          }
        }
      }
    }
  }
};

// Sorts every lane.
inline void sort_lanes(FloatV* sample) {
  static constexpr SortingNetwork network;
  for (int i = 0; i < network.n; ++i) {
    FloatV *const a = sample + network.first[i], *const b = sample + network.second[i];
    const FloatV low = smaller(*a, *b), high = larger(*a, *b);
    *a = low;
    *b = high;
  }
}

// Rows become columns.
#if defined(__AVX512F__)
PYOPTIM_HD void transpose(FloatV* block) {
  __m512 *const rows = reinterpret_cast<__m512*>(block), t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const auto wide = [&](int k) { return _mm512_castps_pd(t[k]); };
    rows[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(wide(i), wide(i + 2)));
    rows[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(wide(i), wide(i + 2)));
    rows[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(wide(i + 1), wide(i + 3)));
    rows[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(wide(i + 1), wide(i + 3)));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}
#else
PYOPTIM_HD void transpose(FloatV* block) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    const __m256 a = (__m256)block[i], b = (__m256)block[i + 1];
    t[i] = _mm256_unpacklo_ps(a, b);
    t[i + 1] = _mm256_unpackhi_ps(a, b);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    block[i] = (FloatV)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    block[i + 4] = (FloatV)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
#endif

// The medians of a block of columns.
template <class E>
class BlockMedians {
 public:
  explicit BlockMedians(ColumnMedians* work) : work_(*work), ld_(work->n + kMedianLanes) {}

  void run() {
    for (int64_t c = 0; c < work_.width; c += kMedianLanes) bracket(c);
    work_.nan_row = -1;
    if (read()) {
      work_.nan_row = find_nan_row<E>(work_);
      return;
    }
    for (int64_t c = 0; c < work_.width; ++c) work_.out[c] = median(c);
  }

 private:
  const E* row(int64_t i) const {
    const int64_t index = work_.rows ? work_.rows[i] : i;
    return static_cast<const E*>(work_.data) + index * work_.stride + work_.first;
  }

  // Columns c, c + 1, ... of a row.
  FloatV load_group(const E* row, int64_t c) const {
    if (c + kMedianLanes <= work_.width) return load_vector(row + c);
    E tail[kMedianLanes];
    copy_tail(row + c, work_.width - c, tail);
    return load_vector(tail);
  }

  void bracket(int64_t c) {
    FloatV low = broadcast(-__builtin_inff()), high = -low;
    if (work_.n >= kSampledRows) {
      FloatV sample[kSample];
      for (int i = 0; i < kSample; ++i) {
        __builtin_prefetch(row((i + 16) % kSample * work_.n / kSample) + c);
        sample[i] = load_group(row(i * work_.n / kSample), c);
      }
      sort_lanes(sample);
      low = sample[kSample / 2 - kMargin];
      high = sample[kSample / 2 + kMargin];
    }
    store_vector(lows_ + c, low);
    store_vector(highs_ + c, high);
    store_as(below_ + c, WordV{});
    for (int64_t l = c; l < c + kMedianLanes; ++l) {
      ends_[l] = work_.copy + l * ld_;
    }
  }

  // Fills the lists; returns whether there is a NaN.
  bool read() {
    bool has_nan = false;
    for (int64_t i = 0; i < work_.n; i += kMedianLanes) {
      const E *rows[kMedianLanes], *next[kMedianLanes];
      for (int64_t r = 0; r < kMedianLanes; ++r) {
        rows[r] = row(i + r < work_.n ? i + r : i);
        next[r] = row(i + r + kRowsAhead < work_.n ? i + r + kRowsAhead : i);
      }
      const int64_t n = work_.n - i < kMedianLanes ? work_.n - i : kMedianLanes;
      for (int64_t c = 0; c < work_.width; c += kMedianLanes) {
        has_nan |= n == kMedianLanes ? read_block<true>(rows, next, n, c)
                                     : read_block<false>(rows, next, n, c);
      }
    }
    return has_nan;
  }

  template <bool kIsWhole>
  bool read_block(const E* const* rows, const E* const* next, int64_t n, int64_t c) {
    const FloatV lows = load_vector(lows_ + c), nan = broadcast(__builtin_nanf(""));
    WordV below = load_as<WordV>(below_ + c);
    FloatV block[kMedianLanes], checked = FloatV{};
#pragma GCC unroll 16
    for (int r = 0; r < kMedianLanes; ++r) {
      if (c % kPrefetched == 0) __builtin_prefetch(next[r] + c);
      const FloatV x = load_group(rows[r], c);
      checked = x != x ? x : checked;
      block[r] = kIsWhole || r < n ? x : nan;
      below = add_where_below(below, block[r], lows);
    }
    store_as(below_ + c, below);
    transpose(block);
    float** const ends = ends_ + c;
#pragma GCC unroll 16
    for (int l = 0; l < kMedianLanes; ++l) {
      keep_within(block[l], broadcast(lows_[c + l]), broadcast(highs_[c + l]), ends + l);
    }
    return any_lane(checked != checked);
  }

  double median(int64_t c) {
    const int64_t rank = (work_.n - 1) / 2, last = work_.n / 2;
    float* const values = work_.copy + c * ld_;
    float* const scratch = work_.copy + padded_width() * ld_;
    const Within found = {below_[c], ends_[c] - values};
    const bool is_within = rank >= found.below && last < found.below + found.kept;
    if (!is_within) {
      for (int64_t i = 0; i < work_.n; ++i) values[i] = load(row(i)[c]);
    }
    const int64_t n = is_within ? found.kept : work_.n, below = is_within ? found.below : 0;
    const Middle ends =
        is_within && work_.n >= kSampledRows ? Middle{lows_[c], highs_[c]} : extremes(values, n);
    const Middle middle =
        select_middle({values, scratch, n, rank - below, last - below, ends.low, ends.high});
    const double low = middle.low, high = middle.high;
    return low == high ? low : 0.5 * (low + high);
  }

  int64_t padded_width() const {
    return (work_.width + kMedianLanes - 1) / kMedianLanes * kMedianLanes;
  }

  ColumnMedians& work_;
  int64_t ld_;  // of the columns' lists
  float lows_[kMedianColumns], highs_[kMedianColumns];
  uint32_t below_[kMedianColumns];  // values below the bracket
  float* ends_[kMedianColumns];     // of the lists
};

#endif

}  // namespace
}  // namespace pyoptim::coreset
