// Nearest rows: a filter on the tensor cores, and float64 scores for what it cannot rule out.
#include "cuda/launchers.hpp"
#include "cuda/scores.hpp"
#include "cuda/tensor_core.hpp"

namespace pyoptim::gpu {
namespace {

constexpr int kWarps = kThreads / kWarp;
// Norms beyond it would overflow the filter's float32.
constexpr double kHugeNorm = 1e17;

// -- rows -----------------------------------------------------------------------------------------

template <class E>
__global__ void __launch_bounds__(kThreads) squares_kernel(const Squares __grid_constant__ work) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kQuads + threadIdx.x / kQuad;
  const bool is_row = row < work.x.n;
  const E* const x = row_of<E>(work.x, is_row ? row : 0);
  const double square = sum_terms<true>(x, x, is_row ? work.x.d : 0);
  if (is_row && threadIdx.x % kQuad == 0) work.squares[row] = square;
}

__device__ __forceinline__ double sum_warp(double x) {
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) x += __shfl_xor_sync(kAll, x, half);
  return x;
}

// What the elements of a row are multiplied by; 0 for a row of zeros that has no direction. A row
// that cannot be normalised is NaN's or infinity's, or as good as that.
template <class E>
__device__ __forceinline__ double scale_of(const PackRows& work, const E* x) {
  if (work.metric != Metric::cosine) return work.splits ? work.about->scale : 1;
  double square = 0;
  for (int64_t k = threadIdx.x % kWarp; k < work.x.d; k += kWarp) square += wide(x[k]) * wide(x[k]);
  square = sum_warp(square);
  if (square == 0) return 0;
  if (square != square) return square;
  return square > 1e-60 && square < 1e60 ? 1 / Math<double>::sqrt(square) : kInfinity;
}

// Two neighbouring elements. Elements of 16 bits may be moved as they are.
template <class E>
__device__ __forceinline__ void write_pair(const PackRows& work,
                                           int64_t at,
                                           const E (&raw)[2],
                                           const double (&x)[2]) {
  uint32_t high = 0, low = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint16_t bits = 0;
    if constexpr (sizeof(E) == 2) bits = raw[i].bits;
    if (work.splits) {
      Bf16 first, second;
      const float near = static_cast<float>(x[i]);
      store(first, near);
      store(second, near - load(first));
      bits = first.bits;
      low |= static_cast<uint32_t>(second.bits) << (16 * i);
    }
    high |= static_cast<uint32_t>(bits) << (16 * i);
  }
  reinterpret_cast<uint32_t*>(work.high)[at / 2] = high;
  if (work.splits) reinterpret_cast<uint32_t*>(work.low)[at / 2] = low;
}

// A row is a warp's.
template <class E>
__global__ void __launch_bounds__(kThreads) pack_kernel(const PackRows __grid_constant__ work) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= work.x.n) return;
  const E* const x = row_of<E>(work.x, row);
  const double scale = scale_of(work, x);
  double square = 0;
#pragma unroll 2
  for (int64_t k = threadIdx.x % kWarp * 2; k < work.width; k += 2 * kWarp) {
    E raw[2] = {};
    double values[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (k + i >= work.x.d) continue;
      raw[i] = x[k + i];
      values[i] = wide(raw[i]) * scale - (work.center ? work.center[k + i] : 0);
      square += values[i] * values[i];
    }
    if (work.high) write_pair(work, row * work.width + k, raw, values);
  }
  square = sum_warp(square);
  if (threadIdx.x % kWarp > 0) return;
  // inf * 0 of a row that has no direction is no NaN of the caller's.
  if (scale == kInfinity) square = kInfinity;
  work.norms[row] = Math<double>::sqrt(square) * (1 + 1e-9);
  if (work.half_norms)
    work.half_norms[row] = work.metric == Metric::sqdist ? static_cast<float>(0.5 * square) : 0.0f;
}

// -- the filter -----------------------------------------------------------------------------------

// A block's tile: a warp has 32 rows and all columns, so that no two warps share a row.
constexpr int kTileRows = 32 * kWarps, kTileColumns = 128;
// Elements of a row that are in shared memory at once, and their bytes: 4 chunks of 16.
constexpr int kTileDepth = 32, kRowBytes = 64, kChunks = 4;
constexpr int kStageBytes = (kTileRows + kTileColumns) * kRowBytes;
// What every architecture from sm_80 on has for a block.
constexpr int kFilterBytes = 4 * kStageBytes;

