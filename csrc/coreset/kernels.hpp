// The border of the coreset kernels that are compiled once per instruction set: raw memory in and
// out. Python-free and torch-free.
//
// Two kinds of arithmetic. *Scores* are the result: float64, 16 partial sums over the elements
// k mod 16, folded in halves, every operation rounded once; the same bits on every instruction set.
// The *filter* only decides which pairs are scored: float32 with fused multiply-adds in whatever
// order is fastest, its error bounded in coreset/bound.hpp.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"

namespace pyoptim::coreset {

// The widest panel of any instruction set; a row may gain so many candidates at once.
constexpr int kMaxColumns = 64;

// A column that the filter could not rule out.
struct Candidate {
  float value;     // of the filter
  int32_t column;  // within the block of y
};

// Columns whose medians one call finds at most.
constexpr int64_t kMedianColumns = 256;

// What the filter knows of rows of x. Room for kMaxRowLanes more follows the last row.
struct RowStates {
  float* thresholds;  // columns above it are ruled out; NaN rules out all
  float* lowest;      // the smallest value so far
  float* slacks;      // what a competitor's value can be above the smallest
  int32_t* n_candidates;
};
constexpr int64_t kMaxRowLanes = 16;

// Rows of x as the filter reads them: x * scale - center, rounded to float32.
struct PackRows {
  const void* data;
  DType dtype;
  int64_t stride;       // elements between rows
  const int64_t* rows;  // which rows [n_rows], or null: 0, 1, ...
  int64_t n_rows, d;
  double scale;         // a power of two
  const float* center;  // [d], or null
  const float* shift;   // [d], or null: with which products are summed up
  int64_t ld;           // floats between packed rows, at least d rounded up to 16
  float* out;           // [n_rows][ld]
  double* squares;      // [n_rows]: sums of squares of the packed rows
  double* products;     // [n_rows]: products of the packed rows with shift
};

// One panel of columns against packed rows.
struct Scan {
  const float* x;           // [n_rows][ld]
  int64_t ld, n_rows, d;    // n_rows: a multiple of the strip
  const float* y;           // [d][columns]
  const float* half_norms;  // [columns]
  uint64_t valid;           // the columns that exist, a bit for each
  int32_t first_column;
  float* partial;         // [n_rows][columns], where d is above the depth
  RowStates rows;         // [n_rows]
  Candidate* candidates;  // [n_rows][capacity]
  int32_t capacity;       // at least 2 * kMaxColumns
  bool only_nearest;      // k = 1: the lowest value lowers the threshold
  // Memory that will be read soon, of which every strip asks for its share.
  const char* ahead;
  int64_t ahead_bytes;
  // Makes room for kMaxColumns more candidates of a row.
  void (*make_room)(void* context, int64_t row);
  void* context;
};

// In the order of the metrics' kernels: the sum of squared differences, of products.
enum class Score : int { sqdist = 0, dot = 1, count = 2 };
using ScoreKernel = double (*)(const void* x, const void* y, int64_t d);

// Distances of rows to one centre, the smallest so far, and the row where that is largest.
struct CenterStep {
  const void* data;
  DType dtype;
  int64_t stride, d;
  const double* center;      // [d]
  const float* near_center;  // the same, with 16 zeros behind it; null where float32 has it not
  double* min_sqdist;        // updated in place
  int64_t begin, end;        // rows
  double largest;            // of the updated distances
  int64_t row;               // the lowest that has it, -1 when there is none
  int64_t nan_row;           // the first whose distance is no number, -1 when there is none
};

// Medians of columns of float32, bfloat16 or float16 rows.
struct ColumnMedians {
  const void* data;
  DType dtype;
  int64_t stride;
  const int64_t* rows;   // which rows [n], or null: 0, 1, ...
  int64_t n;             // at least 1
  int64_t first, width;  // columns
  float* copy;           // [width rounded up to 16, and 1][n + 16], written before it is read
  double* out;           // [width]
  int64_t nan_row;       // the first of the n that holds a NaN, -1 when there is none
};

struct Kernels {
  const char* isa;
  int strip;    // rows of x that are multiplied together
  int columns;  // of a panel
  // The longest run of products that the filter adds up before it adds the sum to a partial result:
  // short runs have small errors.
  int64_t depth;
  void (*pack_rows)(const PackRows& work);
  void (*scan)(const Scan& work);
  ScoreKernel score[static_cast<int>(Score::count)][4];  // by DType
  ScoreKernel to_center[4];                              // sqdist; y is float64
  void (*step_center)(CenterStep* work);
  void (*column_medians)(ColumnMedians* work);
  double median_share;  // of the copy that is written, about
  // Multiply-adds of whole vectors in registers, for the peak that benchmarks compare with: as many
  // of float32 as are returned.
  int64_t (*multiply_registers)(int64_t rounds);
};

// Those of the instruction set in use.
const Kernels& active_kernels();

}  // namespace pyoptim::coreset
