// Norms, clipping, scaling and sums of rows, in the one order of reduce/order.hpp.
#include <vector>

#include "cuda/lanes.hpp"
#include "cuda/launchers.hpp"

namespace pyoptim::gpu {
namespace {

using reduce::kChunk;

constexpr int kSpanBytes = sizeof(void*) + sizeof(int64_t) + 2 * sizeof(int32_t);

// Spans of one launch, by value.
template <int kCapacity>
struct Spans {
  static constexpr int kRows = kCapacity;

  int64_t chunk;
  int32_t n_rows;
  int32_t first_block[kRows];
  DType dtype[kRows];
  int64_t numel[kRows];
  void* data[kRows];

  void set(int row, const Span& span) {
    dtype[row] = span.dtype;
    numel[row] = span.numel;
    data[row] = span.data;
  }
};
using SpanTable = Spans<(kParameterBytes - 64) / kSpanBytes>;

// With the weights of those that have some.
constexpr int kWeightBytes = sizeof(void*) + sizeof(double);
struct WeightedTable : Spans<(kParameterBytes - 64) / (kSpanBytes + kWeightBytes)> {
  const void* weight[kRows];
  double eta[kRows];

  void set(int row, const Span& span) {
    Spans::set(row, span);
    weight[row] = span.weight;
    eta[row] = span.eta;
  }
};

// The part of a span that belongs to a block.
struct Part {
  int row;
  void* data;
  DType dtype;
  int64_t begin, end;

