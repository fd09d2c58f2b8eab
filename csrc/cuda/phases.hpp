// What the phases of a projecting update share: its tensors in device memory, and how their rows
// are dealt to blocks.
//
// A step is: deal (tables to device memory; the first rows are checked), check (the other rows),
// update (by what the check found), decide (the layer view), write (what had to wait for that).
// Whatever a phase finds stays on the device: no call waits for it. A failed row ends the check of
// its tensor: blocks that start later, or look again, leave. Which rows they leave unread depends
// on the time, the result does not.
//
// Every tensor is cut into tiles of reduce::kChunk elements, and every phase has one block per
// tile. A block of an element-wise phase has the elements of its tile; a block of a phase by rows
// has an equal share of the items of its tensor: rows, or the chunks of rows that are longer.
#pragma once

#include "cuda/lanes.hpp"
#include "cuda/launchers.hpp"
#include "rules/projection.hpp"

namespace pyoptim::gpu {

using reduce::kChunk;

// What the decision is made from, whatever the rule.
struct Test {
  double sign, eps, delta;
};

struct Tensor {
  void *param, *grad, *state[2];
  const void* source;  // where param is read: param, or a copy
  int64_t numel, n_rows, inner;
  double* sums;  // [kTileSums * n_tiles]
  int32_t first_tile, n_tiles;
  int32_t has_failed;  // no channel view: a row is not at right angles, or there are no two rows
  int32_t is_layer;    // of a tensor that has failed and has rows, once it is decided
  double layer[kSums];
  Test test;
  HyperBlock hyper;
};

// Doubles per tile. Chunks of long rows are at most twice as many as tiles: 3 sums of each, later 2
// of each, before 1 number for each long row, of which there are fewer than tiles.
constexpr int kItemSums = 6, kTileSums = kItemSums + 1;

// The device memory of one step.
struct Phases {
  Tensor* tensors;
  int32_t* tensor_of;  // [n_tiles]
  double* sums;        // [kTileSums * n_tiles]
  const float* found_inf;
  int32_t n_tensors, n_tiles;
  // Whether there are tensors with rows; with rows that deal does not check; with long rows.
  bool has_rows, has_more_rows, has_long_rows;
};

inline int64_t n_tiles_of(const TableRow& row) { return reduce::n_chunks(row.numel); }

// Where a rule keeps what a Test needs, in numbers from the start of its Hyper.
struct TestFields {
  int eps, delta;
};

// Fills the phases, and the memory they name, from the workspace; writes Tensor::has_failed.
cudaError_t deal(const Update&, TestFields, Phases*, cudaStream_t);
// Writes one number per long row of a tensor with a channel view, its radial part.
cudaError_t fold_long_rows(const Phases&, cudaStream_t);
// Writes Tensor::layer and is_layer of tensors without a channel view.
cudaError_t decide(const Phases&, cudaStream_t);

namespace {

// The elements of rows of up to this many go to the threads of a part of a warp, of longer ones to
// those of a block.
constexpr int kGroupRow = 1024;
constexpr int kHeld = 8;  // elements of a thread at once

// How the items of a tensor lie in memory and among blocks.
struct Items {
  int64_t n_rows, row_size, inner, n_chunks;

  __device__ __forceinline__ explicit Items(const Tensor& t)
      : n_rows(t.n_rows),
        row_size(t.numel / t.n_rows),
        inner(t.inner),
        n_chunks((row_size + kChunk - 1) / kChunk) {}

  __device__ __forceinline__ bool are_long() const { return n_chunks > 1; }
  __device__ __forceinline__ bool are_for_groups() const { return row_size <= kGroupRow; }
  // The first item of a tile. Tiles times rows of any tensor that fits in memory fit in 63 bits.
  __device__ __forceinline__ int64_t first(int64_t tile, int64_t n_tiles) const {
    return tile * (n_rows * n_chunks) / n_tiles;
  }
};

// The place of an element of an item in its tensor.
struct Place {
  int64_t first, row, n_rows, inner;
  int size;
  bool is_contiguous;