// Chunks change places, so that neither the rows of a matrix nor those of a copy meet in a bank.
__device__ __forceinline__ int place_of(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row >> 1 & 3)) << 4);
}

// Asks for elements k to k + kTileDepth of kRows rows. Zeros are what lies beyond the rows, and
// beyond d.
template <int kRows>
__device__ __forceinline__ void ask_for(
    char* to, const void* from, int64_t stride, int64_t first, int64_t end, int64_t k, int64_t d) {
#pragma unroll
  for (int c = threadIdx.x; c < kRows * kChunks; c += kThreads) {
    const int row = c / kChunks, chunk = c % kChunks;
    const int64_t left = first + row < end ? 2 * (d - k - 8 * chunk) : 0;
    const int n = static_cast<int>(left < 0 ? 0 : left > 16 ? 16 : left);
    const int64_t at = n > 0 ? (first + row) * stride + k + 8 * chunk : 0;
    copy_async(to + place_of(row, chunk), static_cast<const uint16_t*>(from) + at, n);
  }
}

// The three smallest values of a row, and whose the first two are.
struct Least {
  float first = static_cast<float>(kInfinity), second = first, third = first;
  int32_t i = -1, j = -1;

  __device__ __forceinline__ void insert(float value, int32_t column) {
    if (!(value < third)) return;
    third = value < second ? second : value;
    if (!(value < second)) return;
    second = value < first ? first : value;
    j = value < first ? i : column;
    if (!(value < first)) return;
    first = value;
    i = column;
  }

  // With those of `other` threads' columns.
  __device__ __forceinline__ void merge(int distance) {
    const float a = __shfl_xor_sync(kAll, first, distance);
    const float b = __shfl_xor_sync(kAll, second, distance);
    const float c = __shfl_xor_sync(kAll, third, distance);
    const int32_t at_a = __shfl_xor_sync(kAll, i, distance);
    const int32_t at_b = __shfl_xor_sync(kAll, j, distance);
    insert(a, at_a);
    insert(b, at_b);
    third = c < third ? c : third;
  }
};

// Products of a warp's 32 rows and the tile's columns: [two matrices][16 matrices] of accumulators.
struct Accumulators {
  float c[2][kTileColumns / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kTileColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[m][n][i] = 0;
      }
    }
  }
};

// Adds 16 products to every accumulator: of elements 16 half to 16 half + 15 of the stage. With two
// parts x_high y_low and x_low y_high too; x_low y_low is within the bound.
template <class E, int kParts>
__device__ __forceinline__ void multiply(const char* stage, int half, Accumulators* to) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const char* const x = stage;
  const char* const y = stage + kParts * kTileRows * kRowBytes;
  uint32_t a[kParts][2][4];
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int row = 32 * warp + 16 * m + lane % 16;
      load_matrices(a[p][m], x + p * kTileRows * kRowBytes + place_of(row, 2 * half + lane / 16));
    }
  }
#pragma unroll
  for (int n = 0; n < kTileColumns / 16; ++n) {
    uint32_t b[kParts][4];
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int column = 16 * n + lane / 16 * 8 + lane % 8, chunk = 2 * half + lane / 8 % 2;
      load_matrices(b[p], y + p * kTileColumns * kRowBytes + place_of(column, chunk));
    }
    // The small products first; four accumulators take turns, so that none waits for itself.
#pragma unroll
    for (int product = kParts == 1 ? 2 : 0; product < 3; ++product) {
      const int p = product == 0 ? kParts - 1 : 0, q = product == 1 ? kParts - 1 : 0;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t columns[2] = {b[q][2 * h], b[q][2 * h + 1]};
          multiply_add<E>(to->c[m][2 * n + h], a[p][m], columns);
        }
      }
    }
  }
}

// Where the rows and columns of a thread's accumulators are in the tile.
__device__ __forceinline__ int row_in_tile(int r) {
  return threadIdx.x / kWarp * 32 + r / 2 * 16 + r % 2 * 8 + threadIdx.x % kWarp / 4;
}
__device__ __forceinline__ int column_in_tile(int n, int e) {
  return 8 * n + threadIdx.x % 4 * 2 + e;
}

