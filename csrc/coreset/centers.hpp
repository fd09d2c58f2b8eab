// Distances to single rows, and class medians: float64 scores of every pair that is asked for.
// Python-free and torch-free.
#pragma once

#include <cstdint>

#include "coreset/kernels.hpp"
#include "coreset/nearest.hpp"

namespace pyoptim::coreset {

// out[i][j] = squared distance of rows i of x and j of y.
struct Pairs {
  Rows x, y;
  int64_t d;
  void* out;
  DType dtype;     // of out: f32 or f64
  int64_t stride;  // elements between rows of out
};
void pairwise(const Pairs& pairs);

// The lowest row with the largest distance; nan_row is the first whose distance is no number.
struct Farthest {
  int64_t row = -1;
  double sqdist = -1;
  int64_t nan_row = -1;
};
Farthest step_center(const Rows& x,
                     int64_t d,
                     const double* center,  // [d]
                     double* min_sqdist);   // [n], updated in place

void center_sqdist(const Rows& x,
                   int64_t d,
                   const int64_t* labels,  // [n]
                   const double* centers,  // [classes][d]
                   double* out);           // [n]

struct Groups {
  Rows x;  // group after group
  int64_t d;
  const int64_t* ends;  // [n_groups]
  int64_t n_groups;
  double* out;  // [n_groups][d]; NaN for groups without rows
};
// Returns the first row with a NaN, -1 when there is none.
int64_t medians(const Groups& groups);

}  // namespace pyoptim::coreset