  // Neighbouring items are neighbouring rows where these lie closer than the elements of one.
  __device__ __forceinline__ Place(const Items& items, int64_t item)
      : n_rows(items.n_rows),
        inner(items.inner),
        is_contiguous(items.inner >= items.row_size || items.n_rows == 1) {
    row = is_contiguous ? item / items.n_chunks : item % n_rows;
    const int64_t begin = (is_contiguous ? item % items.n_chunks : item / n_rows) * kChunk;
    const int64_t left = items.row_size - begin;
    size = static_cast<int>(left < kChunk ? left : kChunk);
    first = is_contiguous ? row * items.row_size + begin : begin;
  }

  // Elements of a tensor in the order of memory, to `end` but at most a chunk.
  __device__ __forceinline__ Place(int64_t begin, int64_t end)
      : first(begin), row(0), n_rows(1), inner(1), is_contiguous(true) {
    size = static_cast<int>(end - begin < kChunk ? end - begin : kChunk);
  }

  __device__ __forceinline__ int64_t at(int i) const {
    const int64_t j = first + i;
    return is_contiguous ? j : (j / inner * n_rows + row) * inner + j % inner;
  }
};

// -- visits ---------------------------------------------------------------------------------------
//
// A visitor has a type Slice<W>, W elements of every array in registers, and
//   is_aligned<W>(at)                whether read and write may access W elements from `at` at once
//   read(at, slice), write(slice, at)
//   read_one(at, k, slice), write_one(slice, k, at): element k of the slice only
//   apply(slice, n, lanes, first): computes n elements; lane first + k gets what element k adds.

// Elements first, first + step ... before `end` of an item, kLanesPerThread at each.
template <int kN, class T, class Visitor>
__device__ __forceinline__ void visit_steps(const Visitor& visitor,
                                            const Place& place,
                                            int first,
                                            int step,
                                            int end,
                                            T (&lanes)[kN][kLanesPerThread]) {
  constexpr int W = kLanesPerThread;
  const bool is_aligned = place.is_contiguous && visitor.template is_aligned<W>(place.first);
  for (int i = first; i < end; i += step) {
    const int n = place.size - i < W ? place.size - i : W;
    const bool is_whole = is_aligned && n == W;
    typename Visitor::template Slice<W> slice = {};
    if (is_whole) visitor.read(place.first + i, slice);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (!is_whole && k < n) visitor.read_one(place.at(i + k), k, slice);
    }
    visitor.apply(slice, n, lanes, 0);
    if (is_whole) visitor.write(slice, place.first + i);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      if (!is_whole && k < n) visitor.write_one(slice, k, place.at(i + k));
    }
  }
}

// Every element of an item once: the elements 4*t ... 4*t + 3 of each 1024 are thread t's.
template <int kN, class Visitor>
__device__ __forceinline__ void visit_by_block(const Visitor& visitor,
                                               const Place& place,
                                               double (&lanes)[kN][kLanesPerThread]) {
  visit_steps(visitor, place, threadIdx.x * kLanesPerThread, kLanes, place.size, lanes);
}

// The same where the sums are by the blocks of rules/projection.hpp: every 4 threads have one.
template <int kN, class T, class Visitor>
__device__ __forceinline__ void visit_columns(const Visitor& visitor,
                                              const Place& place,
                                              T (&lanes)[kN][kLanesPerThread]) {
  constexpr int kPerBlock = kBlockColumns / kLanesPerThread, kSize = static_cast<int>(kBlock);
  static_assert(kThreads / kPerBlock * kBlock == kChunk, "a thread has columns of one block");
  const int thread = threadIdx.x, begin = thread / kPerBlock * kSize;
  const int end = place.size < begin + kSize ? place.size : begin + kSize;
  const int first = begin + thread % kPerBlock * kLanesPerThread;
  visit_steps(visitor, place, first, kBlockColumns, end, lanes);
}

