// The CPU engine's kernels and steps of the rules that project.
#pragma once

#include <cstdint>
#include <vector>

#include "core/table.hpp"
#include "rules/projection.hpp"

namespace pyoptim {

// The kernels of one rule, variant and set of dtypes, each over n consecutive elements. `hyper` is
// the rule's Hyper; sums are [kSums].
struct ProjectKernels {
  int param_size, state_size, direction_size;  // bytes of one element
  int n_states;
  // The first three sums. n <= reduce::kChunk.
  void (*check)(const Elements& at, int64_t n, double* sums);
  // The same by blocks, for judge; null for float64.
  void (*check_shortly)(const Elements& at, int64_t n, double* sums);
  // Averages, then the plain result, unless it is deferred; all sums by blocks.
  // n <= reduce::kChunk; `next` is wanted soon, or null.
  void (*sweep)(
      const Elements& at, const void* hyper, int64_t n, double* sums, const Elements* next);
  // Averages and directions, not the result; the last two sums. n <= reduce::kChunk.
  void (*average)(const Elements& at, const void* hyper, int64_t n, void* directions, double* sums);
  // The result from directions, or from stored averages where these are null: projected by the
  // sums, or plain where those are null.
  void (*write)(
      const Elements& at, const void* hyper, int64_t n, const void* directions, const double* sums);
  // The projected result in place of the plain one.
  void (*repair)(const Elements& at, const void* hyper, int64_t n, const double* sums);
  bool (*is_orthogonal)(const void* hyper, const double* sums, int64_t size);
  Angle (*judge)(const void* hyper, const double* sums, int64_t size);
  bool (*is_deferred)(const void* hyper);
};

namespace cpu {

// As update_rows, for rows that all have kernels that project.
void project_rows(const std::vector<const TableRow*>& rows,
                  const std::vector<HyperBlock>& hypers,
                  double inv_scale);

}  // namespace cpu
}  // namespace pyoptim
