// Cuts reductions into tasks and runs them on torch's threads with the best instruction set.
#include "cpu/reduce.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/chunks.hpp"
#include "cpu/engine.hpp"

namespace pyoptim::cpu {

using gpu::Span;
using reduce::kChunk;

namespace {

double fold(Fold what, DType dtype, const void* a, const void* b, int64_t numel, double eta = 0.0) {
  const KernelTable& kernels = active_kernels();
  return kernels.fold[static_cast<int>(what)][static_cast<int>(dtype)](a, b, eta, numel);
}

std::vector<int64_t> numels_of(const std::vector<Span>& spans) {
  std::vector<int64_t> numels;
  for (const Span& span : spans) numels.push_back(span.numel);
  return numels;
}

const char* element(const void* data, DType dtype, int64_t i) {
  return static_cast<const char*>(data) + i * item_size(dtype);
}

template <class Bits>
void gather(const void* from, int64_t first, int64_t n, const gpu::RowSums& rows, char* to) {
  const int64_t step = rows.n_rows * rows.inner;  // between blocks of inner elements of a row
  for (int64_t i = first; i < first + n; ++i, to += sizeof(Bits)) {
    const int64_t at = i / rows.inner * step + i % rows.inner;
    std::memcpy(to, static_cast<const Bits*>(from) + at, sizeof(Bits));
  }
}

// The sums over chunks of rows; one task per chunk.
struct RowWork {
  const gpu::RowSums& rows;
  int64_t chunks;  // per row
  int64_t chunks_per_task;
  double* out;  // [n_rows * chunks][3]

  // Elements [first, first + n) of row r, one after the other.
  const char* elements(const void* data, int64_t r, int64_t first, int64_t n, char* buffer) const {
    const char* const row = element(data, rows.dtype, r * rows.inner);
    if (rows.inner == rows.row_size) return element(row, rows.dtype, first);
    const auto copy = item_size(rows.dtype) == 8   ? gather<uint64_t>
                      : item_size(rows.dtype) == 4 ? gather<uint32_t>
                                                   : gather<uint16_t>;
    copy(row, first, n, rows, buffer);
    return buffer;
  }

  void run(int64_t task) const {
    const int64_t end = std::min((task + 1) * chunks_per_task, rows.n_rows * chunks);
    const bool gathers = rows.inner != rows.row_size;
    const int64_t bytes = gathers ? std::min(rows.row_size, kChunk) * item_size(rows.dtype) : 0;
    std::vector<char> buffers(2 * bytes);
    for (int64_t i = task * chunks_per_task; i < end; ++i) {
      const int64_t first = i % chunks * kChunk, n = std::min(kChunk, rows.row_size - first);
      const char* const a = elements(rows.a, i / chunks, first, n, buffers.data());
      const char* const b = elements(rows.b, i / chunks, first, n, buffers.data() + bytes);
      out[3 * i] = fold(Fold::products, rows.dtype, a, b, n);
      out[3 * i + 1] = fold(Fold::squares, rows.dtype, a, nullptr, n);
      out[3 * i + 2] = fold(Fold::squares, rows.dtype, b, nullptr, n);
    }
  }
};

// The sums of each row over its chunks' sums.
void add_chunks(const RowWork& work, double* sums) {
  std::vector<double> column(work.chunks);
  for (int64_t r = 0; r < work.rows.n_rows; ++r) {
    for (int k = 0; k < 3; ++k) {
      for (int64_t c = 0; c < work.chunks; ++c) column[c] = work.out[3 * (r * work.chunks + c) + k];
      sums[3 * r + k] = fold(Fold::values, DType::f64, column.data(), nullptr, work.chunks);
    }
  }
}

}  // namespace

void partials(reduce::Kind kind, const std::vector<Span>& spans, double* out) {
  for_each_chunk(numels_of(spans), [&](size_t s, int64_t begin, int64_t end, int64_t index) {
    const Span& span = spans[s];
    const bool is_weighted = span.weight && kind == reduce::Kind::squares;
    const char* const x = element(span.data, span.dtype, begin);
    const char* const w = is_weighted ? element(span.weight, span.dtype, begin) : nullptr;
    const Fold what = is_weighted ? Fold::weighted : static_cast<Fold>(kind);
    out[index] = fold(what, span.dtype, x, w, end - begin, span.eta);
  });
}

double norm(reduce::Kind kind, const double* partials, int64_t n) {
  const Fold what = kind == reduce::Kind::maximum ? Fold::maximum : Fold::values;
  const double total = fold(what, DType::f64, partials, nullptr, n);
  return kind == reduce::Kind::squares ? std::sqrt(total) : total;
}

void scale(const std::vector<Span>& spans, double factor) {
  for_each_chunk(numels_of(spans), [&](size_t s, int64_t begin, int64_t end, int64_t) {
    const Span& span = spans[s];
    active_kernels().unscale[static_cast<int>(span.dtype)](span.data, factor, begin, end);
  });
}

void row_sums(const gpu::RowSums& rows) {
  const int64_t chunks = std::max<int64_t>(1, reduce::n_chunks(rows.row_size));
  const int64_t n = rows.n_rows * chunks;
  std::vector<double> partial(chunks > 1 ? 3 * n : 0);
  // Three sums over two arrays weigh as much as several norms.
  const int64_t elements = std::clamp<int64_t>(rows.row_size, reduce::kLanes, kChunk);
  RowWork work{rows, chunks, kTaskElements / elements, chunks > 1 ? partial.data() : rows.sums};
  const auto run = [](int64_t i, void* w) { static_cast<const RowWork*>(w)->run(i); };
  const bool is_small = rows.n_rows * rows.row_size <= kSerialElements;
  run_tasks((n + work.chunks_per_task - 1) / work.chunks_per_task, is_small, run, &work);
  if (chunks > 1) add_chunks(work, rows.sums);
}

}  // namespace pyoptim::cpu