  template <class Table>
  __device__ __forceinline__ explicit Part(const Table& table) {
    const int32_t block = static_cast<int32_t>(blockIdx.x);
    row = find_row(table.first_block, table.n_rows, block);
    data = table.data[row];
    dtype = table.dtype[row];
    begin = (block - table.first_block[row]) * table.chunk;
    end = begin + table.chunk < table.numel[row] ? begin + table.chunk : table.numel[row];
  }
};

// -- sums in order, on the device -----------------------------------------------------------------

template <class E>
using Four = Pack<E, kLanesPerThread>;

template <Kind kKind, bool kIsPartial, class E>
__device__ __forceinline__ void add_four(const Four<E>& four, double* lanes) {
#pragma unroll
  for (int k = 0; k < kLanesPerThread; ++k) {
    const double x = static_cast<double>(load(four.x[k]));
    lanes[k] = reduce::combine<kKind>(lanes[k], kIsPartial ? x : reduce::term<kKind>(x));
  }
}

// Adds elements to the lanes of this thread: neighbours, so that one access brings all of them.
template <Kind kKind, bool kIsPartial, class E>
__device__ __forceinline__ void add_to_lanes(const E* data, int64_t n, double* lanes) {
  constexpr int kInFlight = 4;
  const bool aligned = is_aligned<E, kLanesPerThread>(data);
  int64_t i = threadIdx.x * kLanesPerThread;
  for (; aligned && i + (kInFlight - 1) * kLanes + kLanesPerThread <= n; i += kInFlight * kLanes) {
    Four<E> fours[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      fours[u] = *reinterpret_cast<const Four<E>*>(data + i + u * kLanes);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) add_four<kKind, kIsPartial, E>(fours[u], lanes);
  }
  for (; i < n; i += kLanes) {
    Four<E> four = {};  // beyond the end are zeros, which no kind notices
#pragma unroll
    for (int k = 0; k < kLanesPerThread; ++k) {
      if (i + k < n) four.x[k] = data[i + k];
    }
    add_four<kKind, kIsPartial, E>(four, lanes);
  }
}

// The same for squares of gradients times the sizes of their weights.
template <class E>
__device__ __forceinline__ void add_weighted(
    const E* data, const E* weight, typename Compute<E>::type eta, int64_t n, double* lanes) {
  const bool aligned =
      is_aligned<E, kLanesPerThread>(data) && is_aligned<E, kLanesPerThread>(weight);
  for (int64_t i = threadIdx.x * kLanesPerThread; i < n; i += kLanes) {
    Four<E> grads = {}, weights = {};
    if (aligned && i + kLanesPerThread <= n) {
      grads = *reinterpret_cast<const Four<E>*>(data + i);
      weights = *reinterpret_cast<const Four<E>*>(weight + i);
    }
#pragma unroll
    for (int k = 0; k < kLanesPerThread; ++k) {
      if (i + k >= n) break;  // no zero stands for these: it times an infinite eta would be NaN
      const E g = aligned && i + kLanesPerThread <= n ? grads.x[k] : data[i + k];
      const E w = aligned && i + kLanesPerThread <= n ? weights.x[k] : weight[i + k];
      lanes[k] += reduce::term<Kind::squares>(reduce::weigh(load(g), load(w), eta));
    }
  }
}

// The lanes of all threads to one value, in thread 0.
template <Kind kKind>
__device__ __forceinline__ double combine_block(const double* lanes) {
  PYOPTIM_SHARED(double, shared, kLanes);
#pragma unroll
  for (int k = 0; k < kLanesPerThread; ++k) shared[threadIdx.x * kLanesPerThread + k] = lanes[k];
  __syncthreads();
  return threadIdx.x < kWarp ? combine_shared<kKind>(shared) : 0.0;
}

// The result over [data, data + n), in thread 0.
template <Kind kKind, bool kIsPartial, class E>
__device__ __forceinline__ double reduce_block(const E* data, int64_t n) {
  double lanes[kLanesPerThread] = {};
  add_to_lanes<kKind, kIsPartial>(data, n, lanes);
  return combine_block<kKind>(lanes);
}

template <class E>
__device__ __forceinline__ double reduce_weighted(const Part& part,
                                                  const void* weight,
                                                  double eta) {
  const E* const data = static_cast<const E*>(part.data) + part.begin;
  const int64_t n = part.end - part.begin;
  double lanes[kLanesPerThread] = {};
  if (weight) {
    const E* const weights = static_cast<const E*>(weight) + part.begin;
    add_weighted<E>(data, weights, static_cast<typename Compute<E>::type>(eta), n, lanes);
  } else {
    add_to_lanes<Kind::squares, false>(data, n, lanes);
  }
  return combine_block<Kind::squares>(lanes);
}

template <Kind kKind, class E>
__device__ __forceinline__ double reduce_part(const Part& part) {
  return reduce_block<kKind, false>(static_cast<const E*>(part.data) + part.begin,
                                    part.end - part.begin);
}

template <Kind kKind>
__global__ void __launch_bounds__(kThreads)
    partials_kernel(const SpanTable __grid_constant__ table, double* out) {
  const Part part(table);
  double result = 0.0;
  switch (part.dtype) {
    case DType::f64:
      result = reduce_part<kKind, double>(part);
      break;
    case DType::f32:
      result = reduce_part<kKind, float>(part);
      break;
    case DType::bf16:
      result = reduce_part<kKind, Bf16>(part);
      break;
    default:
      result = reduce_part<kKind, F16>(part);
      break;
  }
  if (threadIdx.x == 0) out[blockIdx.x] = result;
}

__global__ void __launch_bounds__(kThreads)
    weighted_partials_kernel(const WeightedTable __grid_constant__ table, double* out) {
  const Part part(table);
  const void* const weight = table.weight[part.row];
  const double eta = table.eta[part.row];
  double result = 0.0;
  switch (part.dtype) {
    case DType::f64:
      result = reduce_weighted<double>(part, weight, eta);
      break;
    case DType::f32:
      result = reduce_weighted<float>(part, weight, eta);
      break;
    case DType::bf16:
      result = reduce_weighted<Bf16>(part, weight, eta);
      break;
    default:
      result = reduce_weighted<F16>(part, weight, eta);
      break;
  }
  if (threadIdx.x == 0) out[blockIdx.x] = result;
}

// Where the partial results of each norm end.
struct EndTable {
  static constexpr int kRows = (kParameterBytes - 64) / sizeof(int64_t);

