// The rows of an update: a table of them for each launch, and what multiplies their gradients.
#pragma once

#include "cuda/device.hpp"
#include "cuda/launchers.hpp"

namespace pyoptim::gpu {
namespace {

constexpr int kHypers = 8;  // blocks of hyper-parameters in one launch

// The tensors of one launch, by value. Arrays: param, grad, states, and where terms are added up
// (kSums) what keeps the parameter, or null, and where the first sum goes. Where parameters are
// read from copies, those lie in the upper half of the first array, and a launch takes half as many
// rows.
template <int kStates, bool kSums>
struct Table {
  static constexpr int kSaved = 2 + kStates, kSumsAt = 3 + kStates;
  static constexpr int kArrays = 2 + kStates + (kSums ? 2 : 0);
  static constexpr int kHeader = sizeof(HyperBlock) * kHypers + sizeof(GradFactors) + 64;
  static constexpr int kRows = (kParameterBytes - kHeader) /
                               (sizeof(void*) * kArrays + sizeof(int64_t) + 2 * sizeof(int32_t));

  HyperBlock hypers[kHypers];
  const HyperBlock* live_hypers;  // device memory; read in place of hypers unless null
  GradFactors factors;
  int64_t chunk;
  int32_t n_rows;
  bool unscales;
  bool has_sources;
  int32_t first_block[kRows];
  int32_t hyper[kRows];  // index into hypers or live_hypers
  int64_t numel[kRows];
  void* arrays[kArrays][kRows];

  PYOPTIM_HD int source(int row) const { return has_sources ? row + kRows / 2 : row; }

  void set(int to, const TableRow& row, double* sums) {
    numel[to] = row.numel;
    arrays[0][to] = row.param;
    arrays[0][source(to)] = const_cast<void*>(row.source);
    arrays[1][to] = row.grad;
    for (int n = 0; n < kStates; ++n) arrays[2 + n][to] = row.state[n];
    if constexpr (kSums) {
      arrays[kSaved][to] = row.saved;
      arrays[kSumsAt][to] = sums ? sums + row.first_chunk : nullptr;
    }
  }
};

// -- device ---------------------------------------------------------------------------------------

// The factors of a gradient in the type of the arithmetic.
template <class T>
struct Multiplier {
  bool unscales, clips;
  T inverse, clip;

  template <class Table>
  __device__ __forceinline__ explicit Multiplier(const Table& table) {
    const GradFactors& f = table.factors;
    unscales = table.unscales;
    clips = f.clip_at != nullptr || f.clip != 1.0;
    inverse = static_cast<T>(f.grad_scale ? 1.0 / static_cast<double>(*f.grad_scale) : f.inv_scale);
    clip = static_cast<T>(f.clip_at ? *f.clip_at : f.clip);
  }

  // The element keeps the unscaled value, rounded; what the rule reads is computed from that.
  template <class G>
  __device__ __forceinline__ T read(G& grad) const {
    if (unscales) store(grad, load(grad) * inverse);
    return clipped(load(grad));
  }
  __device__ __forceinline__ T clipped(T g) const { return clips ? g * clip : g; }
};

template <class Hyper, class Table>
__device__ __forceinline__ Hyper read_hyper(const Table& table, int row) {
  const int index = table.hyper[row];
  if (table.live_hypers) return *reinterpret_cast<const Hyper*>(table.live_hypers + index);
  return *reinterpret_cast<const Hyper*>(table.hypers + index);
}

// The elements of a row that belong to a block.
struct Part {
  int row;
  int64_t index, begin, end;  // index: of the part within the row

  template <class Table>
  __device__ __forceinline__ explicit Part(const Table& table) {
    const int32_t block = static_cast<int32_t>(blockIdx.x);
    row = find_row(table.first_block, table.n_rows, block);
    index = block - table.first_block[row];
    begin = index * table.chunk;
    const int64_t left = table.numel[row] - begin;
    end = begin + (left < table.chunk ? left : table.chunk);
  }
};

// -- host -----------------------------------------------------------------------------------------

// Fills tables row by row and launches the kernel whenever one is full.
template <class Table>
class Updater {
 public:
  using Kernel = void (*)(const Table __grid_constant__);

  // chunk: elements of a block, or 0 for a choice by the size of the step.
  Updater(Kernel kernel, const Update& update, int64_t chunk, cudaStream_t stream)
      : kernel_(kernel), update_(update), stream_(stream) {
    int64_t total = 0;
    table_.has_sources = false;
    for (int64_t r = 0; r < update.n_rows; ++r) {
      const TableRow& row = *update.rows[r];
      total += row.numel;
      table_.has_sources = table_.has_sources || row.source != row.param;
    }
    capacity_ = choose_rows(Table::kRows / (table_.has_sources ? 2 : 1));
    table_.factors = update.factors;
    table_.unscales = update.factors.unscales();
    table_.live_hypers = update.live_hypers;
    table_.chunk = chunk > 0 ? chunk : choose_chunk(total);
    table_.n_rows = 0;
  }

  cudaError_t run() {
    static_assert(sizeof(Table) <= kParameterBytes, "the table exceeds a kernel's parameters");
    for (int64_t r = 0; r < update_.n_rows; ++r) {
      if (update_.rows[r]->numel == 0) continue;
      if (const cudaError_t status = add(r); status != cudaSuccess) return status;
    }
    return flush();
  }

 private:
  cudaError_t add(int64_t r) {
    const TableRow& row = *update_.rows[r];
    const int64_t blocks = (row.numel + table_.chunk - 1) / table_.chunk;
    int hyper = find_hyper(r);
    if (hyper < 0 || table_.n_rows == capacity_ || n_blocks_ + blocks > kMaxBlocks) {
      if (const cudaError_t status = flush(); status != cudaSuccess) return status;
      hyper = find_hyper(r);
    }
    const int to = table_.n_rows++;
    table_.first_block[to] = static_cast<int32_t>(n_blocks_);
    table_.hyper[to] = hyper;
    table_.set(to, row, update_.sums);
    n_blocks_ += blocks;
    return cudaSuccess;
  }

  int find_hyper(int64_t r) {
    // All launches share live_hypers, where a row's place is its own number.
    if (update_.live_hypers) return static_cast<int>(r);
    const int32_t index = update_.rows[r]->hyper;
    return slots_.find(index, [&](int slot) { table_.hypers[slot] = update_.hypers[index]; });
  }

  cudaError_t flush() {
    if (table_.n_rows == 0) return cudaSuccess;
    const cudaError_t status = launch(kernel_, n_blocks_, stream_, table_);
    table_.n_rows = 0;
    n_blocks_ = 0;
    slots_.clear();
    return status;
  }

  const Kernel kernel_;
  const Update& update_;
  const cudaStream_t stream_;
  int capacity_ = 0;  // rows of a launch
  int64_t n_blocks_ = 0;
  Slots<kHypers> slots_;
  Table table_;
};

}  // namespace
}  // namespace pyoptim::gpu