// Calls visit(r, value, column) for the values of the thread's four rows; columns that do not exist
// are infinitely far.
template <class Visit>
__device__ __forceinline__ void for_each_value(const Accumulators& products,
                                               const float* half_norms,
                                               int64_t first_column,
                                               int64_t n_columns,
                                               Visit visit) {
#pragma unroll
  for (int n = 0; n < kTileColumns / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t column = first_column + column_in_tile(n, e);
      const float half_norm =
          column < n_columns ? half_norms[column] : static_cast<float>(kInfinity);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        visit(r, half_norm - products.c[r / 2][n][r % 2 * 2 + e], static_cast<int32_t>(column));
      }
    }
  }
}

// The pipeline of one block: a tile of rows of x, and one after the other tiles of rows of y.
template <class E, int kParts>
struct Pipeline {
  static constexpr int kStages = 4 / kParts;

  const Filter& work;
  char* const shared;
  const int64_t first_row, first_tile, n_steps, steps_per_tile;

  // Where step s of the loop over tiles, and over the elements within a tile, begins.
  __device__ __forceinline__ void ask(int64_t s) const {
    if (s < n_steps) {
      char* const stage = shared + s % kStages * kParts * kStageBytes;
      const int64_t k = s % steps_per_tile * kTileDepth;
      const int64_t column = (first_tile + s / steps_per_tile) * kTileColumns;
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        const void* const x = p ? work.x.low : work.x.high;
        const void* const y = p ? work.y.low : work.y.high;
        ask_for<kTileRows>(
            stage + p * kTileRows * kRowBytes, x, work.x.stride, first_row, work.x.n, k, work.d);
        ask_for<kTileColumns>(stage + (kParts * kTileRows + p * kTileColumns) * kRowBytes,
                              y,
                              work.y.stride,
                              column,
                              work.y.n,
                              k,
                              work.d);
      }
    }
    commit_copies();  // a group for every step, so that they can be counted
  }

  // Calls visit(products, first column) for every tile.
  template <class Visit>
  __device__ __forceinline__ void run(Visit visit) const {
    Accumulators products;
    for (int s = 0; s < kStages - 1; ++s) ask(s);
    products.clear();
    for (int64_t s = 0, k = 0, column = first_tile * kTileColumns; s < n_steps; ++s) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // the copies of all threads are here, and the stage before is free
      ask(s + kStages - 1);
      const char* const stage = shared + s % kStages * kParts * kStageBytes;
      multiply<E, kParts>(stage, 0, &products);
      multiply<E, kParts>(stage, 1, &products);
      if (++k < steps_per_tile) continue;
      visit(products, column);
      products.clear();
      k = 0;
      column += kTileColumns;
    }
  }
};

template <class E, int kParts>
__device__ __forceinline__ Pipeline<E, kParts> pipeline_of(const Filter& work, char* shared) {
  const int64_t tile = blockIdx.x / work.n_parts, part = blockIdx.x % work.n_parts;
  const int64_t n_tiles = (work.y.n + kTileColumns - 1) / kTileColumns;
  const int64_t first = part * n_tiles / work.n_parts, end = (part + 1) * n_tiles / work.n_parts;
  const int64_t steps = (work.d + kTileDepth - 1) / kTileDepth;
  return {work, shared, tile * kTileRows, first, (end - first) * steps, steps};
}

template <class E, int kParts>
__global__ void __launch_bounds__(kThreads) nearest_kernel(const Filter __grid_constant__ work) {
  PYOPTIM_DYNAMIC_SHARED(char, shared, kFilterBytes);
  const auto pipeline = pipeline_of<E, kParts>(work, shared);
  Least least[4];
  pipeline.run([&](const Accumulators& products, int64_t column) {
    for_each_value(products, work.half_norms, column, work.y.n, [&](int r, float v, int32_t c) {
      least[r].insert(v, c);
    });
  });
  const int64_t n = work.x.n, part = blockIdx.x % work.n_parts;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    least[r].merge(1);
    least[r].merge(2);
    const int64_t row = pipeline.first_row + row_in_tile(r);
    if (row >= n || threadIdx.x % 4 > 0) continue;
    work.least[(3 * part + 0) * n + row] = least[r].first;
    work.least[(3 * part + 1) * n + row] = least[r].second;
    work.least[(3 * part + 2) * n + row] = least[r].third;
    work.columns[(2 * part + 0) * n + row] = least[r].i;
    work.columns[(2 * part + 1) * n + row] = least[r].j;
  }
}

