// The k rows of y nearest to each row of x: a float32 filter on cache-sized tiles, float64 scores
// for what it cannot rule out. The result is a function of the values alone: it does not depend on
// threads, tiles, alignment or instruction set. Python-free and torch-free.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "coreset/bound.hpp"

namespace pyoptim::coreset {

// Rows of a matrix: all of them, or those listed.
struct Rows {
  const void* data;
  DType dtype;
  int64_t stride;       // elements between rows; the elements of a row lie side by side
  const int64_t* rows;  // [n], ascending; or null: 0, 1, ...
  int64_t n;

  int64_t index(int64_t i) const { return rows ? rows[i] : i; }
  const void* at(int64_t i) const {
    return static_cast<const char*>(data) + index(i) * stride * item_size(dtype);
  }
};

// scores and indices hold, for every row of the matrix that x's rows are taken from, the k best
// found so far in ascending order of (score, index): +inf and -1 where there are none.
struct Search {
  Rows x, y;  // of one dtype
  int64_t d, k;
  Metric metric;
  int64_t first_index;  // of row 0 of y's matrix
  double* scores;       // [rows of x's matrix][k], updated in place
  int64_t* indices;     // [rows of x's matrix][k], updated in place
};

// The first row that holds a NaN, -1 when there is none. The results are incomplete then.
struct Problem {
  int64_t x_row = -1, y_row = -1;
};

Problem nearest(const Search& search);

// How many pairs were scored in float64 since the program started, for tests and benchmarks.
int64_t n_scored();

}  // namespace pyoptim::coreset