  int64_t begin;  // of the first
  int64_t end[kRows];
};

template <Kind kKind>
__global__ void __launch_bounds__(kThreads)
    norms_kernel(const EndTable __grid_constant__ table, const double* partials, double* results) {
  const int64_t begin = blockIdx.x == 0 ? table.begin : table.end[blockIdx.x - 1];
  const double sum = reduce_block<kKind, true>(partials + begin, table.end[blockIdx.x] - begin);
  if (threadIdx.x == 0)
    results[blockIdx.x] = kKind == Kind::squares ? Math<double>::sqrt(sum) : sum;
}

__global__ void __launch_bounds__(kThreads) clip_kernel(const Clip clip) {
  if (threadIdx.x > 0) return;
  const double inverse =
      clip.grad_scale ? 1.0 / static_cast<double>(*clip.grad_scale) : clip.inv_scale;
  *clip.clip = reduce::clip_factor(clip.max_norm, *clip.norm * inverse);
}

// -- scaling --------------------------------------------------------------------------------------

template <class E, int W>
__device__ __forceinline__ void scale_range(E* data, int64_t begin, int64_t end, double factor) {
  using T = typename Compute<E>::type;
  for (int64_t i = begin + threadIdx.x * W; i < end; i += kThreads * W) {
    Pack<E, W>* const at = reinterpret_cast<Pack<E, W>*>(data + i);
    Pack<E, W> pack = *at;
#pragma unroll
    for (int k = 0; k < W; ++k) store(pack.x[k], load(pack.x[k]) * static_cast<T>(factor));
    *at = pack;
  }
}

template <class E>
__device__ __forceinline__ void scale_part(const Part& part, double factor) {
  constexpr int kVector = 16 / sizeof(E);
  E* const data = static_cast<E*>(part.data);
  int64_t rest = part.begin;
  if (is_aligned<E, kVector>(data)) {
    rest = part.end - (part.end - part.begin) % kVector;
    scale_range<E, kVector>(data, part.begin, rest, factor);
  }
  scale_range<E, 1>(data, rest, part.end, factor);
}

// A number, on the device or not, or the inverse of a loss scale.
struct Factor {
  double value = 1.0;
  const double* at = nullptr;         // device memory, [1], in place of value; or null
  const float* inverse_of = nullptr;  // the same
  const float* found_inf = nullptr;   // when it is not 0, nothing is written

  __device__ __forceinline__ double get() const {
    if (inverse_of) return 1.0 / static_cast<double>(*inverse_of);
    return at ? *at : value;
  }
};

__global__ void __launch_bounds__(kThreads)
    scale_kernel(const SpanTable __grid_constant__ table, const Factor factor) {
  if (factor.found_inf && *factor.found_inf != 0) return;
  const Part part(table);
  const double by = factor.get();
  switch (part.dtype) {
    case DType::f64:
      return scale_part<double>(part, by);
    case DType::f32:
      return scale_part<float>(part, by);
    case DType::bf16:
      return scale_part<Bf16>(part, by);
    default:
      return scale_part<F16>(part, by);
  }
}

// -- sums of rows ---------------------------------------------------------------------------------

constexpr int kSums = 3;  // a.b, a.a, b.b

template <class E, bool kIsContiguous>
struct Rows {
  const E *a, *b;
  int64_t n_rows, row_size, inner;

  explicit Rows(const RowSums& sums)
      : a(static_cast<const E*>(sums.a)),
        b(static_cast<const E*>(sums.b)),
        n_rows(sums.n_rows),
        row_size(sums.row_size),
        inner(sums.inner) {}

  __device__ __forceinline__ int64_t offset(int64_t row, int64_t i) const {
    if (kIsContiguous) return row * row_size + i;
    return (i / inner * n_rows + row) * inner + i % inner;
  }
};

// Adds one element to each of kHeld lanes, which are as far apart as a pass leaves them.
template <class E, bool kIsContiguous, int kHeld>
__device__ __forceinline__ void add_products(const Rows<E, kIsContiguous>& rows,
                                             int64_t row,
                                             int64_t first,
                                             int64_t end,
                                             double (&lanes)[kSums][kHeld]) {
  double x[kHeld] = {}, y[kHeld] = {};  // zeros beyond the end change no sum
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int64_t i = first + k * (kLanes / kHeld);
    if (i >= end) continue;
    const int64_t at = rows.offset(row, i);
    x[k] = static_cast<double>(load(rows.a[at]));
    y[k] = static_cast<double>(load(rows.b[at]));
  }
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    lanes[0][k] += x[k] * y[k];
    lanes[1][k] += x[k] * x[k];
    lanes[2][k] += y[k] * y[k];
  }
}