template <class E, int kParts>
__global__ void __launch_bounds__(kThreads) values_kernel(const Filter __grid_constant__ work) {
  PYOPTIM_DYNAMIC_SHARED(char, shared, kFilterBytes);
  const auto pipeline = pipeline_of<E, kParts>(work, shared);
  pipeline.run([&](const Accumulators& products, int64_t column) {
    for_each_value(products, work.half_norms, column, work.y.n, [&](int r, float v, int32_t c) {
      const int64_t row = pipeline.first_row + row_in_tile(r);
      // What is NaN, inf - inf, is as far as can be.
      if (row < work.x.n && c < work.y.n)
        work.values[row * work.y.n + c] = v == v ? v : static_cast<float>(kInfinity);
    });
  });
}

// -- what the filter leaves over ------------------------------------------------------------------

__device__ __forceinline__ double slack_of(const Slack& slack, double a, double b, double center) {
  const double whole = a + b + center;
  return slack.products * a * b + slack.squares * b * b + slack.whole * whole * whole +
         slack.tiny * (1 + a + b);
}

// How long the columns can be that are at most as far from a row of norm a as a known one.
__device__ __forceinline__ double reach_of(const Certify& work, double a, double score) {
  const double largest = work.about->largest;
  if (work.metric != Metric::sqdist) return largest;
  const double around = (a + work.about->scale * Math<double>::sqrt(score)) * (1 + 1e-6);
  return around < largest ? around : largest;
}

__device__ __forceinline__ void keep_best(const Certify& work,
                                          int64_t row,
                                          double score,
                                          int64_t column) {
  const int64_t at = work.x.rows ? work.x.rows[row] : row;
  const int64_t index = work.first_index + (work.y.rows ? work.y.rows[column] : column);
  if (!is_before(score, index, work.scores[at], work.indices[at])) return;
  work.scores[at] = score;
  work.indices[at] = index;
}

// The row of a quad. Returns whether the filter has ruled out all but one or two columns; of these
// the best is kept.
template <class E>
__device__ __forceinline__ bool certify_row(const Certify& work, int64_t row, bool is_row) {
  Least least;
  const double a = is_row ? work.norms[row] : kInfinity;
  for (int64_t part = 0; is_row && part < work.n_parts; ++part) {
    const float* const values = work.least + 3 * part * work.x.n + row;
    const int32_t* const columns = work.columns + 2 * part * work.x.n + row;
    least.insert(values[0], columns[0]);
    least.insert(values[work.x.n], columns[work.x.n]);
    const float third = values[2 * work.x.n];
    least.third = third < least.third ? third : least.third;
  }
  const bool is_filtered = a < kHugeNorm && least.i >= 0;
  const E* const x = row_of<E>(work.x, is_filtered ? row : 0);
  const E* const y = row_of<E>(work.y, is_filtered ? least.i : 0);
  const double score = score_pair(work.metric, x, y, is_filtered ? work.x.d : 0);
  const double slack = slack_of(work.slack, a, reach_of(work, a, score), work.about->center_norm);
  const double limit = least.first + slack;
  const bool is_certain = is_filtered && least.third > limit;
  const bool has_two = is_certain && !(least.second > limit);
  const E* const z = row_of<E>(work.y, has_two ? least.j : 0);
  const double other = score_pair(work.metric, x, z, has_two ? work.x.d : 0);
  if (is_certain && threadIdx.x % kQuad == 0) {
    keep_best(work, row, score, least.i);
    if (has_two) keep_best(work, row, other, least.j);
  }
  return is_certain;
}

// Scores every pair of a row, by all quads of the block.
template <class E>
__device__ __forceinline__ void settle_row(const Certify& work,
                                           int64_t row,
                                           double* scores,      // shared, [kQuads]
                                           int64_t* columns) {  // shared, [kQuads]
  const E* const x = row_of<E>(work.x, row);
  const int quad = threadIdx.x / kQuad;
  double best = kInfinity;
  int64_t column = -1;
  for (int64_t first = 0; first < work.y.n; first += kQuads) {
    const bool is_column = first + quad < work.y.n;
    const E* const y = row_of<E>(work.y, is_column ? first + quad : 0);
    const double score = score_pair(work.metric, x, y, is_column ? work.x.d : 0);
    if (!is_column || !is_before(score, first + quad, best, column)) continue;
    best = score;
    column = first + quad;
  }
  scores[quad] = best;
  columns[quad] = column;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int q = 1; q < kQuads; ++q) {
      if (!is_before(scores[q], columns[q], best, column)) continue;
      best = scores[q];
      column = columns[q];
    }
    if (column >= 0) keep_best(work, row, best, column);
  }
  __syncthreads();
}