// All threads get the sums. shared: [kN * kLanes + kN].
template <int kN, class T>
__device__ __forceinline__ void combine_block(const T (&lanes)[kN][kLanesPerThread],
                                              double* shared,
                                              double (&sums)[kN]) {
  double* const results = shared + kN * kLanes;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int k = 0; k < kLanesPerThread; ++k) {
      shared[n * kLanes + threadIdx.x * kLanesPerThread + k] = static_cast<double>(lanes[n][k]);
    }
  }
  __syncthreads();
  const int warp = threadIdx.x / kWarp;
  if (warp < kN) {
    const double sum = combine_shared<Kind::squares>(shared + warp * kLanes);
    if (threadIdx.x % kWarp == 0) results[warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kN; ++n) sums[n] = results[n];
}

template <int kN, class Visitor>
__device__ __forceinline__ void sum_by_block(const Visitor& visitor,
                                             const Place& place,
                                             double* shared,
                                             double (&sums)[kN]) {
  double lanes[kN][kLanesPerThread] = {};
  visit_by_block(visitor, place, lanes);
  combine_block(lanes, shared, sums);
}

// A part of a warp that has a row of up to kGroupRow elements: 4 of them for each thread, or 8, or
// 8 in each of 4 passes.
struct Group {
  int size, thread, n_passes;

  __device__ __forceinline__ explicit Group(int64_t row_size) : size(1) {
    while (size < kWarp && 4 * size < row_size) size *= 2;
    thread = threadIdx.x % size;
    n_passes = row_size <= kHeld * size ? 1 : 4;
  }
};

// The elements of a pass, in halves that are read before they are used: all at once took more
// registers than two blocks have.
template <int kN, class Visitor>
__device__ __forceinline__ void visit_pass(const Visitor& visitor,
                                           const Place& place,
                                           const Group& group,
                                           int pass,
                                           double (&lanes)[kN][kHeld]) {
  constexpr int kRead = kHeld / 2;
  const int first = group.thread + group.size * pass, stride = group.size * group.n_passes;
#pragma unroll
  for (int half = 0; half < kHeld; half += kRead) {
    typename Visitor::template Slice<1> slices[kRead] = {};
#pragma unroll
    for (int k = 0; k < kRead; ++k) {
      const int i = first + (half + k) * stride;
      if (i < place.size) visitor.read_one(place.at(i), 0, slices[k]);
    }
#pragma unroll
    for (int k = 0; k < kRead; ++k) {
      const int i = first + (half + k) * stride;
      if (i >= place.size) continue;
      visitor.apply(slices[k], 1, lanes, half + k);
      visitor.write_one(slices[k], 0, place.at(i));
    }
  }
}

// All threads of a group get the sums of its row; a warp comes here together, place.size being 0
// for a group without a row.
template <int kN, class Visitor>
__device__ __forceinline__ void sum_by_group(const Visitor& visitor,
                                             const Place& place,
                                             const Group& group,
                                             double (&sums)[kN]) {
  double pair[kN];
#pragma unroll 1
  for (int n = 0; n < group.n_passes; ++n) {
    double lanes[kN][kHeld] = {};
    // 0, 2, 1, 3: the halves of the tree one after the other.
    visit_pass(visitor, place, group, n % 2 * 2 + n / 2, lanes);
#pragma unroll
    for (int s = 0; s < kN; ++s) {
      const double lane = combine_lanes<Kind::squares, kHeld>(lanes[s]);
      pair[s] = n % 2 == 0 ? lane : pair[s] + lane;
      if (n == 0 || n == 1) sums[s] = pair[s];
      if (n == 3) sums[s] += pair[s];
    }
  }
#pragma unroll
  for (int s = 0; s < kN; ++s) {
    for (int half = group.size / 2; half > 0; half /= 2) {
      sums[s] += __shfl_down_sync(0xffffffffu, sums[s], half);
    }
    sums[s] = __shfl_sync(0xffffffffu, sums[s], threadIdx.x % kWarp - group.thread);
  }
}

}  // namespace
}  // namespace pyoptim::gpu