// The sums over elements [begin, end) of a row, at most a chunk, by one warp; in its thread 0. A
// thread has 32 lanes; passes over 8 of them each leave enough registers for two blocks.
template <class E, bool kIsContiguous>
__device__ __forceinline__ void sum_chunk(const Rows<E, kIsContiguous>& rows,
                                          int64_t row,
                                          int64_t begin,
                                          int64_t end,
                                          double (&sums)[kSums]) {
  constexpr int kPasses = 4, kHeld = kLanesPerWarp / kPasses;
  double pair[kSums];
#pragma unroll 1
  for (int n = 0; n < kPasses; ++n) {
    double lanes[kSums][kHeld] = {};
    const int pass = n % 2 * 2 + n / 2;  // 0, 2, 1, 3: the halves of the tree one after the other
    const int64_t first = begin + threadIdx.x % kWarp + pass * kWarp;
    for (int64_t i = first; i < end; i += kLanes) add_products(rows, row, i, end, lanes);
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      const double lane = combine_lanes<Kind::squares, kHeld>(lanes[s]);
      pair[s] = n % 2 == 0 ? lane : pair[s] + lane;
      if (n == 1) sums[s] = pair[s];
      if (n == 3) sums[s] += pair[s];
    }
  }
#pragma unroll
  for (int s = 0; s < kSums; ++s) sums[s] = combine_warp<Kind::squares>(sums[s]);
}

// A row of one chunk is one warp's.
template <class E, bool kIsContiguous>
__global__ void __launch_bounds__(kThreads)
    short_rows_kernel(const Rows<E, kIsContiguous> rows, double* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= rows.n_rows) return;
  double sums[kSums];
  sum_chunk(rows, row, 0, rows.row_size, sums);
  if (threadIdx.x % kWarp > 0) return;
  for (int s = 0; s < kSums; ++s) out[row * kSums + s] = sums[s];
}

// A longer row is a block's. Chunk c belongs to lane c % kLanes, and so always to one warp, which
// meets the lane's chunks in order.
template <class E, bool kIsContiguous>
__global__ void __launch_bounds__(kThreads)
    long_rows_kernel(const Rows<E, kIsContiguous> rows, double* out) {
  PYOPTIM_SHARED(double, lanes, kSums* kLanes);
  for (int i = threadIdx.x; i < kSums * kLanes; i += kThreads) lanes[i] = 0.0;
  __syncthreads();
  const int64_t row = blockIdx.x, n_chunks = (rows.row_size + kChunk - 1) / kChunk;
  const int warp = threadIdx.x / kWarp;
  for (int64_t c = warp; c < n_chunks; c += kWarps) {
    const int64_t end = (c + 1) * kChunk < rows.row_size ? (c + 1) * kChunk : rows.row_size;
    double sums[kSums];
    sum_chunk(rows, row, c * kChunk, end, sums);
    if (threadIdx.x % kWarp > 0) continue;
    for (int s = 0; s < kSums; ++s) lanes[s * kLanes + c % kLanes] += sums[s];
  }
  __syncthreads();
  if (warp >= kSums) return;
  const double sum = combine_shared<Kind::squares>(lanes + warp * kLanes);
  if (threadIdx.x % kWarp == 0) out[row * kSums + warp] = sum;
}

// -- host -----------------------------------------------------------------------------------------

// Calls launch_table(table, n_blocks, blocks of the launches before) for as many tables as it
// takes.
template <class Table, class LaunchTable>
cudaError_t for_each_table(const Span* spans, int64_t n, int64_t chunk, LaunchTable launch_table) {
  const int capacity = choose_rows(Table::kRows);
  Table table;
  table.chunk = chunk;
  int64_t blocks_before = 0;
  for (int64_t s = 0; s < n;) {
    int64_t n_blocks = 0;
    table.n_rows = 0;
    for (; s < n && table.n_rows < capacity; ++s) {
      const int64_t blocks = (spans[s].numel + chunk - 1) / chunk;
      if (blocks == 0) continue;
      if (table.n_rows > 0 && n_blocks + blocks > kMaxBlocks) break;
      table.first_block[table.n_rows] = static_cast<int32_t>(n_blocks);
      table.set(table.n_rows++, spans[s]);
      n_blocks += blocks;
    }
    if (n_blocks == 0) break;
    const cudaError_t status = launch_table(table, n_blocks, blocks_before);
    if (status != cudaSuccess) return status;
    blocks_before += n_blocks;
  }
  return cudaSuccess;
}

cudaError_t scale_spans(const Span* spans, int64_t n, const Factor& factor, cudaStream_t stream) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += spans[i].numel;
  return for_each_table<SpanTable>(
      spans, n, choose_chunk(total), [&](const SpanTable& table, int64_t n_blocks, int64_t) {
        return launch(scale_kernel, n_blocks, stream, table, factor);
      });
}

