// What a step works on: one row per parameter tensor, as raw pointers. No Python, no torch.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"

namespace pyoptim {

constexpr int kMaxStates = 3;
constexpr int kMaxHypers = 12;
constexpr int kHyperBytes = 96;

// The combinations of (param, grad, state) that have a kernel.
enum class DTypeSet : int {
  f64 = 0,
  f32,
  bf16,
  f16,
  bf16_state32,
  f16_state32,
  bf16_master,  // the parameter has a float32 copy, the master
  f16_master,
  bf16_master_state32,
  f16_master_state32,
  count
};

inline DTypeSet dtype_set(DType param, DType state) {
  if (param == state && param != DType::unsupported)
    return static_cast<DTypeSet>(static_cast<int>(param));
  if (param == DType::bf16 && state == DType::f32) return DTypeSet::bf16_state32;
  if (param == DType::f16 && state == DType::f32) return DTypeSet::f16_state32;
  return DTypeSet::count;
}

// For a parameter with a master.
inline DTypeSet master_set(DTypeSet without) {
  if (without == DTypeSet::bf16) return DTypeSet::bf16_master;
  if (without == DTypeSet::f16) return DTypeSet::f16_master;
  if (without == DTypeSet::bf16_state32) return DTypeSet::bf16_master_state32;
  return without == DTypeSet::f16_state32 ? DTypeSet::f16_master_state32 : DTypeSet::count;
}

inline DType param_dtype(DTypeSet set) {
  constexpr DType kDTypes[] = {DType::f64,
                               DType::f32,
                               DType::bf16,
                               DType::f16,
                               DType::bf16,
                               DType::f16,
                               DType::bf16,
                               DType::f16,
                               DType::bf16,
                               DType::f16};
  return kDTypes[static_cast<int>(set)];
}

// Hyper-parameters of a group at one step count, prepared by Rule::prepare for the type the
// arithmetic runs in.
struct alignas(16) HyperBlock {
  unsigned char bytes[kHyperBytes];
};

struct TableRow;
struct ProjectKernels;  // of cpu/project.hpp
// next: the row whose first elements are wanted soon, or null.
using UpdateKernel = void (*)(
    const TableRow& row, const void* hyper, int64_t begin, int64_t end, const TableRow* next);
// As UpdateKernel over one chunk of reduce::kChunk elements or less, from its first to its last;
// the row's saved is written, and the sum of the rule's terms returned.
using SumKernel = double (*)(
    const TableRow& row, const void* hyper, int64_t begin, int64_t end, const TableRow* next);
using UnscaleKernel = void (*)(void* grad, double inv_scale, int64_t begin, int64_t end);
using PrepareHyper = void (*)(const double* raw, double step, bool first, void* hyper);

// Addresses of the first of some elements.
struct Elements {
  void* param;              // [numel], written
  const void* source;       // [numel], where the parameter is read: param, or a copy, or master
  void* grad;               // [numel], read; written only when unscaled
  void* state[kMaxStates];  // [numel] each, updated in place
  void* saved;              // [numel], of the parameter's dtype: what a sum's kernel has read
  void* master;             // [numel] float32, null without a master: the result unrounded
};

struct TableRow : Elements {
  int64_t numel;
  UpdateKernel update;
  SumKernel sum;  // null for the rules without a term
  UnscaleKernel unscale;
  const ProjectKernels* project;  // null for the rules that do not project
  // Element i of row r of dimension 0 lies at (i / inner * n_rows + r) * inner + i % inner.
  int64_t n_rows;  // 0: never projected
  int64_t inner;
  int32_t hyper;        // index of the HyperBlock
  int64_t first_chunk;  // index of its first chunk among those of all rows of a step
};

}  // namespace pyoptim