// Two blocks per multiprocessor: without a number ptxas keeps to 64 registers, which are not
// enough.
template <class E>
__global__ void __launch_bounds__(kThreads, 2)
    certify_kernel(const Certify __grid_constant__ work) {
  PYOPTIM_SHARED(double, scores, kQuads);
  PYOPTIM_SHARED(int64_t, columns, kQuads);
  PYOPTIM_SHARED(int, is_open, kQuads);
  if (work.about->mode == 2) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kQuads;
  const int64_t row = first + threadIdx.x / kQuad;
  const bool is_row = row < work.x.n;
  // A NaN is not settled: the caller will be told of it.
  const bool is_number = is_row && work.norms[row] == work.norms[row];
  const bool is_certain =
      certify_row<E>(work, is_row ? row : 0, is_number && work.about->mode == 0);
  is_open[threadIdx.x / kQuad] = is_number && !is_certain;
  if (is_row && work.is_settled) work.is_settled[row] = is_number && !is_certain;
  __syncthreads();
  for (int q = 0; q < kQuads; ++q) {
    if (is_open[q]) settle_row<E>(work, first + q, scores, columns);
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads) scores_kernel(const Scores __grid_constant__ work) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kQuads + threadIdx.x / kQuad;
  const bool is_pair = pair < work.x.n * work.k;
  const int64_t row = is_pair ? pair / work.k : 0, at = is_pair ? pair % work.k : 0;
  const int64_t column = is_pair && work.columns ? work.columns[pair] : at;
  const E* const x = row_of<E>(work.x, row);
  const E* const y = row_of<E>(work.y, column);
  const double score = score_pair(work.metric, x, y, is_pair ? work.x.d : 0);
  if (is_pair && threadIdx.x % kQuad == 0) work.scores[pair] = score;
}

// -- host -----------------------------------------------------------------------------------------

int64_t n_blocks(int64_t n, int64_t per_block) { return (n + per_block - 1) / per_block; }

template <class E, int kParts>
cudaError_t launch_filter(const Filter& work, cudaStream_t stream) {
  const int64_t blocks = n_blocks(work.x.n, kTileRows) * work.n_parts;
  const auto kernel = work.values ? values_kernel<E, kParts> : nearest_kernel<E, kParts>;
  return launch_with(kFilterBytes, kernel, blocks, stream, work);
}

}  // namespace

cudaError_t squares(const Squares& work, cudaStream_t stream) {
  if (work.x.n == 0) return cudaSuccess;
  return with_type(work.x.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    return launch(squares_kernel<E>, n_blocks(work.x.n, kQuads), stream, work);
  });
}

cudaError_t pack_rows(const PackRows& work, cudaStream_t stream) {
  if (work.x.n == 0) return cudaSuccess;
  return with_type(work.x.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    return launch(pack_kernel<E>, n_blocks(work.x.n, kWarps), stream, work);
  });
}

cudaError_t filter(const Filter& work, cudaStream_t stream) {
  if (work.x.n == 0 || work.y.n == 0) return cudaSuccess;
  // Columns are numbered in 32 bits.
  if (work.y.n > kMaxBlocks - kTileColumns || work.d < 1) return cudaErrorInvalidValue;
  if (work.x.low) return launch_filter<Bf16, 2>(work, stream);
  return work.is_half ? launch_filter<F16, 1>(work, stream) : launch_filter<Bf16, 1>(work, stream);
}

cudaError_t certify(const Certify& work, cudaStream_t stream) {
  if (work.x.n == 0 || work.y.n == 0) return cudaSuccess;
  return with_type(work.x.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    return launch(certify_kernel<E>, n_blocks(work.x.n, kQuads), stream, work);
  });
}

cudaError_t scores(const Scores& work, cudaStream_t stream) {
  if (work.x.n * work.k == 0) return cudaSuccess;
  return with_type(work.x.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    return launch(scores_kernel<E>, n_blocks(work.x.n * work.k, kQuads), stream, work);
  });
}

}  // namespace pyoptim::gpu