template <Kind kKind>
cudaError_t launch_partials(const Partials& p, cudaStream_t stream) {
  return for_each_table<SpanTable>(
      p.spans, p.n_spans, kChunk, [&](const SpanTable& table, int64_t n_blocks, int64_t before) {
        return launch(partials_kernel<kKind>, n_blocks, stream, table, p.out + before);
      });
}

cudaError_t launch_weighted(const Partials& p, cudaStream_t stream) {
  return for_each_table<WeightedTable>(
      p.spans,
      p.n_spans,
      kChunk,
      [&](const WeightedTable& table, int64_t n_blocks, int64_t before) {
        return launch(weighted_partials_kernel, n_blocks, stream, table, p.out + before);
      });
}

template <Kind kKind>
cudaError_t launch_norms(const Norms& norms, cudaStream_t stream) {
  EndTable table;
  for (int64_t done = 0; done < norms.n;) {
    const int64_t n = std::min<int64_t>(norms.n - done, choose_rows(EndTable::kRows));
    table.begin = done == 0 ? 0 : norms.ends[done - 1];
    std::copy(norms.ends + done, norms.ends + done + n, table.end);
    const cudaError_t status =
        launch(norms_kernel<kKind>, n, stream, table, norms.partials, norms.results + done);
    if (status != cudaSuccess) return status;
    done += n;
  }
  return cudaSuccess;
}

template <class E, bool kIsContiguous>
cudaError_t launch_row_sums(const RowSums& sums, cudaStream_t stream) {
  const Rows<E, kIsContiguous> rows(sums);
  if (sums.row_size > kChunk) {
    return launch(long_rows_kernel<E, kIsContiguous>, sums.n_rows, stream, rows, sums.sums);
  }
  const int64_t n_blocks = (sums.n_rows + kWarps - 1) / kWarps;
  return launch(short_rows_kernel<E, kIsContiguous>, n_blocks, stream, rows, sums.sums);
}

template <class E>
cudaError_t launch_row_sums(const RowSums& sums, cudaStream_t stream) {
  // One row is the same in every order of the dimensions.
  const bool is_contiguous = sums.inner >= sums.row_size || sums.n_rows == 1;
  return is_contiguous ? launch_row_sums<E, true>(sums, stream)
                       : launch_row_sums<E, false>(sums, stream);
}

}  // namespace

cudaError_t partials(const Partials& p, cudaStream_t stream) {
  switch (p.kind) {
    case Kind::squares:
      return std::any_of(p.spans, p.spans + p.n_spans, [](const Span& s) { return s.weight; })
                 ? launch_weighted(p, stream)
                 : launch_partials<Kind::squares>(p, stream);
    case Kind::magnitudes:
      return launch_partials<Kind::magnitudes>(p, stream);
    case Kind::maximum:
      return launch_partials<Kind::maximum>(p, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t norms(const Norms& n, cudaStream_t stream) {
  switch (n.kind) {
    case Kind::squares:
      return launch_norms<Kind::squares>(n, stream);
    case Kind::magnitudes:
      return launch_norms<Kind::magnitudes>(n, stream);
    case Kind::maximum:
      return launch_norms<Kind::maximum>(n, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t clip(const Clip& c, cudaStream_t stream) { return launch(clip_kernel, 1, stream, c); }

cudaError_t scale(const Scale& s, cudaStream_t stream) {
  return scale_spans(s.spans, s.n_spans, {s.factor, s.factor_at}, stream);
}

cudaError_t unscale(const Update& update, cudaStream_t stream) {
  std::vector<Span> grads;
  for (int64_t r = 0; r < update.n_rows; ++r) {
    const TableRow& row = *update.rows[r];
    grads.push_back({row.grad, row.numel, param_dtype(update.dtypes)});
  }
  const GradFactors& f = update.factors;
  const Factor inverse = {f.inv_scale, nullptr, f.grad_scale, f.found_inf};
  return scale_spans(grads.data(), update.n_rows, inverse, stream);
}

cudaError_t row_sums(const RowSums& sums, cudaStream_t stream) {
  if (sums.n_rows == 0) return cudaSuccess;
  switch (sums.dtype) {
    case DType::f64:
      return launch_row_sums<double>(sums, stream);
    case DType::f32:
      return launch_row_sums<float>(sums, stream);
    case DType::bf16:
      return launch_row_sums<Bf16>(sums, stream);
    case DType::f16:
      return launch_row_sums<F16>(sums, stream);
    case DType::unsupported:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace pyoptim::gpu
